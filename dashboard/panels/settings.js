// @ts-check
// The configuration in force, and where each value came from.

import { hasText, t } from "../i18n.js";
import { useStore } from "../store.js";
import {
  Badge, Button, CopyButton, Empty, ErrorNote, getNotify, Icon, Loading, notifyObstacle, SearchField, setNotify, Toggle, usePolled,
} from "../ui.js";
import { html, useMemo, useState } from "../vendor/preact-htm.js";

/** @typedef {{key: string, value: any, default: any, source: string, is_secret: boolean}} Setting */

const SOURCE_KINDS = /** @type {Record<string, string>} */ ({ file: "accent", environment: "warn", "command line": "ok" });

/** As it would stand in the file. @param {any} value @returns {string} */
function show(value) {
  if (Array.isArray(value)) return `[${value.map(show).join(", ")}]`;
  if (value !== null && typeof value === "object") {
    const entries = Object.entries(value).map(([name, one]) => `${JSON.stringify(name)} = ${show(one)}`);
    return entries.length ? `{ ${entries.join(", ")} }` : "{}";
  }
  return JSON.stringify(value);
}

export default function Settings() {
  const { data, error, reload } = usePolled("/api/settings");
  const [text, setText] = useState("");
  const [isChanged, setChanged] = useState(false);
  const sections = useMemo(() => {
    /** @type {Map<string, Setting[]>} */
    const sections = new Map();
    const wanted = text.trim().toLowerCase();
    for (const setting of /** @type {Setting[]} */ (data?.settings ?? [])) {
      if (isChanged && setting.source === "default") continue;
      if (wanted && !`${setting.key} ${setting.is_secret ? "" : show(setting.value)} ${setting.source}`.toLowerCase().includes(wanted)) continue;
      const name = setting.key.split(".")[0];
      sections.set(name, [...(sections.get(name) ?? []), setting]);
    }
    return [...sections];
  }, [data, text, isChanged]);
  return html`
    <div class="page">
      <header class="page-head"><h1>${t("panel.settings")}</h1>
        ${data && html`<span class="muted small">${data.file ? t("settings.file") : t("settings.no_file")} ${data.file && html`<code>${data.file}</code>`}</span>`}
      </header>
      <${Versions} />
      <${Notifications} />
      <div class="toolbar">
        <${SearchField} label=${t("settings.search")} value=${text} onInput=${setText} />
        <${Toggle} label=${t("settings.only_changed")} checked=${isChanged} onChange=${setChanged} />
        <span class="hidden" role="status">${data && t("settings.count", { n: sections.reduce((sum, [, list]) => sum + list.length, 0) })}</span>
      </div>
      ${error && html`<${ErrorNote} error=${error} onRetry=${reload} />`}
      ${!data && !error && html`<${Loading} />`}
      ${data && sections.length === 0 && html`<div class="card"><${Empty} icon="search" title=${isChanged && !text ? t("settings.none_changed") : t("ui.nothing_found")} /></div>`}
      ${sections.map(([name, settings]) => html`
        <section class="card" key=${name} aria-labelledby=${`section-${name}`}>
          <header class="card-head"><h2 id=${`section-${name}`}><code>[${name}]</code></h2></header>
          <dl class="settings">${settings.map((setting) => html`<${Row} key=${setting.key} setting=${setting} />`)}</dl>
        </section>`)}
    </div>`;
}

/** @param {{setting: Setting}} props */
function Row({ setting }) {
  const isDefault = setting.source === "default";
  const value = setting.is_secret ? (setting.value ? t("settings.secret_set") : t("settings.secret_unset")) : show(setting.value);
  const source = `source.${setting.source.replace(" ", "_")}`;
  return html`
    <div class=${`setting ${isDefault ? "is-default" : ""}`}>
      <dt><code>${setting.key.split(".").slice(1).join(".")}</code></dt>
      <dd>
        ${setting.is_secret ? html`<span class="muted">${value}</span>` : html`<code>${value}</code>`}
        ${!isDefault && !setting.is_secret && html`<span class="muted small">${t("settings.default")} <code>${show(setting.default)}</code></span>`}
      </dd>
      <dd class="setting-source">${isDefault
        ? html`<span class="muted small">${t("source.default")}</span>`
        : html`<${Badge} kind=${SOURCE_KINDS[setting.source] ?? ""}>${hasText(source) ? t(source) : setting.source}<//>`}</dd>
    </div>`;
}

/** The program's version and the userscripts', which should be the same. */
function Versions() {
  const version = useStore((state) => state.version);
  const bridges = useStore((state) => state.bridges);
  const urls = useStore((state) => state.urls);
  const others = [...bridges.values()].filter((bridge) => bridge.script !== version);
  return html`
    <section class="card" aria-labelledby="versions-title">
      <header class="card-head"><h2 id="versions-title">${t("settings.versions")}</h2></header>
      <div class="card-body">
        <dl class="kv">
          <dt>${t("settings.program")}</dt><dd class="num">${version}</dd>
          <dt>${t("settings.userscript")}</dt>
          <dd class="num">${bridges.size === 0 ? html`<span class="muted">${t("settings.no_tab")}</span>` : [...bridges.values()].map((bridge) => html`
            <span class="row" key=${bridge.id}><span>${bridge.script}</span><span class="muted small">${t("now.tab", { id: String(bridge.id) })}</span>
              ${bridge.script !== version && html`<${Badge} kind="warn" icon="warning">${t("settings.differs")}<//>`}</span>`)}</dd>
          ${urls.userscript && html`<dt>${t("settings.install")}</dt>
            <dd><span class="id"><a href=${urls.userscript}>${urls.userscript}</a><${CopyButton} text=${urls.userscript} /></span></dd>`}
        </dl>
        ${others.length > 0 && html`<div class="note warn"><${Icon} name="warning" /><span>${t("settings.mismatch", { version })}</span></div>`}
      </div>
    </section>`;
}

/** Off until the person turns them on here, where the browser asks for its leave. */
function Notifications() {
  const [choice, show] = useState(getNotify);
  const [obstacle, setObstacle] = useState(notifyObstacle);
  /** @param {"off"|"silent"|"sound"} wanted */
  const choose = async (wanted) => {
    await setNotify(wanted);
    show(getNotify());
    setObstacle(notifyObstacle());
  };
  return html`
    <section class="card" aria-labelledby="notifications-title">
      <header class="card-head"><h2 id="notifications-title">${t("settings.notify")}</h2></header>
      <div class="card-body">
        <p class="muted small">${t("settings.notify_text")}</p>
        ${obstacle === "" && choice === "off" && html`<div class="row"><${Button} onClick=${() => choose("silent")}>${t("settings.notify_on")}<//></div>`}
        ${obstacle === "" && choice !== "off" && html`<div class="row">
          <${Button} onClick=${() => choose("off")}>${t("settings.notify_off")}<//>
          <${Toggle} label=${t("settings.notify_sound")} checked=${choice === "sound"}
            onChange=${(/** @type {boolean} */ isLoud) => void choose(isLoud ? "sound" : "silent")} /></div>`}
        ${obstacle !== "" && html`<div class="note warn"><${Icon} name="warning" />
          <span>${obstacle === "denied" ? t("settings.notify_denied") : t("settings.notify_unsupported")}</span></div>`}
      </div>
    </section>`;
}
