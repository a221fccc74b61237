// @ts-check
/** What the panels Requests, one Request, Over time and Connect share: texts as parts, curl, small controls. */

import { html, memo, useEffect, useId, useMemo, useRef, useState } from "../vendor/preact-htm.js";
import { formatDateTime, formatDuration, formatNumber, formatTime, t } from "../i18n.js";
import { Badge, Button, copyText, toast } from "../ui.js";

/**
 * @typedef {{request_id: string, created_at: number, model: string, model_id?: string|null, client?: string|null,
 *   path?: string|null, is_stream?: boolean, state: string, place?: number|null, attempts?: number,
 *   session_id?: string|null, preview?: string|null, characters?: number}} Running
 * @typedef {{request_id: string, created_at: number, model: string, model_id?: string|null, path?: string|null,
 *   client?: string|null, is_stream?: boolean, status: number, outcome?: string|null, session_id?: string|null,
 *   attempts?: number, queued_seconds?: number|null, first_byte_seconds?: number|null, total_seconds?: number|null,
 *   prompt_tokens?: number|null, completion_tokens?: number|null, error?: string|null, preview?: string|null}} Summary
 * @typedef {{role: string, content?: unknown, attachments?: string[]|null}} Message
 * @typedef {{session_id?: string|null, bridge?: number|null, started_seconds?: number|null,
 *   first_byte_seconds?: number|null, ended_seconds?: number|null, problem?: string|null}} Try
 * @typedef {Summary & Partial<Running> & {messages?: Message[]|null, answer?: string|null, reasoning?: string|null,
 *   parameters?: Record<string, unknown>|null, traceback?: string|null, tries?: Try[]|null,
 *   is_running?: boolean}} Detail
 */

// ── Time ────────────────────────────────────────────────────────────────────────────────────────────────────

/**
 * Unix seconds, new each `milliseconds` while the page is visible and `active`.
 * @param {number} milliseconds
 * @param {boolean} [active]
 */
export function useNow(milliseconds, active = true) {
  const [now, setNow] = useState(() => Date.now() / 1000);
  useEffect(() => {
    if (!active) return undefined;
    const tick = () => {
      if (!document.hidden) setNow(Date.now() / 1000);
    };
    tick();
    const timer = setInterval(tick, milliseconds);
    document.addEventListener("visibilitychange", tick);
    return () => {
      clearInterval(timer);
      document.removeEventListener("visibilitychange", tick);
    };
  }, [milliseconds, active]);
  return now;
}

// ── Numbers ─────────────────────────────────────────────────────────────────────────────────────────────────

/** @type {Map<string, Intl.DateTimeFormat>} */
const formats = new Map();

/** The page's language as Intl names it. */
export const locale = () => document.documentElement.lang;

/**
 * A number as text, for variables of texts and for cells alike.
 * @param {number|null|undefined} value
 * @param {number} [digits] after the point, at most
 */
export const number = (value, digits = 0) => formatNumber(value, digits);

/**
 * @param {number} seconds since 1970
 * @param {Intl.DateTimeFormatOptions} options
 */
export function moment(seconds, options) {
  const name = `${locale()} ${JSON.stringify(options)}`;
  let format = formats.get(name);
  if (!format) formats.set(name, (format = new Intl.DateTimeFormat(locale(), options)));
  return format.format(seconds * 1000);
}

/** @type {Intl.DateTimeFormatOptions} */
const DATE = { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", hourCycle: "h23" };

/**
 * The time of day; another day's with its date.
 * @param {number} seconds
 */
export function clock(seconds) {
  const isToday = new Date(seconds * 1000).toDateString() === new Date().toDateString();
  return isToday ? formatTime(seconds) : moment(seconds, DATE);
}

/** @param {number} seconds */
export const wholeTime = (seconds) => formatDateTime(seconds);

/**
 * A span of time; the shortest in milliseconds.
 * @param {number|null|undefined} seconds
 */
export function span(seconds) {
  if (seconds == null || seconds >= 0.0995) return formatDuration(seconds);
  return t("b.milliseconds", { n: number(seconds * 1000) });
}

// ── What became of a request ────────────────────────────────────────────────────────────────────────────────

const STATES = new Set(["waiting_for_tab", "queued", "waiting_for_first_byte", "streaming"]);
const GOOD_OUTCOMES = new Set(["stop", "length", "content_filter"]);

/**
 * Text, kind and icon of a request's badge.
 * @param {Partial<Running> & Partial<Summary>} request
 * @returns {{text: string, kind: ""|"ok"|"warn"|"bad"|"accent", icon: string}}
 */
export function verdict(request) {
  if (request.state && STATES.has(request.state) && request.outcome == null) {
    const isPlaced = request.state === "queued" && request.place != null;
    const text = isPlaced ? t("b.state.queued_at", { n: number(request.place) }) : t(`b.state.${request.state}`);
    return request.state === "streaming" ? { text, kind: "accent", icon: "play" } : { text, kind: "", icon: "clock" };
  }
  const outcome = request.outcome ?? "";
  if (outcome === "client_left" || outcome === "aborted") return { text: t(`b.outcome.${outcome}`), kind: "", icon: "minus" };
  if ((request.status ?? 200) < 400 && (GOOD_OUTCOMES.has(outcome) || !request.error)) {
    if (outcome === "length" || outcome === "content_filter") return { text: t(`b.outcome.${outcome}`), kind: "warn", icon: "warning" };
    return { text: t("b.outcome.stop"), kind: "ok", icon: "check" };
  }
  return { text: t("b.outcome.failed", { status: String(request.status ?? "") }).trim(), kind: "bad", icon: "close" };
}

/** @param {{request: Partial<Running> & Partial<Summary>}} props */
export function Verdict({ request }) {
  const { text, kind, icon } = verdict(request);
  return html`<${Badge} kind=${kind} icon=${icon}>${text}<//>`;
}

/**
 * Tokens of the answer in a second, counted from its first byte.
 * @param {Partial<Summary>} request
 */
export function tokenRate(request) {
  const { completion_tokens: tokens, first_byte_seconds: first, total_seconds: total } = request;
  if (!tokens || first == null || total == null || total - first < 0.05) return null;
  return tokens / (total - first);
}

// ── Texts of the network: shown as text, with links and pictures only where they are harmless ───────────────

const MARKDOWN_LINK = /(!?)\[([^\]\n]{0,500})\]\(\s*<?([^\s<>()]+(?:\([^\s()]*\)[^\s<>()]*)*)>?(?:\s+"[^"\n]*")?\s*\)/g;

/**
 * An address that may be followed from here: https, or a kept medium of this server.
 * @param {string} text
 */
export function safeAddress(text) {
  /** @type {URL} */
  let url;
  try {
    url = new URL(text, location.href);
  } catch {
    return null;
  }
  if (url.origin === location.origin) return url.pathname.startsWith("/media/") ? url.href : null;
  return url.protocol === "https:" && !url.username && !url.password ? url.href : null;
}

/**
 * @typedef {{kind: "text", text: string} | {kind: "link"|"image", text: string, address: string}} Part
 * @param {string} text
 * @returns {Part[]}
 */
export function markdownParts(text) {
  /** @type {Part[]} */
  const parts = [];
  let at = 0;
  const plain = (/** @type {string} */ piece) => {
    if (piece) parts.push({ kind: "text", text: piece });
  };
  for (const found of text.matchAll(MARKDOWN_LINK)) {
    const address = safeAddress(found[3]);
    if (!address && !found[3].startsWith("data:")) continue;
    plain(text.slice(at, found.index));
    at = found.index + found[0].length;
    if (address) parts.push({ kind: found[1] ? "image" : "link", text: found[2] || address, address });
    else plain(`${found[1]}[${found[2]}](${found[3].slice(0, 40)}…)`);
  }
  plain(text.slice(at));
  return parts;
}

/**
 * A text of the network, its line breaks kept; pictures as thumbnails that link to themselves.
 * @param {{text: string}} props
 */
export const Prose = memo(({ text }) => {
  const parts = markdownParts(text);
  return html`<div class="b-prose">
    ${parts.map((part, index) => {
      if (part.kind === "text") return html`<span key=${index}>${part.text}</span>`;
      const rest = { href: part.address, target: "_blank", rel: "noopener noreferrer", referrerpolicy: "no-referrer" };
      if (part.kind === "link") return html`<a key=${index} ...${rest}>${part.text}</a>`;
      return html`<a key=${index} class="b-thumbnail" ...${rest}>
        <img src=${part.address} alt=${part.text} loading="lazy" decoding="async" referrerpolicy="no-referrer" />
      </a>`;
    })}
  </div>`;
});

const LONG_CHARACTERS = 1400;
const LONG_LINES = 18;

/**
 * The beginning of a long text, or null when it is short.
 * @param {string} text
 */
export function beginning(text) {
  let end = Math.min(text.length, LONG_CHARACTERS);
  for (let line = 0, at = 0; line < LONG_LINES; line++) {
    const next = text.indexOf("\n", at);
    if (next < 0) break;
    at = next + 1;
    if (line === LONG_LINES - 1) end = Math.min(end, next);
  }
  if (end >= text.length - 200) return null;
  const last = text.charCodeAt(end - 1);
  if (last >= 0xd800 && last < 0xdc00) end -= 1; // not through the middle of a character
  return text.slice(0, end);
}

/**
 * A text that is shown in full on demand when it is long.
 * @param {{text: string, open?: boolean}} props
 */
export function Collapsing({ text, open = false }) {
  const [isOpen, setOpen] = useState(open);
  const short = useMemo(() => beginning(text), [text]);
  if (short == null) return html`<${Prose} text=${text} />`;
  return html`<div>
    <${Prose} text=${isOpen ? text : `${short}…`} />
    <${Button} small class="b-more" icon=${isOpen ? "up" : "down"} aria-expanded=${String(isOpen)} onClick=${() => setOpen(!isOpen)}>
      ${isOpen ? t("b.show_less") : t("b.show_all", { n: number(text.length) })}<//>
  </div>`;
}

/** @param {unknown} content a message's */
export function contentText(content) {
  if (content == null) return "";
  if (typeof content === "string") return content;
  if (Array.isArray(content)) {
    return content.map((part) => (typeof part?.text === "string" ? part.text : JSON.stringify(part))).join("\n");
  }
  return JSON.stringify(content, null, 2);
}

// ── A request as a command ──────────────────────────────────────────────────────────────────────────────────

const LONGEST_ARGUMENT_BYTES = 100_000; // Linux takes 128 KiB in one argument

/** @param {string} text */
export const shellQuote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/**
 * The command that makes a request again. Attachments are not part of it: the store keeps their names only.
 * @param {Detail} request
 * @param {string} origin
 * @param {boolean} needsKey
 */
export function curlOf(request, origin, needsKey) {
  const path = request.path || "/v1/chat/completions";
  const messages = request.messages ?? [];
  const isImage = path.startsWith("/v1/images/");
  const prompt = contentText(messages.at(-1)?.content);
  const parameters = { ...request.parameters };
  const first = [`curl ${request.is_stream ? "-N " : ""}${shellQuote(origin + path)}`];
  const key = needsKey ? ['-H "Authorization: Bearer $LMARENA_PROXY_API_KEY"'] : [];
  if (path.endsWith("/edits")) {
    const form = Object.entries({ model: request.model, prompt, ...parameters }).map(
      ([name, value]) => `--form-string ${shellQuote(`${name}=${typeof value === "string" ? value : JSON.stringify(value)}`)}`,
    );
    const names = messages.flatMap((message) => message.attachments ?? []);
    const files = names.map((name) => `-F ${shellQuote(`image=@${name}`)}`);
    return [...first, ...key, ...form, ...files].join(" \\\n  ");
  }
  const said = messages.map((message) => ({ role: message.role, content: message.content ?? "" }));
  const body = JSON.stringify({ model: request.model, ...(isImage ? { prompt } : { messages: said }), ...parameters });
  const head = [...first, ...key, "-H 'Content-Type: application/json'"];
  if (new TextEncoder().encode(body).length > LONGEST_ARGUMENT_BYTES) {
    return `${[...head, "--data-binary @-"].join(" \\\n  ")} <<'LMARENA_PROXY_BODY'\n${body}\nLMARENA_PROXY_BODY`;
  }
  return [...head, `-d ${shellQuote(body)}`].join(" \\\n  ");
}

// ── Small controls ──────────────────────────────────────────────────────────────────────────────────────────

/**
 * A button that does its work at the second press, within four seconds of the first.
 * @param {{label: string, question: string, name?: string, onConfirm: () => any, small?: boolean, icon?: string}} props
 *   `name`: what it is about, for those who do not see the row
 */
export function ConfirmButton({ label, question, name, onConfirm, small = false, icon }) {
  const [isAsking, setAsking] = useState(false);
  useEffect(() => {
    if (!isAsking) return undefined;
    const timer = setTimeout(() => setAsking(false), 4000);
    return () => clearTimeout(timer);
  }, [isAsking]);
  const press = () => {
    setAsking(!isAsking);
    return isAsking ? onConfirm() : undefined;
  };
  const text = isAsking ? question : label;
  return html`<${Button} small=${small} kind=${isAsking ? "danger" : "default"} icon=${icon} class="b-confirm"
    aria-label=${name ? `${text} ${name}` : undefined} onClick=${press} onBlur=${() => setAsking(false)}
    onKeyDown=${(/** @type {KeyboardEvent} */ event) => event.key === "Escape" && setAsking(false)}>${text}<//>`;
}

/**
 * A button that copies a text and says so.
 * @param {{label: string, text: () => string, small?: boolean, kind?: string}} props
 */
export const CopyTextButton = ({ label, text, small = false, kind = "default" }) => html`<${Button} icon="copy" small=${small} kind=${kind}
  onClick=${async () => ((await copyText(text())) ? toast(t("ui.copied"), "ok") : toast(t("ui.copy_failed"), "bad"))}>${label}<//>`;

/**
 * @typedef {{id: string, modality?: string, requires_image?: boolean}} Choice
 * A box to find one model in by typing (the combobox pattern: arrows, Enter, Escape). It waits for the list: what is
 * typed before would choose nothing, and the question would go to another model than the one that was named.
 * @param {{label: string, models: Choice[], value: string, onChange: (name: string) => void}} props
 */
export function ModelPicker({ label, models, value, onChange }) {
  const id = useId();
  const [text, setText] = useState(/** @type {string|null} */ (null)); // null: the list is shut
  const [active, setActive] = useState(0);
  const list = useRef(/** @type {HTMLElement|null} */ (null));
  const words = (text ?? "").toLowerCase().split(/\s+/).filter(Boolean);
  const found = text == null ? [] : models.filter((model) => words.every((word) => model.id.toLowerCase().includes(word)));
  const isOpen = text != null;
  const open = () => {
    setText("");
    setActive(Math.max(0, models.findIndex((model) => model.id === value)));
  };
  const choose = (/** @type {string} */ name) => {
    setText(null);
    onChange(name);
  };
  useEffect(() => {
    if (isOpen) list.current?.querySelector('[aria-selected="true"]')?.scrollIntoView({ block: "nearest" });
  }, [isOpen, active]);
  const onKeyDown = (/** @type {KeyboardEvent} */ event) => {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 }[event.key];
    if (step) {
      event.preventDefault();
      if (!isOpen) open();
      else setActive(Math.max(0, Math.min(found.length - 1, active + step)));
    } else if (event.key === "Enter" && isOpen) {
      event.preventDefault();
      if (found[active]) choose(found[active].id);
    } else if (event.key === "Escape" && isOpen) {
      event.preventDefault();
      setText(null);
    }
  };
  return html`<div class="field b-picker">
    <label for=${id}>${label}</label>
    <input id=${id} type="text" role="combobox" autocomplete="off" spellcheck=${false} disabled=${!models.length}
      aria-autocomplete="list" aria-expanded=${String(isOpen)} aria-controls=${`${id}-list`}
      aria-activedescendant=${isOpen && found[active] ? `${id}-${active}` : undefined}
      placeholder=${isOpen ? value : t("b.picker.placeholder")} value=${text ?? value}
      onClick=${() => isOpen || open()} onKeyDown=${onKeyDown} onBlur=${() => setText(null)}
      onInput=${(/** @type {any} */ event) => {
        setText(event.currentTarget.value);
        setActive(0);
      }} />
    <ul id=${`${id}-list`} ref=${list} role="listbox" aria-label=${label} hidden=${!isOpen}
      onMouseDown=${(/** @type {Event} */ event) => event.preventDefault()}>
      ${found.map(
        (model, index) => html`<li key=${model.id} id=${`${id}-${index}`} role="option"
          aria-selected=${String(index === active)} onClick=${() => choose(model.id)}>
          <span class="b-name">${model.id}</span>
          ${model.modality && model.modality !== "chat" && html`<span class="b-tag">${t(`b.modality.${model.modality}`)}</span>`}
        </li>`,
      )}
      ${isOpen && !found.length && html`<li class="b-none" role="option" aria-disabled="true" aria-selected="false">${t("b.picker.none")}</li>`}
    </ul>
  </div>`;
}
