// @ts-check
// How things are: the numbers of the moment, the tabs, and the opening of conversations.

import { call } from "../api.js";
import { formatDuration, formatNumber, formatPercent, hasText, t } from "../i18n.js";
import { useStore } from "../store.js";
import {
  attempt, Badge, Button, Elapsed, Icon, Id, More, Stat, usePolled, useTicking,
} from "../ui.js";
import { html, memo, useId, useMemo, useState } from "../vendor/preact-htm.js";

const TICK_SECONDS = 30;

export default function Now() {
  return html`
    <div class="page">
      <header class="page-head"><h1>${t("panel.now")}</h1><${Uptime} /></header>
      <${Overview} />
      <div class="now-columns">
        <${BootstrapCard} />
        <${BridgesCard} />
      </div>
    </div>`;
}

function Uptime() {
  const since = useStore((state) => state.started_at);
  return html`<span class="muted small">${t("now.uptime")} <${Elapsed} since=${since} /></span>`;
}

// ------------------------------------------------------------------------------------------------ numbers

function Overview() {
  const active = useStore((state) => state.requests.active);
  const pool = useStore((state) => state.pool);
  const running = useStore((state) => state.running);
  const { data: statistics } = usePolled("/api/statistics?hours=1", TICK_SECONDS);
  const sums = useMemo(() => {
    const sums = { idle: 0, busy: 0, resting: 0, ready: 0 };
    for (const entry of pool.values()) {
      sums.idle += entry.idle;
      sums.busy += entry.busy;
      sums.resting += entry.resting ?? 0;
      if (entry.sessions > 0) sums.ready += 1;
    }
    return sums;
  }, [pool]);
  const waiting = useMemo(() => {
    let count = 0;
    for (const request of running.values()) if (request.state === "queued" || request.state === "waiting_for_tab") count += 1;
    return count;
  }, [running]);
  const hour = useMemo(() => {
    if (!statistics) return null;
    const { requests, errors, first_byte_seconds } = statistics.total;
    return { requests, share: requests ? errors / requests : null, first: first_byte_seconds.median };
  }, [statistics]);
  return html`
    <section aria-label=${t("now.overview")}>
      <dl class="stats">
        <${Stat} label=${t("now.active")} value=${formatNumber(active)} />
        <${Stat} label=${t("now.waiting")} value=${formatNumber(waiting)} kind=${waiting ? "warn" : ""} />
        <${Stat} label=${t("now.sessions")} value=${formatNumber(sums.idle + sums.busy + sums.resting)}
          hint=${t("now.sessions_hint", sums)} wide />
        <${Stat} label=${t("now.models_ready")} value=${formatNumber(sums.ready)} hint=${t("now.of", { n: pool.size })} />
        <${Stat} label=${t("now.last_hour")} value=${formatNumber(hour?.requests)}
          hint=${t("now.requests", { n: hour?.requests ?? 0 })} />
        <${Stat} label=${t("now.first_byte")} value=${formatDuration(hour?.first)} hint=${t("now.median")} />
        <${Stat} label=${t("now.errors")} value=${formatPercent(hour?.share)} hint=${t("now.in_hour")} kind=${(hour?.share ?? 0) > 0.1 ? "bad" : ""} />
      </dl>
    </section>`;
}

// ------------------------------------------------------------------------------------------------ tabs

const BRIDGE_KINDS = /** @type {Record<string, [string, string]>} */ ({
  ready: ["ok", "check"],
  loading: ["", "clock"],
  verification: ["warn", "person"],
  sign_in: ["warn", "person"],
});

/** @param {{bridge: import("../store.js").Bridge, version: string}} props */
const BridgeRow = memo(({ bridge, version }) => {
  const [kind, icon] = BRIDGE_KINDS[bridge.state] ?? ["", "info"];
  const known = hasText(`bridge.${bridge.state}`);
  return html`
    <li class="bridge">
      <div class="row">
        <${Badge} kind=${kind} icon=${icon}>${known ? t(`bridge.${bridge.state}`) : bridge.state}<//>
        <strong class="bridge-name">${t("now.tab", { id: String(bridge.id) })}</strong>
        <span class="muted small num">${t("now.in_flight", { n: bridge.in_flight })}</span>
      </div>
      <dl class="kv small">
        <dt>${t("now.connected")}</dt><dd><${Elapsed} since=${Date.parse(bridge.connected_at) / 1000} /></dd>
        <dt>${t("now.account")}</dt><dd>${bridge.account ? html`<${Id} value=${bridge.account} length=${15} />` : t("now.no_account")}</dd>
        ${bridge.url && html`<dt>${t("now.page")}</dt><dd>${bridge.url}</dd>`}
        ${bridge.script !== version && version && html`
          <dt>${t("now.script")}</dt><dd class="tone warn">${t("now.script_old", { script: bridge.script, version })}</dd>`}
      </dl>
    </li>`;
});

/** @param {{gate: {account: string, seconds: number, pace: number|null}}} props */
const Gate = memo(({ gate }) => {
  const opens = useMemo(() => Date.now() / 1000 + gate.seconds, [gate]);
  const left = useTicking(() => formatDuration(Math.max(0, Math.ceil(opens - Date.now() / 1000))));
  const variables = { account: gate.account.slice(0, 8), left };
  return html`
    <li class="note warn small"><${Icon} name="clock" />
      <span>${t("now.gate", variables)} ${gate.pace != null && t("now.pace", { pace: formatNumber(gate.pace, 2) })}</span></li>`;
});

function BridgesCard() {
  const bridges = useStore((state) => state.bridges);
  const gates = useStore((state) => state.gates);
  const version = useStore((state) => state.version);
  const shown = [...bridges.values()];
  return html`
    <section class="card" aria-labelledby="bridges-title">
      <header class="card-head"><h2 id="bridges-title">${t("now.tabs")}</h2>
        <span class="muted small num">${shown.length > 0 && formatNumber(shown.length)}</span></header>
      <div class="card-body">
        ${shown.length === 0 && html`<p class="muted">${t("now.no_tab")}</p>`}
        ${shown.length > 0 && html`<ul class="bridges">
          ${shown.map((bridge) => html`<${BridgeRow} key=${bridge.id} bridge=${bridge} version=${version} />`)}</ul>`}
        ${gates.size > 0 && html`<ul class="stack">
          ${[...gates.values()].map((gate) => html`<${Gate} key=${gate.account} gate=${gate} />`)}</ul>`}
      </div>
    </section>`;
}

// ------------------------------------------------------------------------------------------------ bootstrap

const PHASE_KINDS = /** @type {Record<string, [string, string]>} */ ({
  waiting_for_browser: ["", "tab"],
  settling: ["accent", "clock"],
  confirm: ["warn", "person"],
  running: ["accent", "play"],
  done: ["ok", "check"],
  aborted: ["warn", "stop"],
  skipped: ["", "minus"],
});

/** The same event as Enter on the console, or a run for these models. @param {string[]} [models] */
const start = (models) =>
  attempt(() => call("POST", "/api/bootstrap", models ? { action: "start", models } : { action: "start" }));
const abort = () => attempt(() => call("POST", "/api/bootstrap", { action: "abort" }));

/** What a run would open: what the pools lack of conversations that can be used now. */
function usePlan() {
  const pool = useStore((state) => state.pool);
  return useMemo(() => {
    let models = 0;
    let conversations = 0;
    for (const entry of pool.values()) {
      if (entry.requires_image || !entry.missing) continue;
      models += 1;
      conversations += entry.missing;
    }
    return { conversations, models };
  }, [pool]);
}

function BootstrapCard() {
  const bootstrap = useStore((state) => state.bootstrap);
  const isReady = useStore((state) => [...state.bridges.values()].some((bridge) => bridge.state === "ready"));
  if (!bootstrap) return null;
  const { phase } = bootstrap;
  const [kind, icon] = PHASE_KINDS[phase] ?? ["", "info"];
  const isOver = phase === "done" || phase === "aborted" || phase === "skipped";
  return html`
    <section class="card" aria-labelledby="bootstrap-title">
      <header class="card-head">
        <h2 id="bootstrap-title">${t("boot.title")}</h2>
        <${Badge} kind=${kind} icon=${icon}>${hasText(`phase.${phase}`) ? t(`phase.${phase}`) : phase}<//>
      </header>
      <div class="card-body">
        ${phase === "waiting_for_browser" && html`<${Steps} />`}
        ${phase === "settling" && html`<${Settling} bootstrap=${bootstrap} isReady=${isReady} />`}
        ${phase === "confirm" && html`<${Question} />`}
        ${phase === "running" && html`<${Run} bootstrap=${bootstrap} />`}
        ${isOver && html`<${Result} bootstrap=${bootstrap} isReady=${isReady} />`}
        ${bootstrap.skipped.length > 0 && html`<${SkippedList} skipped=${bootstrap.skipped} canRetry=${phase !== "running" && isReady} />`}
        ${phase !== "waiting_for_browser" && phase !== "running" && html`<${OneModel} isReady=${isReady} />`}
      </div>
    </section>`;
}

/** How to connect a tab. */
function Steps() {
  const urls = useStore((state) => state.urls);
  const count = useStore((state) => state.bridges.size);
  if (count) return html`<p>${t("boot.not_ready")}</p>`;
  return html`
    <p>${t("boot.connect")}</p>
    <ol class="steps">
      <li>${t("boot.step_manager")}</li>
      <li><a href=${urls.userscript ?? "bridge.user.js"}>${t("boot.step_script")}</a></li>
      <li><a href="https://lmarena.ai/" target="_blank" rel="noreferrer">${t("boot.step_open")}</a> ${t("boot.step_keep")}</li>
      <li>${t("boot.step_allow")}</li>
      <li>${t("boot.step_sign_in")}</li>
    </ol>`;
}

/** @param {{bootstrap: import("../store.js").Bootstrap, isReady: boolean}} props */
function Settling({ bootstrap, isReady }) {
  const end = bootstrap.settles_at ?? 0;
  const left = useTicking(() => String(Math.max(0, Math.ceil(end - Date.now() / 1000))));
  return html`
    <p class="countdown"><span class="countdown-number num">${left}</span> <span>${t("boot.settling", { n: Number(left) })}</span></p>
    <div class="row">
      <${Button} icon="play" disabled=${!isReady} onClick=${() => start()}>${t("boot.start_now")}<//>
    </div>`;
}

function Question() {
  const plan = usePlan();
  return html`
    <p class="question">${t("boot.plan", plan)}</p>
    <div class="row">
      <${Button} kind="primary" icon="play" onClick=${() => start()}>${t("boot.open_n", plan)}<//>
      <${Button} kind="quiet" onClick=${abort}>${t("boot.skip")}<//>
    </div>
    <p class="muted small">${t("boot.same_before")} <kbd lang="zh-CN">按回车键继续</kbd> ${t("boot.same_after")}</p>`;
}

/** @param {{bootstrap: import("../store.js").Bootstrap}} props */
function Progress({ bootstrap }) {
  const share = bootstrap.planned ? Math.min(1, bootstrap.opened / bootstrap.planned) : 0;
  const text = t("boot.progress", { opened: bootstrap.opened, planned: bootstrap.planned });
  return html`
    <div class="stack tight">
      <div class="row between"><span class="num">${text}</span><span class="muted num">${formatPercent(share)}</span></div>
      <div class="bar" role="progressbar" aria-label=${t("boot.title")} aria-valuemin="0" aria-valuemax=${bootstrap.planned}
        aria-valuenow=${bootstrap.opened} aria-valuetext=${text}>
        <span style=${{ transform: `scaleX(${share})` }}></span>
      </div>
    </div>`;
}

/** @param {{model: string, opened: number, planned: number, isSkipped: boolean}} props */
const ModelProgress = memo(({ model, opened, planned, isSkipped }) => {
  const kind = isSkipped ? "failed" : opened >= planned ? "complete" : opened ? "some" : "";
  return html`
    <li class=${`tile ${kind}`} title=${model}>
      <span class="clip">${model}</span>
      <span class="tile-count num">${isSkipped ? html`<${Icon} name="warning" size=${12} /><span class="hidden">${t("boot.skipped_word")}</span>` : `${opened}/${planned}`}</span>
      <span class="tile-bar"><span style=${{ transform: `scaleX(${planned ? opened / planned : 0})` }}></span></span>
    </li>`;
});

/** @param {{bootstrap: import("../store.js").Bootstrap}} props */
function Run({ bootstrap }) {
  const pool = useStore((state) => state.pool);
  const skipped = new Set(bootstrap.skipped.map((entry) => entry.model_id));
  const progress = bootstrap.progress ?? [];
  return html`
    <${Progress} bootstrap=${bootstrap} />
    <div class="row">
      <${Button} kind="danger" icon="stop" onClick=${abort}>${t("boot.abort")}<//>
      <span class="muted small">${t("boot.abort_hint")}</span>
    </div>
    ${progress.length > 0 && html`
      <ul class="tiles" tabindex="0" aria-label=${t("boot.per_model")}>
        ${progress.map((entry) => html`
          <${ModelProgress} key=${entry.model_id} model=${pool.get(entry.model_id)?.model ?? entry.model_id} opened=${entry.opened}
            planned=${entry.planned} isSkipped=${skipped.has(entry.model_id)} />`)}
      </ul>`}`;
}

/** @param {{bootstrap: import("../store.js").Bootstrap, isReady: boolean}} props */
function Result({ bootstrap, isReady }) {
  const { conversations, models } = usePlan();
  return html`
    ${bootstrap.planned > 0 && html`<${Progress} bootstrap=${bootstrap} />`}
    ${bootstrap.planned === 0 && html`<p class="muted">${t(`boot.${bootstrap.phase}_text`)}</p>`}
    <div class="row">
      <${Button} icon="play" disabled=${!isReady || models === 0} onClick=${() => start()}>${t("boot.start")}<//>
      <span class="muted small">${models ? t("boot.missing", { n: conversations, models }) : t("boot.complete")}</span>
    </div>`;
}

/** @param {{skipped: import("../store.js").Skipped[], canRetry: boolean}} props */
function SkippedList({ skipped, canRetry }) {
  return html`
    <div class="stack">
      <div class="row between">
        <h3>${t("boot.skipped", { n: skipped.length })}</h3>
        <${Button} small icon="refresh" disabled=${!canRetry} onClick=${() => start(skipped.map((entry) => entry.model_id))}>
          ${t("boot.retry_all")}<//>
      </div>
      <ul class="skipped">
        ${skipped.map((entry) => html`
          <li key=${entry.model_id}>
            <div class="row between">
              <strong class="skipped-name">${entry.model}</strong>
              <${Button} small kind="quiet" icon="refresh" disabled=${!canRetry} aria-label=${t("boot.retry_model", { model: entry.model })}
                onClick=${() => start([entry.model_id])}>${t("ui.retry")}<//>
            </div>
            <p>${entry.arena_status ? html`<${Badge} kind="bad">${entry.arena_status}<//> ` : ""}${entry.reason}</p>
            ${entry.reply && html`<${More} title=${t("boot.reply")} text=${entry.reply} />`}
            ${entry.traceback && html`<${More} title=${t("ui.traceback")} text=${entry.traceback} />`}
          </li>`)}
      </ul>
    </div>`;
}

/** Conversations for one model only. @param {{isReady: boolean}} props */
function OneModel({ isReady }) {
  const pool = useStore((state) => state.pool);
  const [text, setText] = useState("");
  const list = useId();
  const names = useMemo(() => {
    /** @type {Map<string, string>} */
    const names = new Map();
    for (const entry of pool.values()) {
      if (entry.requires_image) continue; // it opens with its first request
      names.set(names.has(entry.model) ? `${entry.model} ${entry.model_id}` : entry.model, entry.model_id);
    }
    return names;
  }, [pool.size]);
  const id = names.get(text.trim());
  /** @param {Event} event */
  const submit = (event) => {
    event.preventDefault();
    if (id) void start([id]);
  };
  return html`
    <form class="one-model" onSubmit=${submit}>
      <label class="field"><span class="field-label">${t("boot.one_model")}</span>
        <input list=${list} value=${text} placeholder=${t("boot.one_model_hint")} autocomplete="off" spellcheck="false"
          onInput=${(/** @type {any} */ event) => setText(event.currentTarget.value)} />
      </label>
      <datalist id=${list}>${[...names.keys()].map((name) => html`<option key=${name} value=${name} />`)}</datalist>
      <${Button} type="submit" icon="plus" disabled=${!id || !isReady}>${t("boot.open")}<//>
    </form>`;
}

