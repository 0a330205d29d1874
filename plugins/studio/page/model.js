// The first view: choices at the left, costs and the picture at the right.

import { html, useEffect, useLayoutEffect, useMemo, useRef, useState } from "./vendor/htm-preact.js"
import { Block, Settings, idOf } from "./form.js"
import { Menu } from "./menu.js"
import { address, ask } from "./requests.js"
import { INHERIT, all, blocks } from "./tree.js"

const PRESET = "deepseek_v2", NONE = "null"

const FIGURES = ["parameters", "active", "forward_flops", "cache_bytes"] // known before the first picture

function change(value, reference) {
  const percent = 100 * (value / reference - 1)
  return value != null && reference && Math.abs(percent) >= 0.005 ? `${percent > 0 ? "+" : "−"}${Math.abs(percent).toFixed(Math.abs(percent) < 10 ? 2 : 1)} %` : ""
}

function Costs({ totals, reference }) {
  return html`<dl class="costs" aria-label="costs">${FIGURES.map(name => html`
    <div key=${name}><dt>${totals?.[name].of ?? "…"}</dt><dd data-cost=${name} data-value=${totals?.[name].value}>${totals?.[name].text ?? "…"}
      <small>${totals && reference && change(totals[name].value, reference[name].value)}</small></dd></div>`)}</dl>`
}

/** The picture: each box that has a place in the form opens its menu. Its frame is the button: boxes contain others. */
function Picture({ drawn, onopen }) {
  const element = useRef(), focused = useRef(null)
  const frame = path => element.current.querySelector(`g[data-path="${CSS.escape(path)}"] > rect`)
  useLayoutEffect(() => {
    element.current.innerHTML = drawn.picture
    element.current.querySelector("svg").setAttribute("role", "group")
    for (const [path, place] of Object.entries(drawn.boxes)) {
      const rect = frame(path)
      if (!rect) continue // drawn with its like, or not at all
      rect.parentElement.classList.add("place")
      rect.setAttribute("tabindex", "0")
      rect.setAttribute("role", "button")
      rect.setAttribute("aria-haspopup", "dialog")
      rect.setAttribute("aria-label", `${path.replaceAll(".", " ")}: ${rect.parentElement.dataset.name || place}. Exchange it`)
    }
    if (focused.current) frame(focused.current)?.focus({ preventScroll: true })
  }, [drawn])
  const open = event => {
    const box = event.target.closest?.("g.place")
    if (!box || (event.type === "keydown" && !["Enter", " "].includes(event.key))) return
    event.preventDefault()
    focused.current = event.type === "keydown" ? box.dataset.path : null
    onopen(drawn.boxes[box.dataset.path])
  }
  return html`<div class="picture" ref=${element} onclick=${open} onkeydown=${open}></div>`
}

function Copied({ text, onclose }) {
  const dialog = useRef(), [done, report] = useState("")
  useEffect(() => {
    dialog.current.showModal()
    navigator.clipboard.writeText(text).then(() => report("Copied."), () => report("Select it, and copy."))
  }, [])
  return html`<dialog class="copied" ref=${dialog} aria-label="copied text" onclose=${onclose} onclick=${e => e.target === dialog.current && dialog.current.close()}>
    <p role="status">${done}</p><pre tabindex="0" aria-label="text">${text}</pre>
    <form method="dialog"><button>Close</button></form></dialog>`
}

/** What a menu offers for a block: the blocks of its kind, and where they are allowed the model's own, or none. */
function alternatives(forms, block) {
  const of = Object.entries(forms.kinds[block.kind].blocks).map(([name, known]) => (
    { value: name, label: name, about: known.about, note: [known.paper, known.provider === "blockwright" ? "" : known.provider].filter(Boolean).join(" · ") }))
  const inherit = block.parameter && { value: INHERIT, label: "the model's", about: "the block of this kind that the model has, if any" }
  const none = (!block.parameter || block.parameter.optional) && !block.variant && { value: NONE, label: "none", about: `no ${block.kind}` }
  return [inherit, ...of, none].filter(Boolean)
}

/** The state of the first view: what is chosen, and the last answer that has a picture. */
function useModel(forms, at) {
  const preset = at.name || PRESET, changes = at.options
  const [state, set] = useState({ serial: 0 }), request = useRef(null), [attempt, retry] = useState(0)
  const key = JSON.stringify([preset, changes])
  useEffect(() => {
    request.current?.abort()
    set(old => old.failure ? { ...old, failure: null } : old)
    const { signal } = request.current = new AbortController()
    const draw = changes => ask("draw", { preset, changes }, signal)
    const changed = Object.keys(changes).length > 0
    const first = changed && (state.preset === preset ? state.reference : draw({})) // costs are compared with the preset's
    Promise.all([draw(changes), first]).then(([answer, untouched]) => {
      set(old => {
        const reference = untouched || answer
        const good = answer.refusal ? (old.preset === preset && old.drawn ? old.drawn : reference) : answer
        return { preset, shown: address("model", preset, changes), reference, drawn: good.picture ? good : null, model: answer.model ?? good.model, refusal: answer.refusal, serial: old.serial + 1, failure: null }
      })
    }, error => error.name !== "AbortError" && set(old => ({ ...old, failure: error.message })))
    return () => request.current.abort()
  }, [key, attempt])
  return { ...state, preset: state.preset ?? preset, changes, retry: () => retry(attempt + 1) }
}

/** A refusal with the field that shows it: that of its path, or the nearest around it. */
function located(refusal, paths) {
  if (!refusal) return null
  let at = refusal.path.split(" ")[0].replace(/^model[./]/, "").replaceAll("/", ".").replace(/\.name$/, "")
  while (at && !paths.has(at)) at = at.slice(0, Math.max(0, at.lastIndexOf(".")))
  return { ...refusal, at }
}

export function ModelView({ forms, at }) {
  const state = useModel(forms, at), [menu, show] = useState(null), [copied, report] = useState(null), [failure, fail] = useState(null)
  const { model, preset, changes, drawn } = state
  const tree = useMemo(() => model && blocks(forms, model), [forms, model])
  const every = useMemo(() => tree ? all([...tree.own, ...tree.variants]) : [], [tree])
  const paths = useMemo(() => new Set([
    ...every.flatMap(b => [b.path, ...(b.own && b.known ? b.known.parameters.filter(p => !p.child).map(p => `${b.path}.${p.name}`) : [])]),
    ...forms.settings.map(p => p.name), "overrides", ...Object.keys(model?.layout ?? {}).map(kind => `layout.${kind}`)]), [every])
  const go = (name, options) => { location.hash = address("model", name, options) }
  const without = path => Object.fromEntries(Object.entries(changes).filter(([p]) => p !== path && !p.startsWith(`${path}.`)))
  const page = {
    changes, serial: state.serial, refusal: located(state.refusal, paths),
    change: (path, text) => go(preset, text === "" ? without(path) : { ...without(path), [path]: text }),
    undo: path => go(preset, without(path)),
    open: block => show({ block, title: block.path.replaceAll(".", " "), about: forms.kinds[block.kind].about, options: alternatives(forms, block),
      current: block.own ? block.name : block.inherited ? INHERIT : NONE }),
  }
  const choose = value => {
    const { block } = menu
    show(null)
    if (block) page.change(block.path, value)
    else go(value, {})
  }
  const openPath = path => {
    const block = every.find(each => each.path === path)
    const field = document.getElementById(idOf(path))
    if (block) page.open(block.from ? every.find(each => each.path === block.from) ?? block : block)
    else (field ?? document.querySelector(".choices input"))?.focus()
  }
  const openPresets = () => show({ title: "preset", about: "A published model to start from", current: preset,
    options: forms.presets.map(p => ({ value: p.name, label: p.name, about: p.summary })) })
  const copy = what => ask("copy", { preset, changes }).then(
    answer => answer.refusal ? fail(answer.refusal.text) : report(answer[what]), error => fail(error.message))
  const addable = tree && { title: "add a block", options: tree.absent.map(kind => ({ value: kind, label: kind.replaceAll("_", " "), about: forms.kinds[kind].about })) }
  const trouble = failure ?? state.failure ?? (page.refusal && !page.refusal.at ? page.refusal.text : null)
  useEffect(() => fail(null), [state.serial])
  return html`
    <main class="model" data-shown=${state.shown} aria-busy=${state.shown === address("model", at.name || PRESET, changes) || state.failure ? "false" : "true"}>
      <h1 class="unseen">Compose a model</h1>
      <aside class="choices" aria-label="choices">
        <div role="group" class="block level-1 preset" aria-label="preset"><div class="chooser"><span class="kind" aria-hidden="true">preset</span>
          <button type="button" class="choose" id="preset" aria-haspopup="dialog" aria-label=${`preset: ${preset}. Exchange it`} onclick=${openPresets}>${preset}</button>
          ${Object.keys(changes).length > 0 && html`<button class="undo" type="button" title="Undo all changes" aria-label="Undo all changes" onclick=${() => go(preset, {})}>↺</button>`}
        </div><p class="help">${forms.presets.find(p => p.name === preset)?.summary}</p></div>
        ${model && html`
          <${Settings} forms=${forms} model=${model} page=${page} />
          ${tree.own.map(each => html`<${Block} key=${each.path} block=${each} page=${page} level=${1} />`)}
          ${tree.variants.map(each => html`<${Block} key=${each.path} block=${each} page=${page} level=${1} />`)}
          ${tree.absent.length > 0 && html`<button type="button" class="add" aria-haspopup="dialog" onclick=${() => show(addable)}>Add a block…</button>`}`}
      </aside>
      <div class="result">
        <div class="summary">
          <${Costs} totals=${drawn?.totals} reference=${state.reference?.totals} />
          <div class="copy"><button type="button" onclick=${() => copy("yaml")}>Copy as YAML</button>
            <button type="button" onclick=${() => copy("command")}>Copy as command</button></div>
          <div role="status" aria-live="polite" class=${trouble || page.refusal ? "trouble" : "unseen"}>${trouble ?? page.refusal?.text}</div>
          ${state.failure && html`<button type="button" onclick=${state.retry}>Try again</button>`}
        </div>
        ${drawn ? html`<${Picture} drawn=${drawn} onopen=${openPath} />` : html`<p class="help waiting">${state.failure ? "" : "Composing…"}</p>`}
      </div>
      ${menu && html`<${Menu} key=${menu.title} ...${menu} onchoose=${value => menu === null ? 0 : menu.block || menu.title === "preset" ? choose(value) : page.open(
        { path: value, kind: value, parameter: null, own: false, inherited: false })} onclose=${() => show(now => now === menu ? null : now)} />`}
      ${copied && html`<${Copied} text=${copied} onclose=${() => report(null)} />`}
    </main>`
}
