// @ts-check
// All models and their sessions.

import { call } from "../api.js";
import { formatDuration, formatNumber, formatPercent, hasText, NONE, t } from "../i18n.js";
import { useStore } from "../store.js";
import {
  attempt, Badge, Button, confirm, Dialog, Empty, Icon, IconButton, Id, ModelKind, SearchField, Segments, Select, sortBy, SortHeader, Time, useMedia,
  usePolled, useSort,
} from "../ui.js";
import { html, memo, useCallback, useMemo, useState } from "../vendor/preact-htm.js";

/** @typedef {import("../store.js").PoolEntry} PoolEntry */
/** @typedef {import("../store.js").Session} Session */
/** @typedef {{model_id: string, requests: number, errors: number, first_byte_seconds: {median: number|null, p95: number|null},
 *   tokens_per_second: {median: number|null, p95: number|null}}} ModelStatistics */
/** @typedef {{entry: PoolEntry, statistics: ModelStatistics|undefined}} Item */

const STATISTICS_SECONDS = 30;
const STATES = ["idle", "busy", "resting", "retired"];
/** @type {Session[]} */
const NO_SESSIONS = [];

/** @type {Record<string, (item: Item) => any>} */
const COLUMNS = {
  model: ({ entry }) => entry.model,
  sessions: ({ entry }) => entry.sessions,
  waiting: ({ entry }) => entry.waiting,
  requests: ({ statistics }) => statistics?.requests ?? 0,
  errors: ({ statistics }) => (statistics?.requests ? statistics.errors / statistics.requests : null),
  first_byte: ({ statistics }) => statistics?.first_byte_seconds.median,
  first_byte_p95: ({ statistics }) => statistics?.first_byte_seconds.p95,
  speed: ({ statistics }) => statistics?.tokens_per_second.median,
  speed_p95: ({ statistics }) => statistics?.tokens_per_second.p95,
};

export default function Pool() {
  const pool = useStore((state) => state.pool);
  const byModel = useStore((state) => state.sessionsByModel);
  const { data } = usePolled("/api/statistics?hours=24", STATISTICS_SECONDS);
  const [text, setText] = useState("");
  const [modality, setModality] = useState("all");
  const [sort, onSort] = useSort("model");
  const [open, setOpen] = useState(/** @type {{model: string, session: string|null}|null} */ (null));
  const isNarrow = useMedia("(max-width: 900px)");

  const counts = useMemo(() => {
    /** @type {Record<string, number>} */
    const counts = { all: pool.size };
    for (const entry of pool.values()) counts[entry.modality] = (counts[entry.modality] ?? 0) + 1;
    return counts;
  }, [pool]);
  const statistics = useMemo(() => {
    return new Map(/** @type {ModelStatistics[]} */ (data?.models ?? []).map((entry) => [entry.model_id, entry]));
  }, [data]);
  const items = useMemo(() => {
    const wanted = text.trim().toLowerCase();
    /** @type {Item[]} */
    const items = [];
    for (const entry of pool.values()) {
      if (modality !== "all" && entry.modality !== modality) continue;
      if (wanted && !entry.model.toLowerCase().includes(wanted) && !entry.model_id.startsWith(wanted)) continue;
      items.push({ entry, statistics: statistics.get(entry.model_id) });
    }
    return sortBy(items, COLUMNS[sort.by], sort.descending);
  }, [pool, statistics, text, modality, sort]);

  const show = useCallback((/** @type {string} */ model, /** @type {string|null} */ session = null) => setOpen({ model, session }), []);
  const kinds = ["all", "chat", "search", "image", "video"].filter((kind) => counts[kind]);
  const List = isNarrow ? Cards : Table;
  return html`
    <div class="page">
      <header class="page-head">
        <h1>${t("panel.pool")}</h1>
        <${Button} icon="refresh" title=${t("pool.refresh_hint")}
          onClick=${() => attempt(() => call("POST", "/api/models/refresh"), t("pool.refresh_done"))}>${t("pool.refresh")}<//>
      </header>
      <div class="toolbar">
        <${SearchField} label=${t("pool.search")} value=${text} onInput=${setText} />
        <${Segments} label=${t("pool.modality")} value=${modality} onChange=${setModality}
          options=${kinds.map((kind) => [kind, html`${t(`modality.${kind}`)} <span class="num muted-in">${counts[kind]}</span>`])} />
        <span class="hidden" role="status">${t("pool.found", { n: items.length })}</span>
      </div>
      <section class="card" aria-label=${t("pool.models")}>
        <div class="card-head pool-legend"><${Legend} /><span class="muted small">${t("pool.day")}</span></div>
        ${items.length === 0
          ? html`<${Empty} icon="search" title=${t("ui.nothing_found")} />`
          : html`<${List} items=${items} byModel=${byModel} sort=${sort} onSort=${onSort} show=${show} />`}
      </section>
      ${open && html`<${Detail} key=${open.model} model=${open.model} session=${open.session} show=${show} onClose=${() => setOpen(null)} />`}
    </div>`;
}

const Legend = () => html`
  <ul class="legend" aria-label=${t("pool.legend")}>
    ${[...STATES, "opening"].map((state) => html`<li key=${state}><span class=${`cell ${state}`}></span>${t(`session.${state}`)}</li>`)}
  </ul>`;

// ------------------------------------------------------------------------------------------------ the list

const RETIRED_SHOWN = 4;

/** The living in the order of their opening, then the retired, the latest first. @param {Session[]} sessions */
const inOrder = (sessions) =>
  sortBy(sessions, (session) => (session.state === "retired" ? 1e12 - session.created_at : session.created_at - 1e12), false);

/** @param {{entry: PoolEntry, sessions: Session[], show: (model: string, session?: string|null) => void}} props */
const Cells = memo(({ entry, sessions, show }) => {
  const living = sessions.filter((/** @type {Session} */ session) => session.state !== "retired");
  const retired = sessions.length - living.length;
  const shown = retired ? inOrder(sessions).slice(0, living.length + RETIRED_SHOWN) : sessions;
  /** To the pointer each cell is its session; the keyboard finds them in the model's list. @param {any} event */
  const onClick = (event) => {
    const id = event.target.dataset.session;
    show(entry.model_id, id ?? null);
  };
  const label = t("pool.cells", { idle: entry.idle, busy: entry.busy, resting: entry.resting ?? 0 });
  if (!sessions.length && !entry.opening) return html`<span class="muted small">${entry.requires_image ? t("pool.with_image") : t("pool.none")}</span>`;
  return html`
    <span class="cells" role="img" aria-label=${label} onClick=${onClick}>
      ${shown.map((/** @type {Session} */ session) => html`
        <span key=${session.session_id} class=${`cell ${session.state}`} data-session=${session.session_id}
          title=${t(`session.${session.state}`)}></span>`)}
      ${Array.from({ length: entry.opening ?? 0 }, (_, index) => html`<span key=${index} class="cell opening"></span>`)}
    </span>
    ${sessions.length > shown.length && html` <span class="muted small" title=${t("pool.more_retired", { n: sessions.length - shown.length })}>
      +${sessions.length - shown.length}</span>`}`;
});

/** @param {{entry: PoolEntry, show: (model: string) => void}} props */
const Name = ({ entry, show }) => html`
  <button type="button" class="link-button" aria-haspopup="dialog" onClick=${() => show(entry.model_id)}>${entry.model}</button>
  <${ModelKind} entry=${entry} />`;

/** @param {number|null|undefined} value */
const speed = (value) => formatNumber(value, value != null && value < 10 ? 1 : 0);
/** @param {ModelStatistics|undefined} statistics */
const errorShare = (statistics) => (statistics?.requests ? statistics.errors / statistics.requests : null);

/** @param {{entry: PoolEntry, sessions: Session[], statistics: ModelStatistics|undefined, show: (model: string) => void}} props */
const Row = memo(({ entry, sessions, statistics, show }) => {
  const share = errorShare(statistics);
  return html`
    <tr>
      <th scope="row"><${Name} entry=${entry} show=${show} /></th>
      <td><${Cells} entry=${entry} sessions=${sessions} show=${show} /></td>
      <td class="numeric">${entry.waiting > 0 ? html`<${Badge} kind="warn">${formatNumber(entry.waiting)}<//>` : html`<span class="muted">0</span>`}</td>
      <td class="numeric">${formatNumber(statistics?.requests ?? 0)}</td>
      <td class=${`numeric ${(share ?? 0) > 0.2 ? "tone bad" : ""}`}>${formatPercent(share)}</td>
      <td class="numeric">${formatDuration(statistics?.first_byte_seconds.median)}</td>
      <td class="numeric">${formatDuration(statistics?.first_byte_seconds.p95)}</td>
      <td class="numeric">${speed(statistics?.tokens_per_second.median)}</td>
      <td class="numeric">${speed(statistics?.tokens_per_second.p95)}</td>
    </tr>`;
});

/** @param {any} props */
function Table({ items, byModel, sort, onSort, show }) {
  const column = (/** @type {string} */ id, numeric = true) =>
    html`<${SortHeader} id=${id} label=${t(`pool.column.${id}`)} title=${t(`pool.title.${id}`)} sort=${sort} onSort=${onSort} numeric=${numeric} />`;
  return html`
    <div class="table-wrap" tabindex="0" role="group" aria-label=${t("pool.models")}>
      <table class="table pool-table">
        <thead><tr>${column("model", false)}${Object.keys(COLUMNS).slice(1).map((id) => column(id, id !== "sessions"))}</tr></thead>
        <tbody>
          ${items.map((/** @type {Item} */ { entry, statistics }) => html`
            <${Row} key=${entry.model_id} entry=${entry} sessions=${byModel.get(entry.model_id) ?? NO_SESSIONS} statistics=${statistics} show=${show} />`)}
        </tbody>
      </table>
    </div>`;
}

/** @param {{entry: PoolEntry, sessions: Session[], statistics: ModelStatistics|undefined, show: (model: string) => void}} props */
const Card = memo(({ entry, sessions, statistics, show }) => html`
  <li class="model-card">
    <div class="row between"><span><${Name} entry=${entry} show=${show} /></span>
      ${entry.waiting > 0 && html`<${Badge} kind="warn">${t("pool.n_waiting", { n: entry.waiting })}<//>`}</div>
    <${Cells} entry=${entry} sessions=${sessions} show=${show} />
    ${statistics && html`<p class="small muted num">${t("pool.card", {
      n: statistics.requests,
      errors: formatPercent(errorShare(statistics)),
      first: formatDuration(statistics.first_byte_seconds.median),
      speed: speed(statistics.tokens_per_second.median),
    })}</p>`}
  </li>`);

/** @param {any} props */
const Cards = ({ items, byModel, sort, onSort, show }) => html`
  <div class="cards-sort row">
    <${Select} label=${t("pool.sort")} showLabel value=${sort.by} onChange=${(/** @type {string} */ id) => id !== sort.by && onSort(id, id !== "model")}
      options=${Object.keys(COLUMNS).map((id) => [id, t(`pool.title.${id}`)])} />
    <${IconButton} icon=${sort.descending ? "down" : "up"} label=${sort.descending ? t("ui.descending") : t("ui.ascending")} onClick=${() => onSort(sort.by)} />
  </div>
  <ul class="model-cards">
    ${items.map((/** @type {Item} */ { entry, statistics }) => html`
      <${Card} key=${entry.model_id} entry=${entry} sessions=${byModel.get(entry.model_id) ?? NO_SESSIONS} statistics=${statistics} show=${show} />`)}
  </ul>`;

// ------------------------------------------------------------------------------------------------ one model, one session

const STATE_KINDS = /** @type {Record<string, string>} */ ({ idle: "ok", busy: "accent", resting: "warn", retired: "" });

/** @param {{state: string}} props */
const StateBadge = ({ state }) => html`
  <${Badge} kind=${STATE_KINDS[state] ?? ""}><span class=${`cell ${state}`}></span>${t(`session.${state}`)}<//>`;

/** @param {{model: string, session: string|null, show: (model: string, session?: string|null) => void, onClose: () => void}} props */
function Detail({ model, session, show, onClose }) {
  const entry = useStore((state) => state.pool.get(model));
  const sessions = useStore((state) => state.sessionsByModel.get(model)) ?? NO_SESSIONS;
  const one = session ? sessions.find((other) => other.session_id === session) : null;
  const title = entry?.model ?? model;
  if (session) {
    return html`
      <${Dialog} kind="drawer" title=${t("pool.session_of", { model: title })} onClose=${onClose} footer=${html`
        <span class="push-start"><${Button} kind="quiet" icon="left" onClick=${() => show(model)}>${t("pool.all_sessions")}<//></span>
        <${Button} kind="danger" icon="trash" disabled=${!one || one.state === "retired"} onClick=${() => one && retire(one)}>${t("pool.retire")}<//>`}>
        ${one ? html`<${SessionDetail} session=${one} />` : html`<${Empty} title=${t("pool.gone")} />`}
      <//>`;
  }
  return html`
    <${Dialog} kind="drawer" title=${title} onClose=${onClose} footer=${html`
      <${Button} icon="plus" kind="primary" disabled=${!entry || entry.requires_image} onClick=${() => openMore(model)}>${t("pool.open_more")}<//>`}>
      ${entry && html`<${ModelDetail} entry=${entry} sessions=${sessions} show=${show} />`}
    <//>`;
}

/** @param {string} model */
const openMore = (model) => attempt(() => call("POST", "/api/sessions", { model_id: model }), t("pool.opened"));

/** @param {Session} session */
async function retire(session) {
  const text = session.state === "busy" ? t("pool.retire_busy") : t("pool.retire_text");
  if (!(await confirm({ title: t("pool.retire_title"), text, action: t("pool.retire") }))) return;
  await attempt(() => call("DELETE", `/api/sessions/${encodeURIComponent(session.session_id)}`), t("pool.retired"));
}

/** @param {{entry: PoolEntry, sessions: Session[], show: (model: string, session: string) => void}} props */
function ModelDetail({ entry, sessions, show }) {
  return html`
    <dl class="kv">
      <dt>${t("pool.model_id")}</dt><dd><${Id} value=${entry.model_id} /></dd>
      <dt>${t("pool.modality")}</dt><dd>${t(`modality.${entry.modality}`)}${entry.requires_image ? ` · ${t("pool.requires_image")}` : ""}</dd>
      <dt>${t("pool.at_once")}</dt><dd class="num">${formatNumber(entry.tokens)}</dd>
      <dt>${t("pool.column.waiting")}</dt><dd class="num">${formatNumber(entry.waiting)}</dd>
    </dl>
    <h3>${t("pool.sessions_n", { n: entry.sessions })}</h3>
    ${entry.requires_image && html`<p class="muted">${t("pool.with_image_long")}</p>`}
    ${sessions.length === 0 && !entry.requires_image && html`<p class="muted">${t("pool.none_long")}</p>`}
    ${sessions.length > 0 && html`
      <ul class="session-list">
        ${inOrder(sessions).map((session) => html`
          <li key=${session.session_id}>
            <button type="button" class="session-button" onClick=${() => show(entry.model_id, session.session_id)}>
              <${StateBadge} state=${session.state} />
              <code>${session.session_id.slice(0, 8)}</code>
              <span class="muted small num">${t("pool.uses", { n: session.uses })}</span>
              <span class="muted small session-last">${session.last_used_at ? html`<${Time} at=${session.last_used_at} />` : t("pool.unused")}</span>
              <${Icon} name="right" size=${14} />
            </button>
          </li>`)}
      </ul>`}`;
}

/** @param {{session: Session}} props */
function SessionDetail({ session }) {
  const source = `origin.${session.source}`;
  return html`
    <div class="row"><${StateBadge} state=${session.state} />
      ${session.request_id && html`<a href=${`#/requests/${session.request_id}`}>${t("pool.held_by")}</a>`}</div>
    ${session.reason && html`<div class="note warn"><${Icon} name="info" /><span>${t("pool.reason", { reason: session.reason })}</span></div>`}
    <dl class="kv">
      <dt>${t("pool.session_id")}</dt><dd><${Id} value=${session.session_id} /></dd>
      <dt>${t("pool.message_id")}</dt><dd><${Id} value=${session.message_id} /></dd>
      <dt>${t("now.account")}</dt><dd>${session.account ? html`<${Id} value=${session.account} length=${23} />` : NONE}</dd>
      <dt>${t("pool.source")}</dt><dd>${hasText(source) ? t(source) : session.source}</dd>
      ${session.position && html`<dt>${t("pool.position")}</dt><dd>${session.position.toUpperCase()}</dd>`}
      <dt>${t("pool.age")}</dt><dd><${Time} at=${session.created_at} /></dd>
      <dt>${t("pool.last_used")}</dt><dd><${Time} at=${session.last_used_at} /></dd>
      <dt>${t("pool.times_used")}</dt><dd class="num">${formatNumber(session.uses)}</dd>
      <dt>${t("pool.failures")}</dt><dd class="num">${formatNumber(session.failures)}</dd>
    </dl>`;
}
