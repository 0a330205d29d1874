// The form of a composition: a section for each block, a field for each parameter.

import { html, useEffect, useState } from "./vendor/htm-preact.js"
import { at } from "./tree.js"

export const idOf = path => `field-${path.replaceAll(".", "-")}`

/** A value as it is written after the = of an override. */
export function written(value) {
  if (value === null) return "null"
  if (Array.isArray(value)) return `[${value.map(written).join(", ")}]`
  if (typeof value === "object") return `{${Object.entries(value).map(([k, v]) => `${k}: ${written(v)}`).join(", ")}}`
  return String(value)
}

function Refusal({ of }) {
  return html`<p class="refusal" id=${`${idOf(of.at)}-refusal`}><code>${of.path.split(" ")[0]}</code> ${of.rule}. <span>${of.remedy}</span></p>`
}

/** A field of one value. `page` has the changes, the refusal and how to change. */
export function Field({ path, p, value, page }) {
  const given = value !== undefined, shown = given ? written(value) : ""
  const [text, write] = useState(shown)
  useEffect(() => write(shown), [shown, page.serial])
  const id = idOf(path), refusal = page.refusal?.at === path && page.refusal
  const changed = path in page.changes
  const commit = next => next !== shown && page.change(path, next)
  const common = { id, "aria-describedby": `${id}-help`, "aria-invalid": refusal ? "true" : undefined }
  return html`
    <div class=${`field ${changed ? "changed" : ""}`}>
      <label for=${id}>${p.name.replaceAll("_", " ")}</label>
      ${p.choices
        ? html`<select ...${common} value=${given ? shown : written(p.default)} onchange=${e => commit(e.target.value)}>
            ${p.choices.map(c => html`<option value=${written(c)}>${written(c)}</option>`)}</select>`
        : html`<input ...${common} value=${text} placeholder=${p.required ? "required" : written(p.default)} spellcheck="false" autocomplete="off"
            inputmode=${/^(int|float)/.test(p.type) ? "decimal" : undefined} oninput=${e => write(e.target.value)}
            onkeydown=${e => e.key === "Enter" && commit(text)} onchange=${() => commit(text)} />`}
      ${changed && html`<button class="undo" type="button" title="Back to the preset's" aria-label=${`Undo the change of ${p.name}`} onclick=${() => page.undo(path)}>↺</button>`}
      <p class="help" id=${`${id}-help`}><i>${p.type}</i> ${p.help}</p>
      ${refusal && html`<${Refusal} of=${refusal} />`}
    </div>`
}

/** A block: its name, which opens the menu, its parameters and its children. */
export function Block({ block, page, level }) {
  const { path, kind, known, parameter } = block
  const label = block.variant ? `${kind}: ${block.variant}` : parameter ? parameter.name : kind
  const name = block.patch ? "the model's, changed" : block.own ? block.name : block.inherited ? `the model's ${block.name}` : "none"
  const refusal = page.refusal?.at === path && page.refusal
  const plain = block.own && known ? known.parameters.filter(p => !p.child) : []
  const patched = block.patch ? Object.entries(block.values).map(([key, value]) => ({ name: key, type: "", help: "", value })) : []
  return html`
    <div role="group" class=${`block level-${level}`} aria-label=${path.replaceAll(/[._]/g, " ")}>
      <div class="chooser">
        <span class="kind" aria-hidden="true">${label.replaceAll("_", " ")}</span>
        <button type="button" class="choose" data-block=${path} id=${idOf(path)} aria-haspopup="dialog" aria-label=${`${label.replaceAll("_", " ")}: ${name}. Exchange it`}
          onclick=${() => page.open(block)}>${name}</button>
        ${path in page.changes && html`<button class="undo" type="button" title="Back to the preset's" aria-label=${`Undo the change of ${label}`} onclick=${() => page.undo(path)}>↺</button>`}
      </div>
      ${block.own && known && html`<p class="help">${known.about}${known.paper && html` <cite>${known.paper}</cite>`}</p>`}
      ${refusal && html`<${Refusal} of=${refusal} />`}
      ${(plain.length > 0 || patched.length > 0) && html`<div class="fields">
        ${plain.map(p => html`<${Field} key=${p.name} path=${`${path}.${p.name}`} p=${p} value=${block.values[p.name]} page=${page} />`)}
        ${patched.map(p => html`<${Field} key=${p.name} path=${`${path}.${p.name}`} p=${p} value=${p.value} page=${page} />`)}
      </div>`}
      ${block.children.length > 0 && html`<div class="children">
        ${block.children.map(each => html`<${Block} key=${each.path} block=${each} page=${page} level=${level + 1} />`)}</div>`}
    </div>`
}

/** The values of a model that are no block, and its layout. */
export function Settings({ forms, model, page }) {
  const layouts = Object.keys(model.layout ?? {})
  return html`
    <div role="group" class="block level-1" aria-label="size">
      <div class="chooser"><span class="kind">size</span></div>
      <div class="fields">
        ${forms.settings.map(p => html`<${Field} key=${p.name} path=${p.name} p=${p} value=${model[p.name]} page=${page} />`)}
        ${layouts.map(kind => html`<${Field} key=${`layout.${kind}`} path=${`layout.${kind}`} value=${at(model, `layout.${kind}`)} page=${page}
          p=${{ name: `layout of ${kind}`, type: "pattern", help: "which layer has which variant: dense*1 ffn*", required: false, default: null }} />`)}
        ${model.overrides?.length > 0 && html`<${Field} path="overrides" value=${model.overrides} page=${page}
          p=${{ name: "overrides", type: "list", help: "changes by layer: [{layers: 0..1, attention: mla}]", required: false, default: null }} />`}
      </div>
    </div>`
}
