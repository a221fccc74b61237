// @ts-check
// What the page knows of the program. An entry that changes is replaced whole, and so is the map it is in; what did
// not change keeps its identity, so a comparison by identity tells whether there is something to render.

import { useEffect, useReducer, useRef } from "./vendor/preact-htm.js";

/**
 * @typedef {{model: string, model_id: string, modality: "chat"|"search"|"image"|"video", requires_image: boolean,
 *   sessions: number, idle: number, busy: number, resting: number, opening: number, waiting: number, tokens: number, missing: number}} PoolEntry
 * @typedef {{session_id: string, message_id: string, model_id: string, account: string|null, source: string, created_at: number,
 *   last_used_at: number|null, uses: number, position: "a"|"b"|null, failures: number, state: "idle"|"busy"|"resting"|"retired", reason: string|null,
 *   request_id: string|null}} Session
 * @typedef {{id: number, state: string, account: string|null, script: string, connected_at: string, in_flight: number, url: string}} Bridge
 * @typedef {{request_id: string, created_at: number, model: string, model_id: string, client: string, path: string, is_stream: boolean,
 *   state: string, place: number|null, attempts: number, session_id: string|null, preview: string, characters: number}} Running
 * @typedef {{request_id: string, created_at: number, model: string, model_id: string, path: string, client: string, is_stream: boolean,
 *   status: number, outcome: string, session_id: string|null, attempts: number, queued_seconds: number|null,
 *   first_byte_seconds: number|null, total_seconds: number, prompt_tokens: number|null, completion_tokens: number|null,
 *   error: string|null, preview: string|null}} RequestSummary
 * @typedef {{seq: number, time: number, level: string, event: string, message: string, request_id: string|null, traceback: string|null}} LogLine
 * @typedef {{model: string, model_id: string, reason: string, arena_status?: number|null, reply?: string|null, traceback?: string|null}} Skipped
 * @typedef {{phase: string, opened: number, planned: number, settles_at?: number|null, detail?: string,
 *   progress?: {model_id: string, opened: number, planned: number}[], skipped: Skipped[]}} Bootstrap
 * @typedef {"connecting"|"open"|"lost"|"unauthorised"} Connection
 * @typedef {{connection: Connection, has_snapshot: boolean, version: string, started_at: number, is_demo: boolean,
 *   urls: {api?: string, userscript?: string, bridge?: string}, needs_key: boolean,
 *   person: {state: string, advice: string}|null, bootstrap: Bootstrap|null,
 *   requests: {active: number, completed: number, failed: number, left: number}, violations: any[],
 *   pool: Map<string, PoolEntry>, sessions: Map<string, Session>, sessionsByModel: Map<string, Session[]>,
 *   bridges: Map<number, Bridge>, gates: Map<string, any>, running: Map<string, Running>,
 *   ended: RequestSummary[], log: LogLine[]}} State
 */

const MAX_ENDED = 500;
const MAX_LOG = 2000;
const KEYED = /** @type {const} */ ({
  bridges: "id",
  pool: "model_id",
  sessions: "session_id",
  running: "request_id",
  gates: "account",
});

/** @type {State} */
let state = {
  connection: "connecting",
  has_snapshot: false,
  version: "",
  started_at: 0,
  is_demo: false,
  urls: {},
  needs_key: false,
  person: null,
  bootstrap: null,
  requests: { active: 0, completed: 0, failed: 0, left: 0 },
  violations: [],
  pool: new Map(),
  sessions: new Map(),
  sessionsByModel: new Map(),
  bridges: new Map(),
  gates: new Map(),
  running: new Map(),
  ended: [],
  log: [],
};

/** @type {Set<() => void>} */
const listeners = new Set();
let isScheduled = false;

/** Renders what changed with the next frame: none come while the page is hidden, so then nothing is rendered. */
function schedule() {
  if (isScheduled) return;
  isScheduled = true;
  requestAnimationFrame(() => {
    isScheduled = false;
    for (const listener of [...listeners]) listener();
  });
}

export const store = {
  get: () => state,

  /** @param {() => void} listener @returns {() => void} to stop */
  subscribe(listener) {
    listeners.add(listener);
    return () => listeners.delete(listener);
  },

  /** @param {Partial<State>} some */
  set(some) {
    state = { ...state, ...some };
    schedule();
  },

  /** @param {any} document the whole of it, from a snapshot event or GET /api/state */
  applySnapshot(document) {
    /** @type {any} */
    const next = { ...state, has_snapshot: true };
    for (const [name, value] of Object.entries(document)) {
      const key = KEYED[/** @type {keyof typeof KEYED} */ (name)];
      next[name] = key ? new Map(value.map((/** @type {any} */ entry) => [entry[key], entry])) : value;
    }
    next.person ??= null;
    if (!("person" in document)) next.person = null;
    next.started_at = Date.now() / 1000 - (document.uptime_seconds ?? 0);
    next.log = (document.log ?? state.log).slice(-MAX_LOG);
    next.sessionsByModel = group(next.sessions.values(), new Map());
    state = next;
    schedule();
  },

  /** @param {any} change only what changed (see the program's `GET /api/events`) */
  applyChange(change) {
    /** @type {any} */
    const next = { ...state };
    const gone = change.gone ?? {};
    for (const [name, key] of Object.entries(KEYED)) {
      const entries = change[name] ?? [];
      const keys = gone[name] ?? [];
      if (!entries.length && !keys.length) continue;
      const map = new Map(next[name]);
      for (const entry of entries) map.set(entry[key], entry);
      for (const value of keys) map.delete(value);
      next[name] = map;
    }
    if (next.sessions !== state.sessions) {
      const touched = new Set();
      for (const entry of change.sessions ?? []) touched.add(entry.model_id);
      for (const id of gone.sessions ?? []) touched.add(state.sessions.get(id)?.model_id);
      next.sessionsByModel = group(next.sessions.values(), new Map(state.sessionsByModel), touched);
    }
    for (const [name, value] of Object.entries(change)) {
      if (name === "log") next.log = [...state.log, ...value].slice(-MAX_LOG);
      else if (name === "ended") next.ended = [...value.toReversed(), ...state.ended].slice(0, MAX_ENDED);
      else if (name !== "gone" && !(name in KEYED)) next[name] = value;
    }
    state = next;
    schedule();
  },
};

/**
 * @param {Iterable<Session>} sessions
 * @param {Map<string, Session[]>} groups
 * @param {Set<string>} [only] the models to group anew; the others keep their lists
 */
function group(sessions, groups, only) {
  for (const model of only ?? []) groups.delete(model);
  for (const session of sessions) {
    if (only && !only.has(session.model_id)) continue;
    const list = groups.get(session.model_id);
    if (list) list.push(session);
    else groups.set(session.model_id, [session]);
  }
  return groups;
}

/**
 * A value out of the state; the component renders again only when it becomes another one (Object.is). A selector
 * that makes a new object each time would render each time: select parts, and compute from them with useMemo.
 * @template T
 * @param {(state: State) => T} selector
 * @returns {T}
 */
export function useStore(selector) {
  const [, render] = useReducer((/** @type {number} */ count) => count + 1, 0);
  const value = selector(state);
  const seen = useRef({ selector, value });
  seen.current = { selector, value };
  useEffect(() => {
    const look = () => {
      if (!Object.is(seen.current.selector(state), seen.current.value)) render(undefined);
    };
    look();
    return store.subscribe(look);
  }, []);
  return value;
}
