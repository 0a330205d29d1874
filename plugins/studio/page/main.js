// The page: which view the address shows.

import { html, render, useEffect, useState } from "./vendor/htm-preact.js"
import { ModelView } from "./model.js"
import { RunView, RunsView } from "./runs.js"
import { ask, place } from "./requests.js"

function App({ forms }) {
  const [at, move] = useState(place())
  useEffect(() => {
    const follow = () => move(place())
    addEventListener("hashchange", follow)
    return () => removeEventListener("hashchange", follow)
  }, [])
  const here = view => at.view === view || (view === "runs" && at.view === "run") ? "page" : undefined
  return html`
    <header><strong>Blockwright studio</strong>
      <nav aria-label="views"><a href="#/model" aria-current=${here("model")}>Compose</a><a href="#/runs" aria-current=${here("runs")}>Runs</a></nav></header>
    ${at.view === "runs" ? html`<${RunsView} at=${at} />` : at.view === "run" ? html`<${RunView} key=${at.name} at=${at} />`
      : forms.failure ? html`<main class="runs"><h1 class="unseen">Compose a model</h1><p class="trouble" role="status">${forms.failure}</p><button type="button" onclick=${read}>Try again</button></main>`
      : forms.kinds ? html`<${ModelView} forms=${forms} at=${at} />` : html`<main class="runs"><h1 class="unseen">Compose a model</h1><p class="help">Reading the blocks…</p></main>`}`
}

if (new URLSearchParams(location.search).has("token")) history.replaceState(null, "", `${location.pathname}${location.hash}`)
const show = forms => render(html`<${App} forms=${forms} />`, document.body)
function read() {
  show({})
  ask("forms").then(show, error => show({ failure: error.message }))
}
read()
