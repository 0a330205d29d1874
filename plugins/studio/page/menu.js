// A menu of alternatives in a dialog: arrow keys move, letters filter, Enter chooses, Escape leaves.

import { html, useEffect, useRef, useState } from "./vendor/htm-preact.js"

// 0 for an option whose name is the part, then names that begin with it, names that hold it, descriptions; 4 for the rest.
function rank(option, part) {
  const [name, about] = [option.label, option.about].map(text => `${text}`.toLowerCase())
  return [name === part, name.startsWith(part), name.includes(part), about.includes(part), true].indexOf(true)
}

function matching(options, part) {
  const ranked = options.map(option => [rank(option, part.toLowerCase()), option]).filter(([rank]) => rank < 4)
  return ranked.sort(([a], [b]) => a - b).map(([, option]) => option)
}

export function Menu({ title, about, options, current, onchoose, onclose }) {
  const dialog = useRef(), list = useRef(), [part, filter] = useState("")
  const shown = matching(options, part)
  useEffect(() => {
    dialog.current.showModal() // its first field has the focus
    list.current.querySelector("[aria-current]")?.scrollIntoView({ block: "center" })
    return () => dialog.current?.close()
  }, [])
  const move = event => {
    const items = [...list.current.querySelectorAll("button")]
    const here = items.indexOf(document.activeElement)
    const to = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: items.length - 1 }[event.key]
    if (to === undefined || (here < 0 && ["Home", "End"].includes(event.key))) return
    event.preventDefault()
    if (to < 0) dialog.current.querySelector("input").focus()
    else items[Math.min(to, items.length - 1)]?.focus()
  }
  const enter = event => { event.preventDefault(); if (shown.length) onchoose(shown[0].value) }
  return html`
    <dialog class="menu" ref=${dialog} aria-labelledby="menu-title" onclose=${onclose} onkeydown=${move}
      onclick=${event => event.target === dialog.current && dialog.current.close()}>
      <form onsubmit=${enter}>
        <h2 id="menu-title">${title}</h2>
        ${about && html`<p class="help">${about}</p>`}
        <input type="search" aria-label=${`Filter ${title}`} placeholder="filter" value=${part}
          oninput=${event => filter(event.target.value)} />
      </form>
      <ul ref=${list}>
        ${shown.map(o => html`<li key=${o.value}>
          <button type="button" data-value=${o.value} aria-current=${o.value === current ? "true" : undefined} onclick=${() => onchoose(o.value)}>
            <b>${o.label}</b>${o.note && html` <small>${o.note}</small>`}<span>${o.about}</span>
          </button></li>`)}
        ${!shown.length && html`<li class="help">Nothing matches.</li>`}
      </ul>
    </dialog>`
}
