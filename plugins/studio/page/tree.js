// What the form shows of a composition: each block with its parameters, as the registry's schemas say.

const FIRST = ["attention", "position", "ffn", "gating", "experts", "norm", "residual"]
export const INHERIT = "inherit"

const nodeOf = value => typeof value === "string" ? { name: value } : value ?? {}

/** The kinds of a model, those of every decoder first. */
export function inOrder(kinds) {
  return [...FIRST.filter(kind => kinds.includes(kind)), ...kinds.filter(kind => !FIRST.includes(kind)).sort()]
}

/** The value of a path in a composition; undefined where there is none. */
export function at(model, path) {
  return path.split(".").reduce((value, key) => value?.[key], model)
}

/**
 * A block of the form.
 * @param path in the composition
 * @param value at the path: a name, a mapping, null for none, or undefined for the model's
 * @param parameter that takes it; null for a part of the model
 */
export function block(forms, model, path, kind, value, parameter = null) {
  const own = value != null && value !== INHERIT
  const outer = parameter && (model[parameter.name] ?? (parameter.optional ? null : model[kind]))
  const outerPath = parameter && (model[parameter.name] ? parameter.name : kind)
  const shown = own ? nodeOf(value) : value === null ? {} : nodeOf(outer)
  const known = forms.kinds[kind].blocks[shown.name]
  const patch = own && !("name" in nodeOf(value)) // of a variant: it changes the model's own block
  return {
    path, kind, parameter, own, patch, name: patch ? null : shown.name ?? null, inherited: !own && value !== null && outer != null,
    from: !own && outer != null ? outerPath : null, known, values: own ? nodeOf(value) : {},
    children: own && known ? known.parameters.filter(p => p.child).flatMap(p => childrenOf(forms, model, path, p, nodeOf(value)[p.name])) : [],
  }
}

function childrenOf(forms, model, path, p, value) {
  if (p.many && Array.isArray(value)) return value.map((item, i) => block(forms, model, `${path}.${p.name}.${i}`, p.child, item, p))
  return [block(forms, model, `${path}.${p.name}`, p.child, value, p)]
}

/** All blocks of a form: of the model, then variants. */
export function blocks(forms, model) {
  const present = inOrder(Object.keys(forms.kinds).filter(kind => model[kind] != null))
  const own = present.map(kind => block(forms, model, kind, kind, model[kind]))
  const variants = Object.entries(model.variants ?? {}).flatMap(([kind, named]) => Object.entries(named ?? {}).map(
    ([name, node]) => ({ ...block(forms, model, `variants.${kind}.${name}`, kind, node), variant: name })))
  return { own, variants, absent: inOrder(Object.keys(forms.kinds)).filter(kind => model[kind] == null && Object.keys(forms.kinds[kind].blocks).length) }
}

/** Every block below some, themselves included. */
export function all(some) {
  return some.flatMap(each => [each, ...all(each.children)])
}
