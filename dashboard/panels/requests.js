// @ts-check
/** The requests: those that run on top, those that ended below, with filters, search, paging and downloads. */

import { html, memo, useCallback, useEffect, useLayoutEffect, useMemo, useReducer, useRef, useState } from "../vendor/preact-htm.js";
import { call, download } from "../api.js";
import { t, useLanguage } from "../i18n.js";
import { store, useStore } from "../store.js";
import { Button, Elapsed, Empty, ErrorNote, SearchField, Select, attempt } from "../ui.js";
import { RequestList, isShownRunning, query } from "./request-list.js";
import { ConfirmButton, Verdict, clock, number, span, verdict, wholeTime } from "./shared-b.js";

/** @typedef {import("./shared-b.js").Summary} Summary @typedef {import("./shared-b.js").Running} Running */

const list = new RequestList();
const RUNNING_SHOWN = 12;
const STATUSES = ["", "running", "ok", "failed", "left", "400", "401", "403", "404", "413", "429", "500", "502", "503", "504"];
const COLUMNS = ["state", "model", "text", "client", "received", "first_byte", "total", "tokens"];
const TOP_PIXELS = 120; // scrolled no further than this, the reader is at the top

const isAtTop = () => window.scrollY <= TOP_PIXELS;

/** @param {string} id */
const abort = (id) => attempt(() => call("DELETE", `/api/requests/${encodeURIComponent(id)}`), t("b.request.aborted"));

/** @param {{name: string, children: any, kind?: string, title?: string}} props */
const Cell = ({ name, children, kind = "", title }) =>
  html`<td role="cell" class=${`b-${name} ${kind}`} title=${title}>${children}</td>`;

const RunningRow = memo(
  /** @param {{request: Running, language: string}} props */
  ({ request }) => html`<tr role="row" class="b-row b-running">
    <${Cell} name="state"><${Verdict} request=${request} /><//>
    <${Cell} name="model" title=${request.model}><a class="b-stretched" href=${`#/requests/${request.request_id}`}>${request.model}</a><//>
    <${Cell} name="text" kind="b-live">${request.preview ? html`<bdi>${request.preview}</bdi>` : "…"}<//>
    <${Cell} name="client" title=${request.client ?? ""}>${request.client ?? "–"}<//>
    <${Cell} name="received">${clock(request.created_at)}<//>
    <td role="cell" class="b-abort" aria-colspan="2">
      <${ConfirmButton} small label=${t("b.request.abort")} question=${t("b.request.abort_sure")}
        name=${request.request_id} onConfirm=${() => abort(request.request_id)} />
      <${Elapsed} since=${request.created_at} />
    </td>
    <${Cell} name="tokens">${t("b.characters_short", { n: number(request.characters ?? 0) })}<//>
  </tr>`,
);

const EndedRow = memo(
  /** @param {{request: Summary, language: string}} props */
  ({ request }) => html`<tr role="row" class="b-row">
    <${Cell} name="state"><${Verdict} request=${request} /><//>
    <${Cell} name="model" title=${request.model}><a class="b-stretched" href=${`#/requests/${request.request_id}`}>${request.model}</a><//>
    <${Cell} name="text" kind=${verdict(request).kind === "bad" ? "b-error" : ""}>${request.error || request.preview || "–"}<//>
    <${Cell} name="client" title=${request.client ?? ""}>${request.client ?? "–"}<//>
    <${Cell} name="received" title=${wholeTime(request.created_at)}>${clock(request.created_at)}<//>
    <${Cell} name="first_byte">${span(request.first_byte_seconds)}<//>
    <${Cell} name="total">${span(request.total_seconds)}<//>
    <${Cell} name="tokens">${tokens(request)}<//>
  </tr>`,
);

/** @param {Summary} request */
function tokens(request) {
  if (request.prompt_tokens == null && request.completion_tokens == null) return "–";
  return html`<span title=${t("b.tokens_title")}>${number(request.prompt_tokens)} → ${number(request.completion_tokens)}</span>`;
}

/**
 * Up and down move between the rows' links.
 * @param {KeyboardEvent} event
 */
function moveBetweenRows(event) {
  const link = /** @type {HTMLElement} */ (event.target).closest?.("a.b-stretched");
  if (!link || (event.key !== "ArrowDown" && event.key !== "ArrowUp")) return;
  const links = [.../** @type {HTMLElement} */ (event.currentTarget).querySelectorAll("a.b-stretched")];
  const to = links[links.indexOf(link) + (event.key === "ArrowDown" ? 1 : -1)];
  event.preventDefault();
  /** @type {HTMLElement|undefined} */ (to)?.focus();
}

const Head = memo(
  /** @param {{language: string}} _ */
  (_) => html`<thead role="rowgroup"><tr role="row">
    ${COLUMNS.map((name) => html`<th key=${name} role="columnheader" scope="col" class=${`b-${name}`}>${t(`b.column.${name}`)}</th>`)}
  </tr></thead>`,
);

/**
 * Those that run, oldest first, the first few of them.
 * @param {{filters: import("./request-list.js").Filters, language: string}} props
 */
function RunningRows({ filters, language }) {
  const running = useStore((state) => state.running);
  const [isWhole, setWhole] = useState(false);
  /** @type {Running[]} */
  const shown = useMemo(
    () => [...running.values()].filter((request) => isShownRunning(request, filters)),
    [running, filters],
  );
  if (!shown.length) {
    if (filters.status !== "running") return null;
    return html`<tbody role="rowgroup"><tr role="row"><td role="cell" aria-colspan="8"><${Empty} icon="requests" title=${t("b.requests.none_running")} /></td></tr></tbody>`;
  }
  const rows = isWhole ? shown : shown.slice(0, RUNNING_SHOWN);
  return html`<tbody role="rowgroup" class="b-runnings">
    <tr role="row" class="b-group"><th role="rowheader" scope="rowgroup" aria-colspan="8">
      ${t("b.requests.running", { n: number(shown.length) })}
      ${shown.length > RUNNING_SHOWN && html`<${Button} small kind="quiet" aria-expanded=${String(isWhole)}
        onClick=${() => setWhole(!isWhole)}>${isWhole ? t("b.show_less") : t("b.requests.show_all_running", { n: number(shown.length) })}<//>`}
    </th></tr>
    ${rows.map((request) => html`<${RunningRow} key=${request.request_id} request=${request} language=${language} />`)}
  </tbody>`;
}

/** Names of the models for the filter, in order; known from the pool. */
function useModelNames() {
  const pools = useStore((state) => state.pool);
  const names = useRef(/** @type {string[]} */ ([]));
  if (names.current.length !== pools.size) {
    const all = new Set([...pools.values()].map((/** @type {{model: string}} */ pool) => pool.model));
    const sorted = [...all].sort((one, other) => one.localeCompare(other));
    if (sorted.join("\n") !== names.current.join("\n")) names.current = sorted;
  }
  return names.current;
}

/** @param {{filters: import("./request-list.js").Filters, onFilter: (change: Partial<import("./request-list.js").Filters>) => void}} props */
function Toolbar({ filters, onFilter }) {
  const names = useModelNames();
  const [text, setText] = useState(filters.q);
  const typed = useRef(text); // ahead of what is rendered, and of the search
  const type = (/** @type {string} */ now) => {
    typed.current = now;
    setText(now);
  };
  useEffect(() => {
    if (text === filters.q) return undefined;
    const timer = setTimeout(() => onFilter({ q: typed.current }), 300);
    return () => clearTimeout(timer);
  }, [text, filters.q]);
  const clear = () => {
    type("");
    onFilter({ q: "", status: "", model: "" });
  };
  /** @type {[string, string][]} */
  const statuses = STATUSES.map((status) => [status, /^\d/.test(status) ? status : t(`b.status.${status || "all"}`)]);
  const known = !filters.model || names.includes(filters.model) ? names : [...names, filters.model];
  /** @type {[string, string][]} */
  const models = [["", t("b.requests.all_models")], ...known.map((name) => /** @type {[string, string]} */ ([name, name]))];
  const isFiltered = filters.q || filters.status || filters.model;
  return html`<form class="toolbar b-filters" role="search" aria-label=${t("b.requests.filters")}
    onSubmit=${(/** @type {Event} */ event) => {
      event.preventDefault();
      onFilter({ q: typed.current });
    }}>
    <${SearchField} class="b-search" maxlength="1000" label=${t("b.requests.search")} value=${text} onInput=${type} />
    <${Select} label=${t("b.requests.status")} value=${filters.status} options=${statuses}
      onChange=${(/** @type {string} */ status) => onFilter({ status })} />
    <${Select} label=${t("b.requests.model")} value=${filters.model} options=${models}
      onChange=${(/** @type {string} */ model) => onFilter({ model })} />
    ${isFiltered && html`<${Button} kind="quiet" icon="close" onClick=${clear}>${t("b.requests.clear")}<//>`}
  </form>`;
}

/** @param {"jsonl"|"csv"} format */
function save(format) {
  const { status, ...rest } = list.filters;
  const filters = { ...rest, status: status === "running" ? "" : status };
  return attempt(() => download(`/api/requests/export?${query(filters, { format })}`, `requests.${format}`));
}

export default function Requests() {
  const [language] = useLanguage();
  const [, render] = useReducer((/** @type {number} */ count) => count + 1, 0);
  const ended = useStore((state) => state.ended);
  const connection = useStore((state) => state.connection);
  const table = useRef(/** @type {HTMLElement|null} */ (null));
  const wasOpen = useRef(connection === "open");

  useEffect(() => {
    list.onChange = () => render(undefined);
    if (!list.isLoaded) list.reload(store.get().ended);
    return () => {
      list.onChange = () => {};
    };
  }, []);

  useLayoutEffect(() => {
    if (list.isLoaded && list.scroll) window.scrollTo(0, list.scroll);
    const remember = () => (list.scroll = window.scrollY);
    window.addEventListener("scroll", remember, { passive: true });
    return () => window.removeEventListener("scroll", remember);
  }, []);

  useEffect(() => {
    const isRead = table.current?.querySelector("tbody.b-ended")?.contains(document.activeElement);
    list.take(ended, isAtTop() && !isRead);
  }, [ended]);

  useEffect(() => {
    if (connection === "open" && !wasOpen.current && (list.isLoaded || list.problem)) {
      // What ended while the connection was lost is in the store only.
      if (!list.isLoaded || (isAtTop() && !list.isDetached)) list.reload(store.get().ended);
      else list.isStale = true;
    }
    wasOpen.current = connection === "open";
  }, [connection]);

  const onFilter = useCallback((/** @type {Partial<import("./request-list.js").Filters>} */ change) => {
    list.filters = { ...list.filters, ...change };
    list.rows = [];
    list.isLoaded = false;
    list.reload(store.get().ended);
  }, []);

  const showNews = () => {
    if (list.needsReload) list.reload(store.get().ended);
    else list.show();
    window.scrollTo({ top: 0 });
  };

  const { rows, filters } = list;
  const isFiltered = filters.q || filters.status || filters.model;
  const hasNews = list.fresh.length > 0 || list.isStale || list.isDetached;
  const isWaiting = list.isLoading && !list.isLoaded;
  return html`<section class="page b-requests" aria-labelledby="requests-title">
    <div class="page-head">
      <h1 id="requests-title">${t("b.requests.title")}</h1>
      <div class="row b-downloads" role="group" aria-label=${t("b.requests.download")}>
        <${Button} icon="download" onClick=${() => save("jsonl")}>${t("b.requests.jsonl")}<//>
        <${Button} icon="download" onClick=${() => save("csv")}>${t("b.requests.csv")}<//>
      </div>
    </div>
    <${Toolbar} filters=${filters} onFilter=${onFilter} />
    <div class="card b-table-card">
      <div class="b-pill-place" role="status">
        ${hasNews && html`<${Button} kind="primary" icon="up" class="b-pill" onClick=${showNews}>${list.fresh.length && !list.isStale ? t("b.requests.news", { n: number(list.fresh.length) }) : t("b.requests.newest")}<//>`}
      </div>
      <table ref=${table} role="table" class="b-table" aria-label=${t("b.requests.title")} aria-busy=${String(list.isLoading)} onKeyDown=${moveBetweenRows}>
        <${Head} language=${language} />
        <${RunningRows} filters=${filters} language=${language} />
        ${filters.status !== "running" && html`<tbody role="rowgroup" class="b-ended">
          ${rows.map((request) => html`<${EndedRow} key=${request.request_id} request=${request} language=${language} />`)}
          ${!rows.length && html`<tr role="row"><td role="cell" aria-colspan="8" class="b-nothing">
            ${list.problem
              ? html`<${ErrorNote} error=${list.problem} onRetry=${() => list.reload(store.get().ended)} />`
              : isWaiting || !list.isLoaded
                ? html`<p class="muted b-loading">${t("b.loading")}</p>`
                : html`<${Empty} icon="requests" title=${isFiltered ? t("b.requests.none_found") : t("b.requests.none")} />`}
          </td></tr>`}
        </tbody>`}
      </table>
    </div>
    ${rows.length > 0 && html`<div class="b-foot">
      ${list.problem && html`<${ErrorNote} error=${list.problem} />`}
      ${list.next
        ? html`<${Button} icon="down" busy=${list.isLoading} onClick=${() => list.older()}>${t("b.requests.older")}<//>`
        : html`<p class="muted">${t("b.requests.end")}</p>`}
    </div>`}
  </section>`;
}
