// @ts-check
// Follows the program's events and keeps the store at what they say. The stream is read with fetch, since an
// EventSource cannot send the key.

import { ApiError, ask, readEvents } from "./api.js";
import { store } from "./store.js";

const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 8_000;
const SILENCE_MS = 25_000; // a quiet stream says something every 10 s

let lastId = "";
/** @type {(() => void)|null} */
let wake = null;
/** @type {AbortController|null} */
let reading = null;

/** Ends a pause between two attempts: when the page is looked at again, when the network is back; not while a key is wanted. */
export function retryNow() {
  if (store.get().connection !== "unauthorised") wake?.();
}

/** Begins anew with another key. */
export function restart() {
  lastId = "";
  reading?.abort();
  wake?.();
}

/** @param {number} milliseconds */
function pause(milliseconds) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    wake = () => {
      clearTimeout(timer);
      resolve(undefined);
    };
  });
}

/** @param {import("./api.js").ServerEvent} event */
function take(event) {
  if (event.id) lastId = event.id;
  if (event.type === "snapshot") store.applySnapshot(JSON.parse(event.data));
  else if (event.type === "change") store.applyChange(JSON.parse(event.data));
  else return;
  if (store.get().connection !== "open") store.set({ connection: "open" });
}

/** One connection, to its end. @returns {Promise<void>} */
async function read() {
  const abort = (reading = new AbortController());
  let watchdog = setTimeout(() => abort.abort(), SILENCE_MS);
  const alive = () => {
    clearTimeout(watchdog);
    watchdog = setTimeout(() => abort.abort(), SILENCE_MS);
  };
  /** @type {Record<string, string>} */
  const headers = { Accept: "text/event-stream" };
  if (lastId) headers["Last-Event-ID"] = lastId;
  try {
    const response = await ask("GET", "/api/events", { headers, signal: abort.signal });
    if (store.get().has_snapshot) store.set({ connection: "open" });
    await readEvents(response, take, alive);
  } finally {
    clearTimeout(watchdog);
    abort.abort();
  }
}

/** Runs as long as the page lives. */
export async function follow() {
  addEventListener("online", retryNow);
  document.addEventListener("visibilitychange", () => document.hidden || retryNow());
  let wait = FIRST_PAUSE_MS;
  for (;;) {
    const began = Date.now();
    try {
      await read();
    } catch (problem) {
      if (problem instanceof ApiError && problem.status === 401) {
        store.set({ connection: "unauthorised" });
        await pause(2 ** 31 - 1);
        store.set({ connection: "connecting" });
        continue;
      }
    }
    if (Date.now() - began > 5_000) wait = FIRST_PAUSE_MS;
    store.set({ connection: "lost" });
    await pause(wait * (0.75 + Math.random() / 2));
    wait = Math.min(wait * 2, LONGEST_PAUSE_MS);
  }
}
