// The second view: runs and sweeps of the log folder, and one of them with its curves, which follow while it trains.

import { html, useEffect, useState } from "./vendor/htm-preact.js"
import { address, ask } from "./requests.js"

const EVERY = 2000 // milliseconds

/** The answer to a path, asked again and again while the page is visible. */
function useFollowed(path) {
  const [state, set] = useState({})
  useEffect(() => {
    let timer, request, ended = false
    const follow = async () => {
      request = new AbortController()
      if (!document.hidden || !state.answer)
        try {
          const answer = await ask(path, null, request.signal)
          set({ path, answer })
        } catch (error) {
          if (error.name !== "AbortError") set(old => ({ ...old, failure: error.message }))
        }
      if (!ended) timer = setTimeout(follow, EVERY)
    }
    follow()
    return () => { ended = true; clearTimeout(timer); request?.abort() }
  }, [path])
  return state.path === path || state.failure ? state : {}
}

const path = name => name.split("/").map(encodeURIComponent).join("/")
const time = seconds => seconds ? new Date(seconds * 1000).toISOString().slice(0, 16).replace("T", " ") : ""
const figure = value => value === undefined ? "" : value.toFixed(4)

function State({ of }) {
  return html`<span class=${`state state-${["running", "completed", "failed", "diverged"].includes(of) ? of : "other"}`}>${of || "sweep"}</span>`
}

function Rows({ rows, caption, jobs = false }) {
  return html`<div class="scroll" tabindex="0" role="region" aria-label=${caption}><table><caption>${caption}</caption>
    <thead><tr><th scope="col">${jobs ? "job" : "name"}</th><th scope="col">state</th><th scope="col" class="number">val loss</th>
      <th scope="col" class="number">test loss</th><th scope="col">${jobs ? "overrides" : "changed (UTC)"}</th></tr></thead>
    <tbody>${rows.map(row => html`<tr key=${row.name}>
      <th scope="row"><a href=${address("run", row.name)}>${jobs ? row.name.split("/").at(-1) : row.name}</a></th>
      <td><${State} of=${row.state || (row.kind === "sweep" ? "" : "unfinished")} />${row.jobs != null && ` ${row.jobs} jobs`}</td>
      <td class="number">${figure(row.figures?.["val/loss"])}</td><td class="number">${figure(row.figures?.["test/loss"])}</td>
      <td>${jobs ? html`<code>${row.overrides}</code>` : time(row.changed)}</td></tr>`)}</tbody></table></div>`
}

export function RunsView({ at }) {
  const part = at.options.part ?? "", number = +(at.options.page ?? 0)
  const { answer, failure } = useFollowed(`runs?${new URLSearchParams({ part, page: number })}`)
  const go = options => { location.hash = address("runs", "", options) }
  const last = answer ? Math.max(0, Math.ceil(answer.total / answer.size) - 1) : 0
  return html`<main class="runs"><h1>Runs and sweeps</h1>
    <form class="search" role="search" onsubmit=${event => { event.preventDefault(); go({ part: event.target.part.value }) }}>
      <input type="search" name="part" aria-label="Part of the name" placeholder="part of the name" defaultValue=${part} />
      <button>Find</button></form>
    ${failure && html`<p class="trouble" role="status">${failure}</p>`}
    ${answer && (answer.total ? html`<${Rows} rows=${answer.rows} caption=${`${answer.total.toLocaleString("en")} runs and sweeps, the newest first`} />
      ${last > 0 && html`<nav class="pages" aria-label="pages">
        <button type="button" disabled=${number === 0} onclick=${() => go({ part, page: number - 1 })}>Newer</button>
        <span>page ${number + 1} of ${last + 1}</span>
        <button type="button" disabled=${number >= last} onclick=${() => go({ part, page: number + 1 })}>Older</button></nav>`}`
      : html`<p>None ${part ? `with “${part}” in its name` : "yet. A training writes one"}.</p>`)}
  </main>`
}

export function RunView({ at }) {
  const { answer, failure } = useFollowed(`run/${path(at.name)}`)
  return html`<main class="runs"><nav aria-label="where"><a href="#/runs">runs</a>${answer?.sweep && html` / <a href=${address("run", answer.sweep)}>${answer.sweep}</a>`}</nav>
    <h1>${at.name}</h1>
    ${failure && html`<p class="trouble" role="status">${failure}</p>`}
    ${answer && html`
      <p><${State} of=${answer.state} /> ${answer.reason} ${answer.size}</p>
      ${answer.reports.map(file => html`<p><a href=${`report/${path(answer.name)}/${file}`} target="_blank" rel="noreferrer">Report</a></p>`)}
      ${answer.overrides && html`<p><code>${answer.overrides}</code></p>`}
      ${answer.chart ? html`<div class="curves" dangerouslySetInnerHTML=${{ __html: answer.chart }}></div>`
        : html`<p class="help">No curve yet: the first comes with the first validation.</p>`}
      ${answer.results?.length > 0 && html`<div class="scroll" tabindex="0" role="region" aria-label="results"><table><caption>results</caption>
        <thead><tr><th scope="col">figure</th><th scope="col" class="number">value</th><th scope="col">unit</th></tr></thead>
        <tbody>${answer.results.map(r => html`<tr key=${r.name}><th scope="row">${r.name}</th><td class="number">${+r.value.toPrecision(6)}</td><td>${r.unit}</td></tr>`)}</tbody></table></div>`}
      ${answer.rows && html`<${Rows} rows=${answer.rows} caption="jobs" jobs />`}`}
  </main>`
}
