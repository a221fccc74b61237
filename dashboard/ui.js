// @ts-check
// The small parts that panels are made of. Text from the program or the network only ever becomes a text node.

import { call } from "./api.js";
import { formatAgo, formatDateTime, formatDuration, hasText, NONE, t } from "./i18n.js";
import { useStore } from "./store.js";
import { html, memo, useCallback, useEffect, useId, useRef, useState } from "./vendor/preact-htm.js";

// ------------------------------------------------------------------------------------------------ icons

/** Strokes on a grid of 24. @type {Record<string, string>} */
const ICONS = {
  now: "M3 12h4l3-8 4 16 3-8h4",
  pool: "M4 4h6v6H4zM14 4h6v6h-6zM4 14h6v6H4zM14 14h6v6h-6z",
  requests: "M8 6h12M8 12h12M8 18h12M4 6h.01M4 12h.01M4 18h.01",
  time: "M4 4v16h16M8 15l3.5-4 3 2.5L20 7",
  log: "M5 5h14v14H5zM8 10l2 2-2 2M13 14h3",
  settings: "M4 7h9M17 7h3M15 5v4M4 17h3M11 17h9M9 15v4",
  connect: "M9 3v5M15 3v5M6 8h12v3a6 6 0 0 1-12 0zM12 17v4",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  check: "M5 12.5l4.5 4.5L19 7.5",
  close: "M6 6l12 12M18 6L6 18",
  search: "M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14M16 16l4.5 4.5",
  download: "M12 4v11M7 11l5 5 5-5M5 20h14",
  play: "M8 5l11 7-11 7z",
  pause: "M8 5v14M16 5v14",
  stop: "M6 6h12v12H6z",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8M12 2v2M12 20v2M4.9 4.9l1.4 1.4M17.7 17.7l1.4 1.4M2 12h2M20 12h2M4.9 19.1l1.4-1.4M17.7 6.3l1.4-1.4",
  moon: "M20 14.5A8 8 0 1 1 9.5 4a6.5 6.5 0 0 0 10.5 10.5z",
  auto: "M4 5h16v11H4zM9 20h6M12 16v4",
  language: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18M3 12h18M12 3c3 3 3 15 0 18M12 3c-3 3-3 15 0 18",
  warning: "M12 4L2.5 20h19zM12 10v4.5M12 17.5v.01",
  info: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18M12 11v6M12 7.5v.01",
  external: "M14 4h6v6M20 4l-9 9M18 14v6H4V6h6",
  right: "M9 5l7 7-7 7",
  left: "M15 5l-7 7 7 7",
  down: "M5 9l7 7 7-7",
  up: "M5 15l7-7 7 7",
  plus: "M12 5v14M5 12h14",
  minus: "M5 12h14",
  trash: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13M10 11v5M14 11v5",
  refresh: "M20 11a8 8 0 1 0-2.3 6.3M20 5v6h-6",
  key: "M14.5 4a5.5 5.5 0 1 0 0 11 5.5 5.5 0 0 0 0-11M10.5 13.5L4 20M6.5 17.5L9 20M15.5 8.5v.01",
  link: "M10 14a4 4 0 0 0 5.7 0l3.1-3.1a4 4 0 0 0-5.7-5.7L12 6.3M14 10a4 4 0 0 0-5.7 0l-3.1 3.1a4 4 0 0 0 5.7 5.7l1.1-1.1",
  send: "M4 12l16-8-6 16-3-7z",
  filter: "M4 5h16l-6 8v6l-4-2v-4z",
  clock: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18M12 7v5.5l3.5 2",
  unplugged: "M9 3v3M15 3v3M6 8h2M12 8h6v3a6 6 0 0 1-1 3.3M12 17v4M4 4l16 16M6.3 12A6 6 0 0 0 13 16.9",
  person: "M12 4a4 4 0 1 0 0 8 4 4 0 0 0 0-8M4 21c1-9 15-9 16 0",
  tab: "M3 5h18v14H3zM3 9h18M10 5v4",
};

/** @param {{name: string, size?: number, class?: string}} props */
export const Icon = memo(({ name, size = 16, class: extra = "" }) => html`
  <svg class=${`icon ${extra}`} width=${size} height=${size} viewBox="0 0 24 24" aria-hidden="true" focusable="false">
    <path d=${ICONS[name] ?? ""} />
  </svg>`);

// ------------------------------------------------------------------------------------------------ buttons and fields

/**
 * @param {{kind?: "default"|"primary"|"danger"|"quiet", icon?: string, small?: boolean, busy?: boolean, disabled?: boolean,
 *   onClick?: (event: any) => any, children?: any, [name: string]: any}} props While the promise that onClick returns is
 *   open the button is busy.
 */
export function Button({ kind = "default", icon, small, busy, disabled, onClick, children, class: extra = "", ...rest }) {
  const [isBusy, setBusy] = useState(false);
  const isHere = useRef(true);
  useEffect(() => () => void (isHere.current = false), []);
  const waits = busy || isBusy;
  /** @param {any} event */
  const click = async (event) => {
    if (waits) return event.preventDefault();
    const result = onClick?.(event);
    if (!(result instanceof Promise)) return undefined;
    setBusy(true);
    try {
      await result;
    } finally {
      if (isHere.current) setBusy(false);
    }
    return undefined;
  };
  return html`
    <button type="button" class=${`button ${kind} ${small ? "small" : ""} ${extra}`} disabled=${disabled}
      aria-busy=${waits ? "true" : undefined} onClick=${click} ...${rest}>
      ${waits ? html`<span class="spinner" aria-hidden="true"></span>` : icon && html`<${Icon} name=${icon} />`}
      ${children != null && html`<span>${children}</span>`}
    </button>`;
}

/** @param {{icon: string, label: string, [name: string]: any}} props */
export const IconButton = ({ icon, label, class: extra = "", ...rest }) =>
  html`<${Button} kind="quiet" icon=${icon} class=${`icon-only ${extra}`} aria-label=${label} title=${label} ...${rest} />`;

/** A label above one control. @param {{label: string, hint?: string, error?: string, children: any}} props */
export const Field = ({ label, hint, error, children }) => html`
  <label class="field">
    <span class="field-label">${label}</span>
    ${children}
    ${hint && html`<span class="field-hint">${hint}</span>`}
    ${error && html`<span class="field-error" role="alert">${error}</span>`}
  </label>`;

/** @param {{value: string, onInput: (text: string) => void, label: string, [name: string]: any}} props */
export const SearchField = ({ value, onInput, label, class: extra = "", ...rest }) => html`
  <span class=${`search ${extra}`}>
    <${Icon} name="search" />
    <input type="search" value=${value} placeholder=${label} aria-label=${label} spellcheck="false" autocomplete="off"
      onInput=${(/** @type {any} */ event) => onInput(event.currentTarget.value)} ...${rest} />
  </span>`;

/**
 * @param {{label: string, value: string, options: [string, string][], onChange: (value: string) => void, showLabel?: boolean,
 *   [name: string]: any}} props
 */
export const Select = ({ label, value, options, onChange, showLabel, ...rest }) => html`
  <label class="select">
    <span class=${showLabel ? "select-label" : "hidden"}>${label}</span>
    <select value=${value} onChange=${(/** @type {any} */ event) => onChange(event.currentTarget.value)} ...${rest}>
      ${options.map(([id, text]) => html`<option key=${id} value=${id} selected=${id === value}>${text}</option>`)}
    </select>
  </label>`;

/** @param {{label: string, checked: boolean, onChange: (checked: boolean) => void}} props */
export const Toggle = ({ label, checked, onChange }) => html`
  <label class="toggle">
    <input type="checkbox" role="switch" checked=${checked}
      onChange=${(/** @type {any} */ event) => onChange(event.currentTarget.checked)} />
    <span>${label}</span>
  </label>`;

/**
 * One of a few, shown side by side: a group of radio buttons to the keyboard and to a reader.
 * @param {{label: string, value: string, options: [string, any][], onChange: (value: string) => void}} props
 */
export function Segments({ label, value, options, onChange }) {
  const name = useId();
  return html`
    <fieldset class="segments">
      <legend class="hidden">${label}</legend>
      ${options.map(([id, text]) => html`
        <label key=${id}>
          <input type="radio" name=${name} value=${id} checked=${id === value} onChange=${() => onChange(id)} />
          <span>${text}</span>
        </label>`)}
    </fieldset>`;
}

/**
 * Tabs over one panel; the arrow keys go from one to the next.
 * @param {{label: string, current: string, tabs: [string, any][], onSelect: (id: string) => void, children?: any}} props
 */
export function Tabs({ label, current, tabs, onSelect, children }) {
  const base = useId();
  /** @param {KeyboardEvent} event */
  const onKeyDown = (event) => {
    const at = tabs.findIndex(([id]) => id === current);
    const steps = /** @type {Record<string, number>} */ ({ ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 });
    if (!(event.key in steps)) return;
    event.preventDefault();
    const [id] = tabs.at(steps[event.key] % tabs.length) ?? tabs[0];
    onSelect(id);
    document.getElementById(`${base}-${id}`)?.focus();
  };
  return html`
    <div class="tabs" role="tablist" aria-label=${label} onKeyDown=${onKeyDown}>
      ${tabs.map(([id, text]) => html`
        <button key=${id} type="button" role="tab" id=${`${base}-${id}`} aria-selected=${id === current ? "true" : "false"}
          aria-controls=${`${base}-panel`} tabindex=${id === current ? 0 : -1} onClick=${() => onSelect(id)}>${text}</button>`)}
    </div>
    <div role="tabpanel" id=${`${base}-panel`} aria-labelledby=${`${base}-${current}`} tabindex="0">${children}</div>`;
}

// ------------------------------------------------------------------------------------------------ dialogs and messages

/**
 * A modal dialog while it is rendered: the browser keeps the focus in it, Escape closes it, and the focus goes back.
 * @param {{title: any, onClose: () => void, children?: any, footer?: any, kind?: "dialog"|"drawer"}} props
 */
export function Dialog({ title, onClose, children, footer, kind = "dialog" }) {
  const element = useRef(/** @type {HTMLDialogElement|null} */ (null));
  const heading = useId();
  useEffect(() => {
    const before = /** @type {HTMLElement|null} */ (document.activeElement);
    const dialog = /** @type {HTMLDialogElement} */ (element.current);
    dialog.showModal();
    return () => {
      dialog.close(); // Before the focus goes back: what is behind an open dialog takes none.
      if (before?.isConnected) before.focus();
    };
  }, []);
  /** @param {MouseEvent} event */
  const onClick = (event) => event.target === element.current && onClose();
  return html`
    <dialog class=${`dialog ${kind}`} ref=${element} aria-labelledby=${heading} onClick=${onClick}
      onCancel=${(/** @type {Event} */ event) => { event.preventDefault(); onClose(); }}>
      <div class="dialog-body">
        <header class="dialog-head">
          <h2 id=${heading}>${title}</h2>
          <${IconButton} icon="close" label=${t("ui.close")} onClick=${onClose} />
        </header>
        <div class="dialog-content" tabindex="0" role="group" aria-labelledby=${heading}>${children}</div>
        ${footer && html`<footer class="dialog-foot">${footer}</footer>`}
      </div>
    </dialog>`;
}

/** @type {{list: any[], listeners: Set<() => void>, next: number}} */
const messages = { list: [], listeners: new Set(), next: 1 };
/** @type {{question: any, listeners: Set<() => void>}} */
const asking = { question: null, listeners: new Set() };

/** @param {{listeners: Set<() => void>}} source */
function useSource(source) {
  const [, render] = useState(0);
  useEffect(() => {
    const listener = () => render((count) => count + 1);
    source.listeners.add(listener);
    return () => void source.listeners.delete(listener);
  }, []);
}

/** A short message that goes by itself. @param {string} text @param {"info"|"ok"|"bad"} [kind] */
export function toast(text, kind = "info") {
  const id = messages.next++;
  const drop = () => {
    messages.list = messages.list.filter((message) => message.id !== id);
    messages.listeners.forEach((listener) => listener());
  };
  messages.list = [...messages.list.slice(-3), { id, text, kind, drop }];
  messages.listeners.forEach((listener) => listener());
  setTimeout(drop, kind === "bad" ? 9_000 : 4_000);
}

/**
 * Asks before something that cannot be taken back.
 * @param {{title: string, text: string, action: string, kind?: "primary"|"danger"}} question
 * @returns {Promise<boolean>}
 */
export function confirm(question) {
  return new Promise((resolve) => {
    asking.question = { ...question, resolve };
    asking.listeners.forEach((listener) => listener());
  });
}

/** Where toasts and questions appear; once, in the shell. */
export function Messages() {
  useSource(messages);
  useSource(asking);
  const { question } = asking;
  /** @param {boolean} answer */
  const answer = (answer) => {
    asking.question = null;
    asking.listeners.forEach((listener) => listener());
    question.resolve(answer);
  };
  const toasts = useRef(/** @type {HTMLElement|null} */ (null));
  const count = messages.list.length;
  useEffect(() => {
    // Shown anew, so that they lie above a dialog that opened after them.
    if (toasts.current?.matches(":popover-open")) toasts.current.hidePopover();
    if (count) toasts.current?.showPopover();
  }, [messages.list]);
  return html`
    <div class="hidden" role="status">${messages.list.at(-1)?.text}</div>
    <div class="toasts" ref=${toasts} popover="manual">
      ${messages.list.map((message) => html`
        <div key=${message.id} class=${`toast ${message.kind}`}>
          <${Icon} name=${message.kind === "bad" ? "warning" : message.kind === "ok" ? "check" : "info"} />
          <span>${message.text}</span>
          <${IconButton} icon="close" label=${t("ui.close")} onClick=${message.drop} />
        </div>`)}
    </div>
    ${question && html`
      <${Dialog} title=${question.title} onClose=${() => answer(false)} footer=${html`
        <${Button} onClick=${() => answer(false)}>${t("ui.cancel")}<//>
        <${Button} kind=${question.kind ?? "danger"} onClick=${() => answer(true)}>${question.action}<//>`}>
        <p>${question.text}</p>
      <//>`}`;
}

/** Does something and says how it went. @param {() => Promise<any>} work @param {string} [done] @returns {Promise<any>} */
export async function attempt(work, done) {
  try {
    const result = await work();
    if (done) toast(done, "ok");
    return result ?? true;
  } catch (problem) {
    toast(/** @type {any} */ (problem)?.message ?? String(problem), "bad");
    return undefined;
  }
}

// ------------------------------------------------------------------------------------------------ showing things

/** @param {{icon?: string, title: string, children?: any}} props */
export const Empty = ({ icon = "info", title, children }) => html`
  <div class="empty"><${Icon} name=${icon} size=${28} /><p class="empty-title">${title}</p>${children}</div>`;

/** What is on its way; it shows itself only when that takes a while. */
export const Loading = () => html`<div class="loading" role="status"><span class="spinner" aria-hidden="true"></span><span>${t("ui.loading")}</span></div>`;

/** One number with its name. @param {{label: string, value: any, hint?: any, kind?: ""|"ok"|"warn"|"bad", wide?: boolean}} props */
export const Stat = memo(({ label, value, hint = "", kind = "", wide = false }) => html`
  <div class=${`stat ${kind} ${wide ? "wide" : ""}`}><dt>${label}</dt><dd>${value}${hint !== "" && html`<span class="stat-hint">${hint}</span>`}</dd></div>`);

/** @param {{kind?: ""|"ok"|"warn"|"bad"|"accent", icon?: string, children: any, title?: string}} props */
export const Badge = ({ kind = "", icon, children, title }) => html`
  <span class=${`badge ${kind}`} title=${title}>${icon && html`<${Icon} name=${icon} size=${12} />`}${children}</span>`;

/** What tells two models of one name apart. @param {{entry: {modality: string, requires_image: boolean}}} props */
export const ModelKind = ({ entry }) => html`
  ${entry.modality !== "chat" && html` <${Badge}>${t(`modality.${entry.modality}`)}<//>`}
  ${entry.requires_image && html` <${Badge} title=${t("pool.requires_image")}>${t("pool.from_image")}<//>`}`;

/** How a request ended: its HTTP status and, in words, its outcome. @param {{status: number, outcome?: string|null}} props */
export const StatusBadge = memo(({ status, outcome }) => {
  const left = outcome === "client_left";
  const kind = left ? "" : status >= 400 ? "bad" : outcome === "stop" || !outcome ? "ok" : "warn";
  const icon = left ? "minus" : kind === "bad" ? "close" : kind === "ok" ? "check" : "warning";
  const key = `outcome.${outcome}`;
  return html`<${Badge} kind=${kind} icon=${icon}>
    <span class="num">${status}</span>${outcome && html` <span>${hasText(key) ? t(key) : outcome}</span>`}<//>`;
});

/** @param {{text: string, label?: string}} props */
export function CopyButton({ text, label = t("ui.copy") }) {
  const [isDone, setDone] = useState(false);
  const copy = async () => {
    if (!(await copyText(text))) return toast(t("ui.copy_failed"), "bad");
    setDone(true);
    setTimeout(() => setDone(false), 1_500);
    return undefined;
  };
  const now = isDone ? t("ui.copied") : label;
  return html`<${IconButton} icon=${isDone ? "check" : "copy"} label=${now} class="copy" onClick=${() => void copy()} />`;
}

/** @param {string} text @returns {Promise<boolean>} */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // No clipboard over plain HTTP from another machine: the old way.
  }
  const area = document.createElement("textarea");
  area.value = text;
  const place = document.querySelector("dialog[open]") ?? document.body;
  place.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

/** An id to copy, shortened in its middle when asked. @param {{value: string|null|undefined, length?: number}} props */
export const Id = ({ value, length = 0 }) => {
  if (!value) return NONE;
  const shown = length && value.length > length ? `${value.slice(0, length - 5)}…${value.slice(-4)}` : value;
  return html`<span class="id"><code title=${value}>${shown}</code><${CopyButton} text=${value} /></span>`;
};

/** @param {{title: any, text: string, open?: boolean}} props a long text that opens */
export const More = ({ title, text, open }) => html`
  <details class="more" open=${open}>
    <summary>${title}</summary>
    <div class="more-text"><pre tabindex="0">${text}</pre><${CopyButton} text=${text} /></div>
  </details>`;

/** @param {{error: any, onRetry?: () => void}} props */
export const ErrorNote = ({ error, onRetry }) => html`
  <div class="note bad" role="alert">
    <${Icon} name="warning" /><span>${error?.status === 0 ? t("ui.no_answer") : error?.message ?? String(error)}</span>
    ${onRetry && html`<${Button} small icon="refresh" onClick=${onRetry}>${t("ui.retry")}<//>`}
  </div>`;

// ------------------------------------------------------------------------------------------------ time

/** One clock for all; it stands still while the page is hidden or nobody looks at it. @type {Set<() => void>} */
const tickers = new Set();
let clock = 0;
const tick = () => document.hidden || [...tickers].forEach((ticker) => ticker());
document.addEventListener("visibilitychange", tick);

/**
 * A text that is made anew each second and rendered when it is another one.
 * @param {() => string} make
 * @returns {string}
 */
export function useTicking(make) {
  const [, setText] = useState("");
  const current = useRef(make);
  current.current = make;
  useEffect(() => {
    const ticker = () => setText(current.current());
    ticker();
    if (!tickers.size) clock = window.setInterval(tick, 1_000);
    tickers.add(ticker);
    return () => {
      tickers.delete(ticker);
      if (!tickers.size) clearInterval(clock);
    };
  }, []);
  return make();
}

/** How long ago, with the moment as its title. @param {{at: number|null|undefined}} props Unix seconds */
export const Time = memo(({ at }) => {
  const text = useTicking(() => formatAgo(at));
  return at == null ? NONE : html`<time datetime=${new Date(at * 1000).toISOString()} title=${formatDateTime(at)}>${text}</time>`;
});

/** @param {{seconds: number|null|undefined}} props */
export const Duration = memo(({ seconds }) => html`<span class="num">${formatDuration(seconds)}</span>`);

/** Time that runs. @param {{since: number}} props Unix seconds */
export const Elapsed = memo(({ since }) =>
  html`<span class="num">${useTicking(() => formatDuration(Math.floor(Math.max(0, Date.now() / 1000 - since))))}</span>`);

// ------------------------------------------------------------------------------------------------ tables

/** @typedef {{by: string, descending: boolean}} Sort */

/** @param {string} by @param {boolean} [descending] @returns {[Sort, (by: string, numeric?: boolean) => void]} */
export function useSort(by, descending = false) {
  const [sort, setSort] = useState({ by, descending });
  const onSort = useCallback((/** @type {string} */ next, numeric = false) => {
    setSort((now) => (now.by === next ? { by: next, descending: !now.descending } : { by: next, descending: numeric }));
  }, []);
  return [sort, onSort];
}

/**
 * @param {{id: string, label: string, sort: Sort, onSort: (by: string, numeric?: boolean) => void, numeric?: boolean,
 *   title?: string}} props
 */
export const SortHeader = ({ id, label, sort, onSort, numeric = false, title }) => {
  const isBy = sort.by === id;
  return html`
    <th scope="col" class=${numeric ? "numeric" : ""} aria-sort=${isBy ? (sort.descending ? "descending" : "ascending") : undefined}>
      <button type="button" class="sort" title=${title} onClick=${() => onSort(id, numeric)}>
        <span>${label}</span>
        <${Icon} name=${isBy && sort.descending ? "down" : "up"} size=${12} class=${isBy ? "" : "unsorted"} />
      </button>
    </th>`;
};

const collator = new Intl.Collator(undefined, { numeric: true });

/** Orders by a value, those without one last, whichever way. @template T @param {T[]} list @param {(item: T) => any} of @param {boolean} descending */
export function sortBy(list, of, descending) {
  const sign = descending ? -1 : 1;
  const keyed = list.map((item) => ({ item, key: of(item) }));
  keyed.sort((a, b) => {
    if (a.key == null || b.key == null) return Number(a.key == null) - Number(b.key == null);
    return sign * (typeof a.key === "string" ? collator.compare(a.key, b.key) : a.key - b.key);
  });
  return keyed.map(({ item }) => item);
}

// ------------------------------------------------------------------------------------------------ hooks

/**
 * What the program answers, asked anew every so often while the panel is shown and the page is looked at, and once
 * the program is back: it may have been started with other settings.
 * @param {string|null} path null: not now
 * @param {number} [seconds] 0: once
 * @returns {{data: any, error: any, isLoading: boolean, reload: () => void}}
 */
export function usePolled(path, seconds = 0) {
  const [result, setResult] = useState({ path, data: /** @type {any} */ (null), error: /** @type {any} */ (null), isLoading: true });
  const [round, setRound] = useState(0);
  useEffect(() => {
    if (!path) return undefined;
    const abort = new AbortController();
    let timer = 0;
    let isDue = false;
    const run = async () => {
      isDue = false;
      try {
        const data = await call("GET", path, undefined, abort.signal);
        setResult({ path, data, error: null, isLoading: false });
      } catch (error) {
        if (abort.signal.aborted) return;
        setResult((now) => ({ path, data: now.path === path ? now.data : null, error, isLoading: false }));
      }
      if (seconds && !abort.signal.aborted) timer = window.setTimeout(next, seconds * 1_000);
    };
    const next = () => (document.hidden ? (isDue = true) : void run());
    const seen = () => !document.hidden && isDue && void run();
    document.addEventListener("visibilitychange", seen);
    void run();
    return () => {
      abort.abort();
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", seen);
    };
  }, [path, seconds, round]);
  const reload = useCallback(() => setRound((count) => count + 1), []);
  const isOpen = useStore((state) => state.connection === "open");
  const wasOpen = useRef(isOpen);
  useEffect(() => {
    if (isOpen && !wasOpen.current) reload();
    wasOpen.current = isOpen;
  }, [isOpen]);
  const { data, error, isLoading } = result;
  return result.path === path ? { data, error, isLoading, reload } : { data: null, error: null, isLoading: true, reload };
}

/** The value, once it has been the same for a while. @template T @param {T} value @param {number} [milliseconds] @returns {T} */
export function useDebounced(value, milliseconds = 250) {
  const [settled, setSettled] = useState(value);
  useEffect(() => {
    const timer = setTimeout(() => setSettled(() => value), milliseconds);
    return () => clearTimeout(timer);
  }, [value, milliseconds]);
  return settled;
}

/** Whether the window is such, and a render when that changes. @param {string} query "(max-width: 720px)" @returns {boolean} */
export function useMedia(query) {
  const [matches, setMatches] = useState(() => matchMedia(query).matches);
  useEffect(() => {
    const list = matchMedia(query);
    const change = () => setMatches(list.matches);
    change();
    list.addEventListener("change", change);
    return () => list.removeEventListener("change", change);
  }, [query]);
  return matches;
}

// ------------------------------------------------------------------------------------------------ notifications

// "silent" or "sound" when the person has turned them on; anything else is off.
const NOTIFY_PLACE = "lmarena_proxy.notify";

/** What stands in the way: "unsupported" here, "denied" by the browser or the person. @returns {""|"unsupported"|"denied"} */
export function notifyObstacle() {
  if (!("Notification" in window)) return "unsupported";
  return Notification.permission === "denied" ? "denied" : "";
}

/** @returns {"off"|"silent"|"sound"} */
export function getNotify() {
  if (!("Notification" in window) || Notification.permission !== "granted") return "off";
  try {
    const choice = localStorage.getItem(NOTIFY_PLACE);
    return choice === "silent" || choice === "sound" ? choice : "off";
  } catch {
    return "off";
  }
}

/** Asks the browser first, where it has not been asked: that takes a click. @param {"off"|"silent"|"sound"} choice */
export async function setNotify(choice) {
  if (choice !== "off" && !notifyObstacle() && Notification.permission !== "granted") await Notification.requestPermission();
  try {
    localStorage.setItem(NOTIFY_PLACE, choice);
  } catch {
    // Not kept: off.
  }
}

/** On the desktop, while this page lives; a later one takes the place of an earlier one. @param {string} title @param {string} body */
export function notify(title, body) {
  const choice = getNotify();
  if (choice === "off") return;
  try {
    const shown = new Notification(title, { body, tag: "lmarena_proxy", silent: choice !== "sound" });
    shown.onclick = () => {
      window.focus();
      shown.close();
    };
  } catch {
    // Some systems show none from a page: the banner stands there all the same.
  }
}

// ------------------------------------------------------------------------------------------------ theme

const THEME_PLACE = "lmarena_proxy.theme";
/** @type {Set<() => void>} */
const themeListeners = new Set();
const systemTheme = matchMedia("(prefers-color-scheme: dark)");
systemTheme.addEventListener("change", () => themeListeners.forEach((listener) => listener()));

/** @returns {"auto"|"light"|"dark"} */
export const getTheme = () => /** @type {any} */ (document.documentElement.dataset.theme ?? "auto");

/** @param {"auto"|"light"|"dark"} theme */
export function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem(THEME_PLACE, theme);
  } catch {
    // Not kept, then.
  }
  themeListeners.forEach((listener) => listener());
}

/** For what is drawn, not styled (charts). @param {() => void} listener @returns {() => void} to stop */
export function onThemeChange(listener) {
  themeListeners.add(listener);
  return () => void themeListeners.delete(listener);
}

/** A custom property as a colour that a canvas understands. @param {string} name "--accent" @returns {string} */
export function cssColor(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
}

