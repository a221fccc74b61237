// @ts-check
/** How clients connect: the address, snippets for the usual ones, and a box to try a model in. */

import { html, memo, useEffect, useId, useLayoutEffect, useMemo, useReducer, useRef, useState } from "../vendor/preact-htm.js";
import { address, call, getKey, stream } from "../api.js";
import { t, useLanguage } from "../i18n.js";
import { useStore } from "../store.js";
import { Button, CopyButton, ErrorNote, Tabs } from "../ui.js";
import { ModelPicker, Prose, number } from "./shared-b.js";
import { CLIENTS } from "./snippets.js";

/**
 * @typedef {import("./shared-b.js").Choice} Choice
 * @typedef {{id: number, role: "user"|"assistant", text: string, reasoning: string, model: string,
 *   state: "done"|"running"|"stopped"|"failed"|"cut", problem: string}} Turn
 */

/** What is chosen outlives the panel, but not a reload. */
const kept = {
  model: "",
  client: "curl",
  draft: "",
  /** @type {Choice[]} */
  models: [],
};

// ── The chat: one for the page, so that it goes on while another panel is shown ─────────────────────────────

const chat = {
  /** @type {Turn[]} */
  turns: [],
  /** @type {AbortController|null} */
  control: null,
  count: 0,
  /** @type {() => void} */
  onChange: () => {},
  frame: 0,
};

/** Draw soon, at most once a frame. */
function changed() {
  chat.frame ||= requestAnimationFrame(() => {
    chat.frame = 0;
    chat.onChange();
  });
}

/** @param {Partial<Turn>} turn @returns {(change: Partial<Turn>) => void} makes it another one, as long as it is there */
function add(turn) {
  const id = ++chat.count;
  chat.turns = [
    ...chat.turns,
    { id, role: "user", text: "", reasoning: "", model: "", state: "done", problem: "", ...turn },
  ];
  return (change) => {
    chat.turns = chat.turns.map((each) => (each.id === id ? { ...each, ...change } : each));
    changed();
  };
}

/**
 * Whether a turn is part of what the model is told: not a failed one, nor the question that it left open.
 * @param {Turn} turn
 * @param {number} index
 * @param {Turn[]} turns
 */
const isSaid = (turn, index, turns) => !!turn.text && turn.state !== "failed" && turns[index + 1]?.state !== "failed";

/** @param {string} text @param {string} model */
async function send(text, model) {
  add({ role: "user", text });
  const messages = chat.turns.filter(isSaid).map(({ role, text: content }) => ({ role, content }));
  const amend = add({ role: "assistant", model, state: "running" });
  changed();
  const control = (chat.control = new AbortController());
  let said = "";
  let thought = "";
  let reason = "";
  try {
    await stream("/v1/chat/completions", { model, messages, stream: true }, ({ data }) => {
      if (control.signal.aborted || data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices?.[0];
      said += choice?.delta?.content ?? "";
      thought += choice?.delta?.reasoning_content ?? choice?.delta?.reasoning ?? "";
      reason = choice?.finish_reason ?? reason;
      amend({ text: said, reasoning: thought });
    }, control.signal);
    if (control.signal.aborted) amend({ state: "stopped" });
    else if (!reason) amend({ state: "failed", problem: t("b.try.broke_off") });
    else if (reason !== "stop") amend({ state: "cut", problem: t(`b.outcome.${reason === "length" ? "length" : "content_filter"}`) });
    else amend({ state: "done" });
  } catch (error) {
    if (control.signal.aborted) amend({ state: "stopped" });
    else amend({ state: "failed", problem: /** @type {Error} */ (error).message });
  } finally {
    if (chat.control === control) chat.control = null;
    changed();
  }
}

function forget() {
  chat.control?.abort();
  chat.control = null;
  chat.turns = [];
  changed();
}

const TurnView = memo(
  /** @param {{turn: Turn, language: string}} props */
  ({ turn }) => html`<li class=${`b-turn b-turn-${turn.role}`} aria-busy=${turn.state === "running" ? "true" : undefined}>
    <h3>${turn.role === "user" ? t("b.role.user") : turn.model}</h3>
    ${turn.reasoning && html`<details class="more"><summary>${t("b.request.reasoning", { n: number(turn.reasoning.length) })}</summary>
      <div class="b-prose b-thought">${turn.reasoning}</div></details>`}
    ${turn.text
      ? html`<${Prose} text=${turn.text} />`
      : turn.state === "running" && html`<p class="muted">${turn.reasoning ? t("b.try.thinking") : t("b.try.waiting")}<span class="b-dots" aria-hidden="true"></span></p>`}
    ${turn.state === "failed" && html`<p class="b-failure-line" role="alert">${turn.problem}</p>`}
    ${turn.state === "stopped" && html`<p class="muted">${t("b.try.stopped")}</p>`}
    ${turn.state === "cut" && html`<p class="muted">${turn.problem}</p>`}
  </li>`,
);

/** @param {{models: Choice[], model: string, onModel: (name: string) => void, language: string}} props */
function TryIt({ models, model, onModel, language }) {
  const id = useId();
  const [, render] = useReducer((/** @type {number} */ count) => count + 1, 0);
  const [draft, setDraft] = useState(kept.draft);
  const log = useRef(/** @type {HTMLElement|null} */ (null));
  const box = useRef(/** @type {HTMLTextAreaElement|null} */ (null));
  const follows = useRef(true);
  const isRunning = chat.control != null;
  const chosen = models.find((each) => each.id === model);

  useEffect(() => {
    chat.onChange = () => render(undefined);
    return () => {
      chat.onChange = () => {};
    };
  }, []);
  useLayoutEffect(() => {
    if (log.current && follows.current) log.current.scrollTop = log.current.scrollHeight;
  });
  useLayoutEffect(() => {
    const element = box.current;
    if (!element) return;
    element.style.height = "auto";
    element.style.height = `${Math.min(element.scrollHeight + 2, 180)}px`;
  }, [draft]);

  const write = (/** @type {string} */ text) => {
    kept.draft = text;
    setDraft(text);
  };
  const submit = () => {
    const text = draft.trim();
    if (!text || isRunning || !model) return;
    write("");
    follows.current = true;
    send(text, model);
    box.current?.focus();
  };
  return html`<section class="card b-try" aria-labelledby=${`${id}-title`}>
    <div class="card-head"><h2 id=${`${id}-title`}>${t("b.try.title")}</h2>
      <${Button} small kind="quiet" icon="trash" disabled=${!chat.turns.length} onClick=${() => {
        forget();
        box.current?.focus();
      }}>${t("b.try.clear")}<//></div>
    <${ModelPicker} label=${t("b.try.model")} models=${models} value=${model} onChange=${onModel} />
    <div class="b-log" ref=${log} role="log" aria-live="polite" aria-busy=${String(isRunning)} aria-label=${t("b.try.log")} tabindex="0"
      onScroll=${(/** @type {any} */ event) => {
        const element = event.currentTarget;
        follows.current = element.scrollHeight - element.scrollTop - element.clientHeight < 40;
      }}>
      ${chat.turns.length
        ? html`<ol>${chat.turns.map((turn) => html`<${TurnView} key=${turn.id} turn=${turn} language=${language} />`)}</ol>`
        : html`<p class="muted b-hint">${t("b.try.hint")}</p>`}
    </div>
    ${chosen?.requires_image && html`<p class="muted">${t("b.try.needs_image")}</p>`}
    <form class="b-compose" onSubmit=${(/** @type {Event} */ event) => {
      event.preventDefault();
      submit();
    }}>
      <div class="field"><label class="hidden" for=${`${id}-box`}>${t("b.try.message")}</label>
        <textarea id=${`${id}-box`} ref=${box} rows="1" value=${draft} placeholder=${t("b.try.placeholder")} aria-describedby=${`${id}-keys`}
          onInput=${(/** @type {any} */ event) => write(event.currentTarget.value)}
          onKeyDown=${(/** @type {KeyboardEvent} */ event) => {
            // An input method's Enter chooses a character; it does not send.
            if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
            event.preventDefault();
            submit();
          }}></textarea></div>
      ${isRunning
        ? html`<${Button} key="stop" icon="stop" onClick=${() => {
            chat.control?.abort();
            box.current?.focus();
          }}>${t("b.try.stop")}<//>`
        : html`<${Button} key="send" type="submit" kind="primary" icon="send" disabled=${!draft.trim() || !model}>${t("b.try.send")}<//>`}
    </form>
    <p class="b-keys" id=${`${id}-keys`}>${t("b.try.keys")}</p>
  </section>`;
}

// ── Address and snippets ────────────────────────────────────────────────────────────────────────────────────

/** The key, shown on demand. @param {{needsKey: boolean}} props */
function Key({ needsKey }) {
  const [isShown, setShown] = useState(false);
  if (!needsKey) return html`<span>${t("b.connect.no_key")}</span>`;
  const key = getKey();
  return html`<span class="b-key-row">
    <code>${isShown ? key || "–" : "••••••••"}</code>
    <${Button} small aria-pressed=${String(isShown)} onClick=${() => setShown(!isShown)}>${isShown ? t("b.connect.hide") : t("b.connect.show")}<//>
    <${CopyButton} text=${key} label=${t("b.connect.copy_key")} />
  </span>`;
}

/** @type {[string, string][]} */
const TABS = CLIENTS.map((client) => [client.id, client.name]);

/** @param {{base: string, model: string, needsKey: boolean, language: string}} props */
function Snippets({ base, model, needsKey }) {
  const id = useId();
  const [chosen, setChosen] = useState(kept.client);
  const client = CLIENTS.find((each) => each.id === chosen) ?? CLIENTS[0];
  const code = useMemo(() => client.code({ base, model, needsKey }), [client, base, model, needsKey]);
  const choose = (/** @type {string} */ name) => {
    kept.client = name;
    setChosen(name);
  };
  return html`<section class="card b-snippets" aria-labelledby=${`${id}-title`}>
    <div class="card-head"><h2 id=${`${id}-title`}>${t("b.connect.clients")}</h2></div>
    <div class="card-body">
      <${Tabs} label=${t("b.connect.clients")} current=${client.id} tabs=${TABS} onSelect=${choose}>
        <p class="muted b-note-of">${t(`b.connect.note.${client.id}`)}</p>
        <div class="b-code">
          <pre tabindex="0" aria-label=${client.name} role="region"><code>${code}</code></pre>
          <${CopyButton} text=${code} label=${t("b.connect.copy")} />
        </div>
      <//>
    </div>
  </section>`;
}

export default function Connect() {
  const [language] = useLanguage();
  const needsKey = useStore((state) => !!state.needs_key);
  const [models, setModels] = useState(kept.models);
  const [model, setModel] = useState(kept.model);
  const [problem, setProblem] = useState(/** @type {any} */ (null));

  const isOpen = useStore((state) => state.connection === "open"); // again after a restart
  const choose = (/** @type {string} */ name) => {
    kept.model = name;
    setModel(name);
  };
  useEffect(() => {
    let isGone = false;
    call("GET", "/v1/models").then(
      (found) => {
        if (isGone) return;
        /** @type {Map<string, Choice>} */
        const byName = new Map(); // a name may stand for two models
        for (const each of found.data) {
          const old = byName.get(each.id);
          byName.set(each.id, { id: each.id, modality: each.modality, requires_image: !!each.requires_image && (old?.requires_image ?? true) });
        }
        kept.models = [...byName.values()].sort((one, other) => one.id.localeCompare(other.id));
        setModels(kept.models);
        setProblem(null);
        if (!kept.model || !byName.has(kept.model)) {
          const ready = found.data.filter((/** @type {any} */ each) => (each.modality ?? "chat") === "chat");
          const best = ready.find((/** @type {any} */ each) => each.sessions_ready > 0) ?? ready[0] ?? found.data[0];
          if (best) choose(best.id);
        }
      },
      (error) => isGone || setProblem(error),
    );
    return () => {
      isGone = true;
    };
  }, [isOpen]);

  const base = address("/v1"); // as this browser reaches it
  return html`<section class="page b-connect" aria-labelledby="connect-title">
    <div class="page-head"><h1 id="connect-title">${t("b.connect.title")}</h1></div>
    ${problem && html`<${ErrorNote} error=${problem} />`}
    <div class="b-columns">
      <div class="b-column">
        <dl class="card kv b-address">
          <dt>${t("b.connect.base")}</dt><dd class="b-key-row"><code>${base}</code><${CopyButton} text=${base} label=${t("b.connect.copy_base")} /></dd>
          <dt>${t("b.connect.key")}</dt><dd><${Key} needsKey=${needsKey} /></dd>
          <dt>${t("b.connect.models")}</dt><dd>${t("b.connect.models_count", { n: number(models.length) })} <code>${base}/models</code></dd>
        </dl>
        <${Snippets} base=${base} model=${model || "gemini-2.5-pro"} needsKey=${needsKey} language=${language} />
      </div>
      <div class="b-column"><${TryIt} models=${models} model=${model} onModel=${choose} language=${language} /></div>
    </div>
  </section>`;
}
