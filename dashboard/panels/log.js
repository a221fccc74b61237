// @ts-check
// The log as it is written.

import { saveAs } from "../api.js";
import { formatDateTime, formatTime, t } from "../i18n.js";
import { store, useStore } from "../store.js";
import { Button, Empty, More, SearchField, Select, useDebounced } from "../ui.js";
import { html, memo, useEffect, useLayoutEffect, useMemo, useRef, useState } from "../vendor/preact-htm.js";

const LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR"];
const KINDS = /** @type {Record<string, string>} */ ({ WARNING: "warn", ERROR: "bad", CRITICAL: "bad" });
const PAGE = 300;
const REQUEST_ID = /(\breq_[0-9A-Za-z-]+)/;

/** The text with its request ids as links. @param {string} text */
const linked = (text) =>
  text.split(REQUEST_ID).map((part, index) => (index % 2 ? html`<a key=${index} href=${`#/requests/${part}`}>${part}</a>` : part));

/** @param {{line: import("../store.js").LogLine}} props */
const Line = memo(({ line }) => html`
  <li class=${`line ${KINDS[line.level] ?? ""}`}>
    <time datetime=${new Date(line.time * 1000).toISOString()} title=${formatDateTime(line.time)}>${formatTime(line.time)}</time>
    <span class="level">${line.level}</span>
    <span class="line-text">
      <span class="event">${line.event}</span> ${linked(line.message)}
      ${line.request_id && !line.message.includes(line.request_id) && html` <a class="line-id" href=${`#/requests/${line.request_id}`}>${line.request_id}</a>`}
      ${line.traceback && html`<${More} title=${t("ui.traceback")} text=${line.traceback} />`}
    </span>
  </li>`);

/** @param {import("../store.js").LogLine} line */
const asText = (line) =>
  `${new Date(line.time * 1000).toISOString()} ${line.level} ${line.event} ${line.message}${line.request_id ? ` [${line.request_id}]` : ""}` +
  (line.traceback ? `\n${line.traceback.trimEnd()}` : "");

export default function Log() {
  const live = useStore((state) => state.log);
  const [level, setLevel] = useState("INFO");
  const [text, setText] = useState("");
  const [size, setSize] = useState(PAGE);
  /** The lines as they were when the person began to read; null while the newest are followed. */
  const [held, setHeld] = useState(/** @type {import("../store.js").LogLine[]|null} */ (null));
  const wanted = useDebounced(text, 150).trim().toLowerCase();
  const box = useRef(/** @type {HTMLElement|null} */ (null));
  const top = useRef(0);
  const keep = useRef(/** @type {number|null} */ (null));
  const lines = held ?? live;
  const found = useMemo(() => {
    const least = LEVELS.indexOf(level);
    return lines.filter((line) => {
      const rank = LEVELS.indexOf(line.level);
      if (rank >= 0 && rank < least) return false;
      return !wanted || `${line.event} ${line.message} ${line.request_id ?? ""} ${line.traceback ?? ""}`.toLowerCase().includes(wanted);
    });
  }, [lines, level, wanted]);
  const shown = found.slice(-size);
  const fresh = held ? live.filter((line) => line.seq > (held.at(-1)?.seq ?? 0)).length : 0;

  useLayoutEffect(() => {
    const element = box.current;
    if (!element) return;
    if (!held) element.scrollTop = element.scrollHeight;
    else if (keep.current !== null) element.scrollTop = element.scrollHeight - keep.current;
    keep.current = null;
    top.current = element.scrollTop;
  }, [shown.at(-1), shown.length, held, wanted, level]);
  useEffect(() => setSize(PAGE), [wanted, level]);

  const hold = () => setHeld(store.get().log);
  const follow = () => {
    setSize(PAGE);
    setHeld(null);
  };
  /** Whoever scrolls up wants to read: the lines stand still until they are asked to follow. */
  const onScroll = () => {
    const element = /** @type {HTMLElement} */ (box.current);
    const below = element.scrollHeight - element.scrollTop - element.clientHeight;
    if (!held && element.scrollTop < top.current && below > 60) hold();
    top.current = element.scrollTop;
  };
  const more = () => {
    const element = /** @type {HTMLElement} */ (box.current);
    keep.current = element.scrollHeight - element.scrollTop;
    if (!held) hold();
    setSize((size) => size + PAGE);
  };
  const save = () => saveAs(new Blob([found.map(asText).join("\n") + "\n"], { type: "text/plain" }), "lmarena_proxy.log");

  return html`
    <div class="page log-page">
      <header class="page-head"><h1>${t("panel.log")}</h1></header>
      <div class="toolbar">
        <${SearchField} label=${t("log.search")} value=${text} onInput=${setText} />
        <${Select} label=${t("log.level")} value=${level} onChange=${setLevel}
          options=${LEVELS.map((name) => [name, name === "ERROR" ? t("log.only", { level: name }) : t("log.and_above", { level: name })])} />
        <span class="push row">
          <${Button} icon=${held ? "play" : "pause"} class="follow" aria-pressed=${held ? "true" : "false"} onClick=${held ? follow : hold}>
            ${held ? (fresh ? t("log.follow_n", { n: fresh }) : t("log.follow")) : t("log.pause")}<//>
          <${Button} icon="download" disabled=${found.length === 0} onClick=${save}>${t("log.download")}<//>
        </span>
      </div>
      <section class="card log-card" aria-label=${t("log.lines")}>
        <div class="log-box" ref=${box} tabindex="0" role="group" aria-label=${t("log.lines")} onScroll=${onScroll}>
          ${found.length > shown.length && html`
            <div class="log-more"><${Button} small icon="up" onClick=${more}>${t("log.more", { n: found.length - shown.length })}<//></div>`}
          ${shown.length === 0
            ? html`<${Empty} icon="log" title=${lines.length ? t("ui.nothing_found") : t("log.empty")} />`
            : html`<ol class="lines">${shown.map((line) => html`<${Line} key=${line.seq} line=${line} />`)}</ol>`}
        </div>
      </section>
      <p class="muted small">${t("log.hint")}</p>
    </div>`;
}
