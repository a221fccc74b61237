// @ts-check
// What the panels ask of the program. The key, where one is wanted, is kept for this tab only.

const KEY_PLACE = "lmarena_proxy.key";

/** @type {Set<() => void>} */
const refusedListeners = new Set();

/** What the program answered instead of what was asked for: OpenAI's error object, or no answer at all (status 0). */
export class ApiError extends Error {
  /** @param {string} message @param {string} code @param {number} status */
  constructor(message, code, status) {
    super(message);
    this.name = "ApiError";
    this.code = code;
    this.status = status;
  }
}

/** @returns {string} the key of this tab, or "" */
export function getKey() {
  try {
    return sessionStorage.getItem(KEY_PLACE) ?? "";
  } catch {
    return "";
  }
}

/** @param {string} key */
export function setKey(key) {
  try {
    if (key) sessionStorage.setItem(KEY_PLACE, key);
    else sessionStorage.removeItem(KEY_PLACE);
  } catch {
    // A browser that keeps nothing asks again after a reload.
  }
}

/**
 * Calls back whenever the program refuses the key.
 * @param {() => void} listener
 * @returns {() => void} to stop
 */
export function onRefused(listener) {
  refusedListeners.add(listener);
  return () => refusedListeners.delete(listener);
}

/** @param {string} path "/api/state" @returns {string} its address beside this page, below a proxy's prefix, too */
export function address(path) {
  return new URL(path.replace(/^\//, ""), document.baseURI).href;
}

/**
 * One request with the key. An answer that is an error is thrown as ApiError; a signal's abort as its own AbortError.
 * @param {string} method
 * @param {string} path
 * @param {{body?: any, headers?: Record<string, string>, signal?: AbortSignal, key?: string}} [more]
 *   `key`: to be tried in place of the tab's
 * @returns {Promise<Response>}
 */
export async function ask(method, path, more = {}) {
  const headers = new Headers(more.headers);
  const key = more.key ?? getKey();
  try {
    if (key) headers.set("Authorization", `Bearer ${key}`);
  } catch {
    throw refused(new ApiError("A key of such characters cannot be sent.", "invalid_api_key", 401));
  }
  if (more.body !== undefined) headers.set("Content-Type", "application/json");
  let response;
  try {
    response = await fetch(address(path), {
      method,
      headers,
      body: more.body === undefined ? undefined : JSON.stringify(more.body),
      signal: more.signal,
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
    });
  } catch (problem) {
    if (more.signal?.aborted) throw problem;
    throw new ApiError(String(/** @type {any} */ (problem)?.message ?? problem), "no_answer", 0);
  }
  if (response.ok) return response;
  const text = await response.text().catch(() => "");
  let error = null;
  try {
    error = JSON.parse(text).error;
  } catch {
    // Not the program's own answer: a proxy's page, for instance.
  }
  const { status, statusText } = response;
  const problem = new ApiError(error?.message ?? `${status} ${statusText}`, error?.code ?? "", status);
  throw status === 401 ? refused(problem) : problem;
}

/** @param {ApiError} problem with the key @returns {ApiError} the same, once all are told */
function refused(problem) {
  refusedListeners.forEach((listener) => listener());
  return problem;
}

/**
 * @param {string} method
 * @param {string} path
 * @param {any} [body] sent as JSON
 * @param {AbortSignal} [signal]
 * @returns {Promise<any>} the answer's JSON, or null for an empty one
 */
export async function call(method, path, body, signal) {
  const text = await (await ask(method, path, { body, signal })).text();
  return text ? JSON.parse(text) : null;
}

/**
 * Hands a file to the person: one of the program's, with the key that a plain link could not send.
 * @param {string} path
 * @param {string} [name] when the answer names none
 */
export async function download(path, name = "download") {
  const response = await ask("GET", path);
  const named = /filename="?([^";]+)"?/.exec(response.headers.get("content-disposition") ?? "");
  saveAs(await response.blob(), named ? named[1] : name);
}

/** @param {Blob} blob @param {string} name */
export function saveAs(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/**
 * @typedef {{type: string, data: string, id: string|null}} ServerEvent
 */

/**
 * Server-sent events of a response's body, each handed on when its blank line has come. A comment counts as a sign of life.
 * @param {Response} response
 * @param {(event: ServerEvent) => void} onEvent
 * @param {() => void} [onBytes] at each piece that arrives
 */
export async function readEvents(response, onEvent, onBytes) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let type = "";
  let data = "";
  /** @type {string|null} */
  let id = null;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      onBytes?.();
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = /** @type {string} */ (lines.pop());
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line === "") {
          if (data) onEvent({ type: type || "message", data: data.slice(0, -1), id });
          type = data = "";
          continue;
        }
        const colon = line.indexOf(":");
        if (colon === 0) continue;
        const field = colon < 0 ? line : line.slice(0, colon);
        const text = colon < 0 ? "" : line.slice(line[colon + 1] === " " ? colon + 2 : colon + 1);
        if (field === "data") data += text + "\n";
        else if (field === "event") type = text;
        else if (field === "id") id = text;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Posts a body and reads the events of the answer until its end.
 * @param {string} path
 * @param {any} body
 * @param {(event: ServerEvent) => void} onEvent
 * @param {AbortSignal} [signal]
 * @param {(requestId: string) => void} [onOpen] once the answer's head is there
 */
export async function stream(path, body, onEvent, signal, onOpen) {
  const response = await ask("POST", path, { body, signal, headers: { Accept: "text/event-stream" } });
  onOpen?.(response.headers.get("x-request-id") ?? "");
  await readEvents(response, onEvent);
}
