// @ts-check
// The shell around the panels: where one is, how the program is, what the person must do, and the key.

import { ApiError, ask, onRefused, setKey } from "./api.js";
import { follow, restart, retryNow } from "./feed.js";
import { hasText, t, useLanguage } from "./i18n.js";
import Now from "./panels/now.js";
import { store, useStore } from "./store.js";
import { Button, Empty, Field, getTheme, Icon, IconButton, Loading, Messages, notify, onThemeChange, setTheme } from "./ui.js";
import { Component, html, render, useEffect, useRef, useState } from "./vendor/preact-htm.js";

/** @type {Record<string, () => Promise<{default: any}>>} */
const LATER = {
  pool: () => import("./panels/pool.js"),
  requests: () => import("./panels/requests.js"),
  request: () => import("./panels/request.js"),
  time: () => import("./panels/time.js"),
  log: () => import("./panels/log.js"),
  settings: () => import("./panels/settings.js"),
  connect: () => import("./panels/connect.js"),
};
const NAVIGATION = ["now", "pool", "requests", "time", "log", "settings", "connect"];
/** @type {Map<string, any>} */
const loaded = new Map([["now", Now]]);

/** The panel and what it is asked for: "#/requests/req_1" is the panel "request" with the id "req_1". */
function readRoute() {
  const [name = "", ...rest] = location.hash.replace(/^#\/?/, "").split("?")[0].split("/");
  let id = rest.join("/");
  try {
    id = decodeURIComponent(id);
  } catch {
    // A damaged link: as it stands.
  }
  if (name === "requests" && id) return { panel: "request", id };
  return { panel: NAVIGATION.includes(name) ? name : "now", id: "" };
}

function useRoute() {
  const [route, setRoute] = useState(readRoute);
  useEffect(() => {
    const change = () => {
      setRoute(readRoute());
      scrollTo(0, 0);
    };
    addEventListener("hashchange", change);
    return () => removeEventListener("hashchange", change);
  }, []);
  return route;
}

/** What a panel's mistake leaves standing: the shell, and the mistake in words. */
class Guard extends Component {
  /** @param {any} problem */
  componentDidCatch(problem) {
    console.error(problem);
    this.setState({ problem });
  }

  render() {
    const { problem } = /** @type {any} */ (this.state);
    if (!problem) return /** @type {any} */ (this.props).children;
    return html`<${Empty} icon="warning" title=${t("shell.panel_failed")}>
      <code>${String(problem?.message ?? problem)}</code>
      <${Button} icon="refresh" onClick=${() => location.reload()}>${t("shell.reload")}<//>
    <//>`;
  }
}

/** @param {{panel: string, id: string}} props */
function Panel({ panel, id }) {
  const [, render] = useState(0);
  const [problem, setProblem] = useState(/** @type {any} */ (null));
  const Shown = loaded.get(panel);
  useEffect(() => {
    setProblem(null);
    if (loaded.has(panel)) {
      if (!Shown) render((count) => count + 1); // it came between the render and this
      return undefined;
    }
    let isWanted = true;
    LATER[panel]()
      .then((module) => {
        loaded.set(panel, module.default);
        if (isWanted) render((count) => count + 1);
      })
      .catch((error) => isWanted && setProblem(error));
    return () => void (isWanted = false);
  }, [panel]);
  if (problem) {
    return html`<${Empty} icon="warning" title=${t("shell.panel_failed")}><code>${String(problem?.message ?? problem)}</code>
      <${Button} icon="refresh" onClick=${() => location.reload()}>${t("shell.reload")}<//><//>`;
  }
  return Shown ? html`<${Guard} key=${panel}><${Shown} id=${id} /><//>` : html`<${Loading} />`;
}

/** The other panels, once the first is there: a program that is busy later must not delay them. */
function loadAhead() {
  for (const [name, load] of Object.entries(LATER)) {
    load().then((module) => loaded.set(name, module.default)).catch(() => {});
  }
}

const TONES = { open: "ok", connecting: "", lost: "bad", unauthorised: "warn" };

function ConnectionState() {
  const connection = useStore((state) => state.connection);
  return html`<div class="connection"><span class=${`dot ${TONES[connection]}`}></span>
    <span class="connection-text">${t(`connection.${connection}`)}</span></div>`;
}

/** @param {{panel: string}} props */
function Navigation({ panel }) {
  const active = useStore((state) => state.requests.active);
  const person = useStore((state) => state.person);
  const asks = useStore((state) => state.bootstrap?.phase === "confirm");
  const here = panel === "request" ? "requests" : panel;
  return html`
    <nav class="nav" aria-label=${t("shell.panels")}>
      <ul>
        ${NAVIGATION.map((name) => html`
          <li key=${name}>
            <a href=${`#/${name}`} aria-current=${name === here ? "page" : undefined}>
              <${Icon} name=${name} size=${18} />
              <span>${t(`panel.${name}`)}</span>
              ${name === "requests" && active > 0 && html`<span class="count" title=${t("shell.active")}>${active}</span>`}
              ${name === "now" && (person || asks) && html`
                <span class="dot warn"></span><span class="hidden">${t("shell.needs_you")}</span>`}
            </a>
          </li>`)}
      </ul>
    </nav>`;
}

/** Language and theme. */
function Choices() {
  const [language, setLanguage] = useLanguage();
  const [theme, show] = useState(getTheme);
  useEffect(() => onThemeChange(() => show(getTheme())), []);
  const next = /** @type {const} */ ({ auto: "light", light: "dark", dark: "auto" })[theme];
  return html`
    <div class="choices">
      <${Button} kind="quiet" icon="language" lang=${language === "en" ? "zh-CN" : "en"} class="language"
        title=${t("shell.other_language")} onClick=${() => setLanguage(language === "en" ? "zh" : "en")}>
        ${language === "en" ? "中文" : "English"}<//>
      <${IconButton} icon=${{ auto: "auto", light: "sun", dark: "moon" }[theme]} label=${t(`theme.${theme}`)}
        onClick=${() => setTheme(next)} />
    </div>`;
}

/** What the person must do in the tab, on every panel. */
function PersonBanner() {
  const person = useStore((state) => state.person);
  const userscript = useStore((state) => state.urls.userscript);
  if (!person) return null;
  const known = hasText(`person.${person.state}.title`);
  return html`
    <div class="banner warn">
      <${Icon} name=${person.state === "missing" ? "unplugged" : person.state === "loading" ? "clock" : "person"} size=${18} />
      <div>
        <strong>${known ? t(`person.${person.state}.title`) : person.advice}</strong>
        ${known && html`<div>${t(`person.${person.state}.text`)}
          ${person.state === "missing" && userscript && html` <a href=${userscript}>${t("shell.install")}</a>`}</div>`}
      </div>
    </div>`;
}

function ConnectionBanner() {
  const connection = useStore((state) => state.connection);
  const [isShown, show] = useState(false);
  useEffect(() => {
    // A pause of a moment is no news.
    const timer = setTimeout(() => show(connection === "lost"), connection === "lost" ? 800 : 0);
    return () => clearTimeout(timer);
  }, [connection]);
  if (!isShown || connection === "open") return null;
  return html`
    <div class="banner bad">
      <${Icon} name="unplugged" size=${18} />
      <div><strong>${t("shell.lost")}</strong><div>${t("shell.lost_text")}</div></div>
      <${Button} small icon="refresh" onClick=${retryNow}>${t("ui.retry")}<//>
    </div>`;
}

function DemoBanner() {
  const isDemo = useStore((state) => state.is_demo);
  return isDemo && html`
    <div class="banner accent thin"><${Icon} name="info" /><div>${t("shell.demo")}</div></div>`;
}

/** Asks for the key until the program takes one. */
function KeyPrompt() {
  const [error, setError] = useState("");
  const field = useRef(/** @type {HTMLInputElement|null} */ (null));
  useEffect(() => field.current?.focus(), []);
  /** @param {Event} event */
  const submit = async (event) => {
    event.preventDefault();
    const key = field.current?.value.trim() ?? "";
    if (!key) return;
    try {
      await (await ask("GET", "/api/settings", { key })).text();
      setKey(key);
      restart();
    } catch (problem) {
      const status = problem instanceof ApiError ? problem.status : -1;
      setError(status === 401 ? t("key.wrong") : status === 0 ? t("ui.no_answer") : String(problem));
      field.current?.select();
    }
  };
  return html`
    <main class="key-page">
      <form class="card key-card" onSubmit=${submit}>
        <div class="brand"><img src="dashboard/icon.svg" width="28" height="28" alt="" /><h1>lmarena_proxy</h1></div>
        <p>${t("key.why")}</p>
        <${Field} label=${t("key.label")} hint=${t("key.hint")} error=${error}>
          <input type="password" ref=${field} autocomplete="current-password" aria-invalid=${error ? "true" : undefined}
            onInput=${() => setError("")} />
        <//>
        <${Button} kind="primary" type="submit" icon="key">${t("key.use")}<//>
        <${Choices} />
      </form>
    </main>`;
}

function Shell() {
  const { panel, id } = useRoute();
  const version = useStore((state) => state.version);
  const isThere = useStore((state) => state.has_snapshot);
  const main = useRef(/** @type {HTMLElement|null} */ (null));
  const isFirst = useRef(true);
  useEffect(() => {
    if (isThere) setTimeout(loadAhead, 300);
  }, [isThere]);
  useEffect(() => {
    document.title = `${t(`panel.${panel}`)} · lmarena_proxy`;
    if (!isFirst.current) main.current?.focus({ preventScroll: true });
    isFirst.current = false;
  }, [panel, id]);
  return html`
    <div class="shell">
      <a class="skip" href="#main" onClick=${(/** @type {Event} */ event) => { event.preventDefault(); main.current?.focus(); }}>
        ${t("shell.skip")}</a>
      <header class="side">
        <div class="brand">
          <img src="dashboard/icon.svg" width="24" height="24" alt="" />
          <span class="brand-name">lmarena_proxy</span>
        </div>
        <${Navigation} panel=${panel} />
        <div class="side-foot">
          <${Choices} />
          <${ConnectionState} />
          <span class="version small muted num">${version && `v${version}`}</span>
        </div>
      </header>
      <main class="main" id="main" ref=${main} tabindex="-1">
        <div class="banners" role="status">
          <${ConnectionBanner} /><${PersonBanner} /><${DemoBanner} />
        </div>
        ${isThere ? html`<${Panel} panel=${panel} id=${id} />` : html`<${Waiting} />`}
      </main>
    </div>`;
}

/** Nothing for a moment, then a word: the first state comes at once when the program is there. */
function Waiting() {
  const [isLong, setLong] = useState(false);
  useEffect(() => {
    const timer = setTimeout(() => setLong(true), 700);
    return () => clearTimeout(timer);
  }, []);
  return isLong && html`<${Empty} icon="clock" title=${t("shell.waiting")} />`;
}

function App() {
  const [language] = useLanguage();
  const connection = useStore((state) => state.connection);
  const isAsked = connection === "unauthorised";
  // Another language is another page: everything is made anew.
  return html`<div key=${language}>${isAsked ? html`<${KeyPrompt} />` : html`<${Shell} />`}<${Messages} /></div>`;
}

/**
 * Tells on the desktop that the person is needed, once for each time, when this page is not in front. By a timer, as a
 * hidden page renders nothing; browsers let it fire once a minute at least. What passes by itself is not told: a page
 * that loads anew is gone for a moment.
 */
function watchForPerson() {
  let last = "";
  let since = 0;
  let isTold = true;
  setInterval(() => {
    const { person, bootstrap } = store.get();
    const need = person ? person.state : bootstrap?.phase === "confirm" ? "question" : "";
    if (need !== last) [last, since, isTold] = [need, Date.now(), need === "" || need === "loading"];
    if (isTold || Date.now() - since < (need === "missing" ? 15_000 : 3_000)) return;
    isTold = true;
    if (document.hasFocus()) return;
    if (need === "question") notify(t("shell.question"), t("shell.question_text"));
    else if (hasText(`person.${need}.title`)) notify(t(`person.${need}.title`), t(`person.${need}.text`));
  }, 1_000);
}

onRefused(() => store.set({ connection: "unauthorised" }));
render(html`<${App} />`, /** @type {HTMLElement} */ (document.getElementById("app")));
watchForPerson();
void follow();
