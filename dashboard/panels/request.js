// @ts-check
/** One request whole: what was asked, what came, how long each step took, what went wrong. Follows a running one. */

import { html, memo, useCallback, useEffect, useMemo, useRef, useState } from "../vendor/preact-htm.js";
import { address, call } from "../api.js";
import { t, useLanguage } from "../i18n.js";
import { store, useStore } from "../store.js";
import { CopyButton, Empty, ErrorNote, Icon, Id, More, attempt } from "../ui.js";
import { Collapsing, ConfirmButton, CopyTextButton, Prose, Verdict, contentText, curlOf, number, span, tokenRate, useNow, wholeTime } from "./shared-b.js";

/** @typedef {import("./shared-b.js").Detail} Detail @typedef {import("./shared-b.js").Message} Message */

const FOLLOW_MILLISECONDS = 1000;

/**
 * The request as the store has it, asked again each second while it runs and the feed says that it goes on.
 * @param {string} id
 */
function useRequest(id) {
  const [detail, setDetail] = useState(/** @type {Detail|null} */ (null));
  const [problem, setProblem] = useState(/** @type {any} */ (null));
  const entry = useStore((state) => state.running.get(id) ?? null);
  const work = useRef({ isAsking: false, isWanted: false, last: 0, timer: 0, isGone: false });

  const ask = useCallback(async () => {
    const current = work.current;
    if (current.isAsking) {
      current.isWanted = true;
      return;
    }
    current.isAsking = true;
    current.isWanted = false;
    current.last = performance.now();
    try {
      const found = await call("GET", `/api/requests/${encodeURIComponent(id)}`);
      if (current.isGone) return;
      setDetail(found);
      setProblem(null);
    } catch (error) {
      if (!current.isGone) setProblem(error);
    } finally {
      current.isAsking = false;
      if (current.isWanted && !current.isGone) later();
    }
  }, [id]);
  const later = useCallback(() => {
    const current = work.current;
    if (current.timer || document.hidden) return;
    current.timer = window.setTimeout(() => {
      current.timer = 0;
      ask();
    }, Math.max(0, FOLLOW_MILLISECONDS - (performance.now() - current.last)));
  }, [ask]);

  useEffect(() => {
    work.current = { isAsking: false, isWanted: false, last: 0, timer: 0, isGone: false };
    const mine = work.current;
    setDetail(null);
    setProblem(null);
    ask();
    const onVisible = () => document.hidden || later();
    document.addEventListener("visibilitychange", onVisible);
    return () => {
      mine.isGone = true;
      clearTimeout(mine.timer);
      document.removeEventListener("visibilitychange", onVisible);
    };
  }, [ask, later]);
  useEffect(() => {
    // The feed changed it, or let go of it: see what became of it.
    if (entry || detail?.is_running) later();
  }, [entry, later]);
  useEffect(() => {
    // Ended, but the store writes a moment later.
    if (!entry && detail?.is_running) later();
  }, [detail, entry, later]);
  const isOpen = useStore((state) => state.connection === "open");
  useEffect(() => {
    if (isOpen && problem && problem.status !== 404) later(); // the program is there again
  }, [isOpen, problem, later]);
  return { detail, problem, entry, ask };
}

/**
 * @typedef {{name: string, from: number, to: number|null, waiting?: number|null, note?: string|null, kind: string}} Step
 * The request's life as steps: waiting, each try, whole. Times in seconds since it came.
 * @param {Detail} detail
 * @param {number} elapsed
 * @returns {{steps: Step[], whole: number}}
 */
export function stepsOf(detail, elapsed) {
  const isRunning = !!detail.is_running;
  const whole = Math.max(isRunning ? elapsed : (detail.total_seconds ?? 0), 0.001);
  /** @type {Step[]} */
  const steps = [];
  const tries = detail.tries ?? [];
  const queued = detail.queued_seconds ?? tries[0]?.started_seconds ?? (isRunning && !tries.length ? null : 0);
  if (queued == null || queued >= 0.0005) {
    steps.push({ name: t("b.step.queue"), from: 0, to: queued, kind: "queue" });
  }
  let before = /** @type {number|null} */ (null);
  tries.forEach((each, index) => {
    const from = each.started_seconds ?? 0;
    if (before != null && from - before > 0.05) steps.push({ name: t("b.step.pause"), from: before, to: from, kind: "queue" });
    const last = index === tries.length - 1;
    const to = each.ended_seconds ?? (isRunning && last ? null : whole);
    const where = [each.session_id && t("b.step.session", { id: each.session_id }), each.bridge != null && t("b.step.bridge", { id: String(each.bridge) })];
    steps.push({
      name: tries.length > 1 ? t("b.step.try", { n: number(index + 1) }) : t("b.step.only_try"),
      from, to, waiting: each.first_byte_seconds ?? null, kind: each.problem ? "failed" : "try",
      note: [each.problem, where.filter(Boolean).join(" · ")].filter(Boolean).join("\n"),
    });
    before = each.ended_seconds ?? null;
  });
  steps.push({ name: isRunning ? t("b.step.so_far") : t("b.step.whole"), from: 0, to: isRunning ? null : whole, kind: "whole" });
  return { steps, whole };
}

/** @param {number} share */
const percent = (share) => `${(Math.max(0, Math.min(1, share)) * 100).toFixed(2)}%`;

/** The steps as a table whose bars share one axis. @param {{detail: Detail}} props */
function Waterfall({ detail }) {
  const now = useNow(500, !!detail.is_running);
  const { steps, whole } = stepsOf(detail, Math.max(0.001, now - detail.created_at));
  return html`<section class="card" aria-labelledby="timings-title">
    <div class="card-head"><h2 id="timings-title">${t("b.request.timings")}</h2></div>
    <div class="card-body"><table role="table" class="b-waterfall" aria-labelledby="timings-title">
      <thead role="rowgroup"><tr role="row">
        <th role="columnheader" scope="col">${t("b.step.step")}</th>
        <th role="columnheader" scope="col" class="b-axis"><span class="b-axis-name">${t("b.step.course")}</span>
          <span aria-hidden="true">0</span><span aria-hidden="true">${span(whole / 2)}</span><span aria-hidden="true">${span(whole)}</span></th>
        <th role="columnheader" scope="col" class="numeric">${t("b.step.begins")}</th>
        <th role="columnheader" scope="col" class="numeric">${t("b.step.first_byte")}</th>
        <th role="columnheader" scope="col" class="numeric">${t("b.step.takes")}</th>
      </tr></thead>
      <tbody role="rowgroup">
        ${steps.map((step, index) => {
          const to = step.to ?? whole;
          const first = step.waiting == null ? null : Math.min(step.waiting, to);
          return html`<tr role="row" key=${index} class=${`b-step b-step-${step.kind}`}>
            <th role="rowheader" scope="row">${step.name}</th>
            <td role="cell" class="b-lane">
              <div class="b-track" aria-hidden="true">
                <div class="b-bar" style=${{ left: percent(step.from / whole), width: percent((to - step.from) / whole) }}></div>
                ${first != null && html`<div class="b-bar b-bar-bytes" style=${{ left: percent(first / whole), width: percent((to - first) / whole) }}></div>`}
              </div>
              ${step.note && html`<div class="b-note">${step.note}</div>`}
            </td>
            <td role="cell" class="numeric">${span(step.from)}</td>
            <td role="cell" class="numeric">${step.kind === "try" || step.kind === "failed" ? span(step.waiting) : ""}</td>
            <td role="cell" class="numeric">${step.to == null ? t("b.step.running") : span(to - step.from)}</td>
          </tr>`;
        })}
      </tbody>
    </table>
    <p class="b-legend" aria-hidden="true">
      <span class="b-key b-key-queue"></span>${t("b.step.legend_wait")}
      <span class="b-key b-key-try"></span>${t("b.step.legend_try")}
      <span class="b-key b-key-bytes"></span>${t("b.step.legend_bytes")}
      <span class="b-key b-key-failed"></span>${t("b.step.legend_failed")}
    </p></div>
  </section>`;
}

const ROLES = new Set(["system", "developer", "user", "assistant", "tool", "function"]);

const Messages = memo(
  /** @param {{messages: Message[], language: string}} props */
  ({ messages }) => html`<ol class="b-messages">
    ${messages.map((message, index) => {
      const text = contentText(message.content);
      return html`<li key=${index} class=${`b-message b-role-${ROLES.has(message.role) ? message.role : "other"}`}>
        <h3>${ROLES.has(message.role) ? t(`b.role.${message.role}`) : message.role}</h3>
        ${text ? html`<${Collapsing} text=${text} />` : html`<p class="muted">${t("b.request.empty_message")}</p>`}
        ${!!message.attachments?.length && html`<ul class="b-attachments" aria-label=${t("b.request.attachments")}>
          ${message.attachments.map((name, at) => html`<li key=${at}><span aria-hidden="true">📎 </span>${name}</li>`)}
        </ul>`}
      </li>`;
    })}
  </ol>`,
);

const Answer = memo(
  /** @param {{answer: string|null|undefined, reasoning: string|null|undefined, isRunning: boolean, failed: boolean, language: string}} props */
  ({ answer, reasoning, isRunning, failed }) => html`<section class="card" aria-labelledby="answer-title">
    <div class="card-head"><h2 id="answer-title">${t("b.request.answer")}</h2>
      ${answer && html`<${CopyButton} text=${answer} label=${t("b.request.copy_answer")} />`}</div>
    <div class="card-body">
    ${reasoning && html`<details class="more"><summary>${t("b.request.reasoning", { n: number(reasoning.length) })}</summary>
      <div class="b-prose b-thought">${reasoning}</div></details>`}
    ${answer
      ? html`<div class="b-answer"><${Prose} text=${answer} />${isRunning && html`<span class="b-caret" aria-hidden="true"></span>`}</div>`
      : html`<p class="muted">${isRunning ? t("b.request.no_answer_yet") : failed ? t("b.request.no_answer_failed") : t("b.request.no_answer")}</p>`}
    </div>
  </section>`,
);

/** @param {{name: string, children: any}} props */
const Fact = ({ name, children }) => html`<div class=${`b-fact b-${name}`}><dt>${t(`b.fact.${name}`)}</dt><dd>${children}</dd></div>`;

/** @param {{detail: Detail}} props */
function Facts({ detail }) {
  const rate = tokenRate(detail);
  return html`<dl class="card b-facts">
    <${Fact} name="received">${wholeTime(detail.created_at)}<//>
    <${Fact} name="client">${detail.client ?? "–"}<//>
    <${Fact} name="path"><code>${detail.path ?? "–"}</code>${detail.is_stream ? ` · ${t("b.fact.streamed")}` : ""}<//>
    <${Fact} name="session"><${Id} value=${detail.session_id} length=${18} /><//>
    <${Fact} name="first_byte">${span(detail.first_byte_seconds)}<//>
    <${Fact} name="total">${detail.is_running ? t("b.step.running") : span(detail.total_seconds)}<//>
    <${Fact} name="tries">${number(detail.attempts ?? detail.tries?.length ?? null)}<//>
    <${Fact} name="tokens">${detail.prompt_tokens == null && detail.completion_tokens == null ? "–" : `${number(detail.prompt_tokens)} → ${number(detail.completion_tokens)}`}${rate != null && ` · ${t("b.per_second", { n: number(rate, 1) })}`}<//>
    <${Fact} name="end">${detail.is_running ? "–" : html`${String(detail.status ?? "–")}${detail.outcome ? html` · <code>${detail.outcome}</code>` : ""}`}<//>
    ${detail.parameters && Object.keys(detail.parameters).length > 0 && html`<div class="b-fact b-wide"><dt>${t("b.fact.parameters")}</dt>
      <dd class="b-parameters">${Object.entries(detail.parameters).map(([name, value]) => html`<code key=${name}>${name}: ${JSON.stringify(value)}</code>`)}</dd></div>`}
  </dl>`;
}

/** @param {{id: string}} props */
export default function RequestPage({ id }) {
  const [language] = useLanguage();
  const { detail: stored, problem, entry, ask } = useRequest(id);
  const needsKey = useStore((state) => !!state.needs_key);
  // While it runs the feed is ahead of what was asked.
  const detail = useMemo(() => {
    if (stored && entry && stored.is_running) {
      const { preview: _, ...rest } = entry;
      return { ...stored, ...rest };
    }
    return stored;
  }, [stored, entry]);

  const abort = () => attempt(() => call("DELETE", `/api/requests/${encodeURIComponent(id)}`), t("b.request.aborted")).then(ask);

  const back = html`<a class="b-back" href="#/requests"><${Icon} name="left" size=${14} /> ${t("b.requests.title")}</a>`;
  if (!detail) {
    return html`<section class="page b-request">
      ${back}
      <h1>${t("b.request.title")}</h1>
      ${problem
        ? problem.status === 404
          ? html`<${Empty} icon="search" title=${t("b.request.not_found", { id })} />`
          : html`<${ErrorNote} error=${problem} onRetry=${ask} />`
        : html`<p class="muted b-loading">${t("b.loading")}</p>`}
    </section>`;
  }
  const messages = /** @type {Message[]|null|undefined} */ (detail.messages);
  const isOff = messages == null && detail.answer == null;
  const names = (messages ?? []).flatMap((message) => message.attachments ?? []);
  return html`<section class="page b-request" aria-labelledby="request-title">
    ${back}
    <div class="page-head">
      <div class="b-title">
        <h1 id="request-title">${detail.model}</h1>
        <${Verdict} request=${detail.is_running ? { ...detail, outcome: null } : detail} />
        <span class="id b-id"><code>${detail.request_id}</code><${CopyButton} text=${detail.request_id} label=${t("b.request.copy_id")} /></span>
      </div>
      <div class="row">
        ${!isOff && messages != null && html`<${CopyTextButton} text=${() => curlOf(detail, address("").replace(/\/$/, ""), needsKey)} label=${t("b.request.copy_curl")} />`}
        ${detail.is_running && html`<${ConfirmButton} icon="stop" label=${t("b.request.abort")} question=${t("b.request.abort_sure")} onConfirm=${abort} />`}
      </div>
    </div>
    ${problem && html`<${ErrorNote} error=${problem} onRetry=${ask} />`}
    ${detail.error && html`<section class="card b-failure" aria-labelledby="error-title">
      <div class="card-head"><h2 id="error-title"><${Icon} name="warning" /> ${t("b.request.error")}</h2></div>
      <div class="card-body"><p>${detail.error}</p>
        ${detail.traceback && html`<${More} title=${t("b.request.traceback")} text=${detail.traceback} />`}</div>
    </section>`}
    <${Facts} detail=${detail} />
    <${Waterfall} detail=${detail} />
    ${isOff
      ? html`<div class="note b-off" role="note"><${Icon} name="info" /><span><strong>${t("b.request.contents_off")}</strong>
          ${" "}${t("b.request.contents_off_why")} <code>[log] contents = false</code></span></div>`
      : html`<section class="card" aria-labelledby="messages-title">
            <div class="card-head"><h2 id="messages-title">${t("b.request.messages")} <span class="muted">${number(messages?.length ?? 0)}</span></h2></div>
            <div class="card-body">
            ${names.length > 0 && html`<p class="muted">${t("b.request.attachments_not_kept")}</p>`}
            <${Messages} messages=${messages ?? []} language=${language} />
            </div>
          </section>
          <${Answer} answer=${detail.answer} reasoning=${detail.reasoning} isRunning=${!!detail.is_running} failed=${!!detail.error} language=${language} />`}
  </section>`;
}
