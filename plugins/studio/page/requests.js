// Requests to the server of this page, and the address, which holds what is shown.

export class Failure extends Error {}

export async function ask(path, body, signal) {
  const post = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) }
  const response = await fetch(path, { ...post, signal }).catch(error => {
    if (error.name === "AbortError") throw error
    throw new Failure("The server does not answer. Is blockwright studio still running?")
  })
  if (response.ok) return response.json()
  const text = await response.text()
  let reason = text
  try { reason = JSON.parse(text).error } catch { /* it is the text itself */ }
  throw new Failure(reason)
}

// #/model/PRESET?PATH=TEXT&… · #/runs?part=TEXT&page=N · #/run/NAME
export function place() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?")
  const [view, ...rest] = path.split("/")
  return { view: view || "model", name: rest.map(decodeURIComponent).join("/"), options: Object.fromEntries(new URLSearchParams(query)) }
}

export function address(view, name, options = {}) {
  const query = new URLSearchParams(Object.entries(options).filter(([, value]) => value !== "")).toString()
  const path = name ? `/${name.split("/").map(encodeURIComponent).join("/")}` : ""
  return `#/${view}${path}${query && `?${query}`}`
}
