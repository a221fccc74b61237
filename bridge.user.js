// ==UserScript==
// @name         lmarena_proxy bridge
// @namespace    lmarena_proxy
// @version      1.0.0
// @description  Lets lmarena_proxy, running on this computer, talk to the arena through this tab.
// @description:zh-CN  让本机运行的 lmarena_proxy 通过此标签页与竞技场通信。
// @license      MIT
// @match        https://lmarena.ai/*
// @match        https://*.lmarena.ai/*
// @match        https://arena.ai/*
// @match        https://*.arena.ai/*
// @run-at       document-start
// @grant        none
// @noframes
// @updateURL    http://127.0.0.1:9080/bridge.user.js
// @downloadURL  http://127.0.0.1:9080/bridge.user.js
// ==/UserScript==
// @ts-check

// A thin relay between the page and the program. It says whether the page can be used, carries the fetches the
// program asks for, notices conversations that the person opens by hand, and passes on the page's model list. What to
// send is decided in lmarena_proxy.py. It clicks nothing, touches no human check and only ever reads cookies: what only
// the person may do is shown in a badge. The wire protocol, version 1, is that of the program's section of this name.
(() => {
  "use strict";
  if (window.top !== window.self) return; // for script managers that ignore @noframes

  // ==== Settings =====================================================================================================

  // The program fills in these three when it serves the script: keep the lines as they are.
  const BRIDGE_URL = "ws://127.0.0.1:9081/";
  const INSTALL_URL = "http://127.0.0.1:9080/bridge.user.js";
  const AUTH_COOKIE = "arena-auth-prod-v1";

  const PROTOCOL = 1;
  const FEATURES = ["upload"]; // commands that older scripts do not know
  const VERSION = "1.0.0";
  const CLOSED_FOR_REINSTALL = 4001;
  const CONNECTING = 0; // of a WebSocket
  const OPEN = 1;
  const SHARED_NAME = "lmarena_proxy bridge"; // of the lock and of the channel between tabs
  const CHECK_TITLE = "Just a moment...";
  const HEAD_BYTES = 8; // of a record: uint32 id, uint32 length
  const FRAME_BYTES = 1 << 20; // what WebSocket libraries take by default
  const UNSENT_BYTES = 8 << 20; // above this the program is behind: stop reading the site
  const BACKPRESSURE_POLL_MS = 25;
  const LOOK_MS = 1000;
  const SIGNED_IN_MS = 1500; // so long the page that was signed in at has to stay
  const FIRST_RETRY_MS = 1000;
  const LAST_RETRY_MS = 30000;
  const LEAST_PATIENCE_MS = 3000; // a busy page looks late
  const ASKING_MS = 3000; // Windows takes two to say that nobody listens: what takes longer waits for the person
  const CLOSE_MS = 1000; // so late after its error a WebSocket's close may come
  const SILENT_BEATS = 3; // the program gives up a connection after two: by then its end is gone
  const RELOAD_PAUSE_MS = 50000; // the program asks at most once a minute; its clock and this one differ
  const CAPTURES_KEPT = 50;
  const LEARNING_MS = 20000; // so long the page's scripts are searched, at most
  const SCRIPTS_SEARCHED = 200; // and so many of them, one after the other
  const SCRIPT_BYTES = 8 << 20; // a larger one is left out

  // No percent sign, backslash or empty segment: what is written is what the site's router sees.
  const RELAYED_PATH = /^\/(?:nextjs-api|api)\/stream(?:\/[\w.~-]+)+(?:\?[\w.~=&-]*)?$/;
  const CAPTURED_PATH = new RegExp(
    "^/(?:nextjs-api|api)/stream/(?:create-evaluation|post-to-evaluation/([^/]+)" +
      "|retry-evaluation-session-message/([^/]+)/messages/([^/]+))$",
  );

  /** @typedef {"loading" | "verification" | "sign_in" | "ready"} PageState */
  /** @typedef {{type: "captured", session_id: string, message_id: string, model_id: string | null, mode: string,
   *             account: string | null}} Capture */
  /** @typedef {{type: "end" | "error" | "uploaded", id: number, reason?: string, message?: string, url?: string}}
   *   Outcome of an exchange */
  /** @typedef {ReturnType<typeof newLink>} Link */

  /** One connection to the program. The ids of exchanges mean something within it only. @param {WebSocket} socket */
  const newLink = (socket) => ({
    socket,
    welcomed: false,
    outdated: false, // whether the program has another version of this script
    over: false,
    heardAt: now(),
    pingedAt: 0, // by the program's clock, in seconds
    beatMs: 0, // between two pings; 0: not known yet
    /** @type {Record<number, AbortController>} */ exchanges: bare({}),
    running: 0, // how many exchanges there are
    /** @type {{id: number, bytes: Uint8Array}[]} body bytes not sent yet */ records: [],
    recordBytes: 0, // what the records take in their frame
    /** @type {Outcome[]} of exchanges whose last bytes are among the records */ outcomes: [],
    flushDue: false,
  });

  const tab = {
    /** @type {PageState} */ state: "loading",
    /** @type {string | null} */ account: null,
    authCookie: AUTH_COOKIE,
    /** @type {"waiting" | "leading" | "stopped"} */ role: "waiting",
    /** @type {Link | null} */ link: null,
    retries: 0, // since the last welcome
    signedInAt: 0, // when this page was first seen signed in, after it had not been
    retryTimer: 0,
    /** @type {string | null} the status that says why there is no connection */ trouble: null,
    /** @type {string | null} the status that says what the site's last answer asked of the person */ due: null,
    policyForbids: false,
  };

  // ==== Natives ======================================================================================================

  // Taken before any script of the page runs. Pages wrap these (for error tracking, say), and what passes here is
  // between the person's programs: the page can neither read nor disturb it. So what carries frames calls nothing
  // else: no methods of arrays or maps, no `for ... of`, and no objects that inherit what a page may have added.

  /** @param {Function} method @returns {(self: unknown, ...args: any[]) => any} */
  const free = (method) => Function.prototype.call.bind(method);

  /** @param {any} object @param {string} name @returns {(self: unknown) => any} */
  const getter = (object, name) => {
    while (!Object.hasOwn(object, name)) object = Object.getPrototypeOf(object);
    return free(/** @type {any} */ (Object.getOwnPropertyDescriptor(object, name)).get);
  };

  /** The same without a prototype. @template {object} T @param {T} object @returns {T} */
  const bare = (object) => ({ __proto__: null, ...object });

  // Where a script manager keeps scripts apart from the page, as Firefox lets it, `window` is a view of the page's own:
  // what a decoder of that window makes of bytes of this script's cannot be read. In the page the two are one.
  const { WebSocket, Request, Response, Headers, ReadableStream, TextDecoder, URL, Uint8Array, AbortController } =
    globalThis;
  const { parse, stringify } = JSON;
  const { assign } = Object;
  const { isInteger } = Number;
  const call = Reflect.apply;
  const pageFetch = window.fetch;
  const fetch = pageFetch.bind(window);
  const digest = crypto.subtle.digest.bind(crypto.subtle);
  const now = performance.now.bind(performance);
  const setTimeout = window.setTimeout.bind(window);
  const decodeBase64 = window.atob.bind(window);
  const codeAt = free(String.prototype.charCodeAt);
  const listen = free(EventTarget.prototype.addEventListener);
  const readCookies = getter(document, "cookie");
  const push = free(Array.prototype.push);
  const shift = free(Array.prototype.shift);
  const execute = free(RegExp.prototype.exec);
  const href = getter(URL.prototype, "href");
  const abort = free(AbortController.prototype.abort);
  const signalOf = getter(AbortController.prototype, "signal");
  const isAborted = getter(AbortSignal.prototype, "aborted");
  const messageData = getter(MessageEvent.prototype, "data");
  const closeCode = getter(CloseEvent.prototype, "code");
  const socketSend = free(WebSocket.prototype.send);
  const socketClose = free(WebSocket.prototype.close);
  const socketState = getter(WebSocket.prototype, "readyState");
  const bufferedAmount = getter(WebSocket.prototype, "bufferedAmount");
  const requestClone = free(Request.prototype.clone);
  const responseClone = free(Response.prototype.clone);
  const responseText = free(Response.prototype.text);
  const responseBody = getter(Response.prototype, "body");
  const responseType = getter(Response.prototype, "type");
  const responseStatus = getter(Response.prototype, "status");
  const responseHeaders = getter(Response.prototype, "headers");
  const getHeader = free(Headers.prototype.get);
  const streamReader = free(ReadableStream.prototype.getReader);
  const readStream = free(ReadableStreamDefaultReader.prototype.read);
  const decode = free(TextDecoder.prototype.decode);
  const copyBytes = free(Uint8Array.prototype.set);
  const bytesIn = getter(Uint8Array.prototype, "byteLength");
  const bufferOf = getter(Uint8Array.prototype, "buffer");
  const offsetOf = getter(Uint8Array.prototype, "byteOffset");

  const { port1: turnStart, port2: turnEnd } = new MessageChannel();
  const postTurn = turnEnd.postMessage.bind(turnEnd);
  /** @type {(() => void)[]} */
  const turns = [];
  turnStart.onmessage = () => shift(turns)?.();

  /** Runs it in the next turn of the event loop. Messages are not slowed in a hidden tab, as timers are.
   * @param {() => void} task */
  const nextTurn = (task) => postTurn(push(turns, task));

  /** Text kept in the browser's storage, which the person may have forbidden.
   * @param {"localStorage" | "sessionStorage"} area @param {string} key @param {string} [value] to be stored */
  const stored = (area, key, value) => {
    try {
      if (value !== undefined) window[area].setItem(key, value);
      return window[area].getItem(key);
    } catch {
      return null;
    }
  };

  // ==== Badge ========================================================================================================

  // In a closed shadow root, built from elements and text only, styled by a constructed sheet: no policy of the page
  // forbids that. It says fixed sentences: nothing that came over the network stands in it. It goes to a corner where
  // it covers none of the site's controls, and folds into its dot where there is no such corner. The person folds and
  // unfolds it, which is remembered; where they are needed it unfolds by itself. `data-status` on the host carries the
  // status word, for tests.

  // Browsers have their own words for the permission to reach this computer; Firefox has no userAgentData.
  const UNBLOCK =
    "userAgentData" in navigator
      ? ["switch on “Apps on device” (or “Local network access”)", "打开“设备上的应用”（或“本地网络访问”）"]
      : ["remove the block of “Access this device”", "移除对“访问此设备”的阻止"];
  const IN_BRAVE = "brave" in navigator; // its Shields may refuse without a word

  /** Status: colour, English, Chinese. @type {Record<string, [string, string, string]>} */
  const TEXTS = {
    connecting: ["grey", "Connecting to the program …", "正在连接本机程序……"],
    standing_by: ["grey", "Standing by: another tab is connected.", "待命中：另一个标签页已连接。"],
    loading: ["grey", "Connected. The page is loading.", "已连接，页面正在加载。"],
    ready: ["green", "Connected.", "已连接。"],
    verification: ["amber", "Please pass the human check on this page.", "请在此页面完成人机验证。"],
    sign_in: ["amber", "Please sign in, or accept the terms.", "请登录，或接受条款。"],
    check_due: [
      "amber",
      "The site wants its human check: please reload this page, and pass it.",
      "网站要求人机验证：请刷新此页面，并完成验证。",
    ],
    sign_in_stale: [
      "amber",
      "The sign-in has expired: please reload this page, and sign in if it asks.",
      "登录已失效：请刷新此页面，如有提示请重新登录。",
    ],
    not_running: [
      "red",
      `The program is not running at ${BRIDGE_URL}${IN_BRAVE ? ", or Brave blocks it: try with Shields down." : ""}`,
      `本机程序未在 ${BRIDGE_URL} 运行${IN_BRAVE ? "，或被 Brave 阻止：请试着关闭 Shields。" : "。"}`,
    ],
    permission_prompt: [
      "amber",
      "The browser asks whether this site may reach apps on this device: please allow it.",
      "浏览器正在询问是否允许此网站访问此设备上的应用：请点击“允许”。",
    ],
    permission_denied: [
      "red",
      `The browser blocks the connection. Click the icon left of the address, ${UNBLOCK[0]}, and reload this page.`,
      `浏览器阻止了连接。请点击地址左侧的图标，${UNBLOCK[1]}，然后刷新此页面。`,
    ],
    policy_forbids: [
      "red",
      `The policy of this page or browser forbids the connection to ${BRIDGE_URL}`,
      `此页面或浏览器的安全策略禁止连接 ${BRIDGE_URL}`,
    ],
    outdated: ["amber", "Connected. Please update this script: ", "已连接。请更新此脚本："],
    reinstall: ["red", "Please reinstall this script, then reload: ", "请重新安装此脚本，然后刷新页面："],
  };
  /** What the person has to do something about in this browser: the badge unfolds for it. */
  const CALLING = Object.keys(TEXTS).filter(
    (status) => /amber|red/.test(TEXTS[status][0]) && !["not_running", "outdated"].includes(status),
  );
  const language = /^zh\b/i.test(navigator.language) ? "zh-CN" : "en";

  const CONTROLS =
    "a[href], button, input, textarea, select, summary, label, video, iframe, [contenteditable], [tabindex='0'], " +
    "[role=button], [role=textbox], [role=link], [role=menuitem], [role=tab]";
  const CORNERS = ["bottom left", "bottom right", "top right", "top left"];
  const PROBE_PX = 12; // smaller than any control that can be hit

  // No animation anywhere: nothing to reduce for those who want none.
  const BADGE_STYLE = `
    :host { all: initial !important; position: fixed !important; pointer-events: none !important;
            z-index: 2147483647 !important; max-width: min(340px, calc(100vw - 24px)) !important; }
    :host([data-corner~=bottom]) { bottom: 12px !important; } :host([data-corner~=top]) { top: 12px !important; }
    :host([data-corner~=left]) { left: 12px !important; } :host([data-corner~=right]) { right: 12px !important; }
    div { display: flex; border: 1px solid #0002; border-radius: 16px; background: #fffffff2; color: #1c1c1f;
          box-shadow: 0 1px 6px #0003; font: 12px/18px system-ui, sans-serif; cursor: pointer; pointer-events: auto; }
    button { all: unset; flex: none; width: 30px; height: 30px; display: grid; place-items: center; }
    button:focus-visible { outline: 2px solid #4c8bf5; border-radius: 50%; }
    i { width: 12px; height: 12px; border-radius: 50%; background: #8a8f98; forced-color-adjust: none; }
    .green i { background: #1f9d55; } .amber i { background: #e08a00; } .red i { background: #d33b3b; }
    span { padding: 6px 12px 6px 0; overflow-wrap: anywhere; } a { color: inherit; } b:empty { display: none; }
    b { padding: 6px 12px 6px 0; font-weight: 400; white-space: nowrap; opacity: 0.7; }
    .collapsed span { position: absolute; width: 1px; height: 1px; padding: 0; overflow: hidden;
                      clip-path: inset(50%); }
    @media (prefers-color-scheme: dark) { div { background: #1f2024f2; color: #ececf1; border-color: #fff3; } }
    @media print { div { display: none; } }`;

  const badge = (() => {
    const tags = ["lmarena-proxy-badge", "div", "button", "i", "span", "b", "a"];
    const [host, box, button, dot, text, running, link] = tags.map((tag) => document.createElement(tag));
    host.lang = language; // chooses the glyphs, too
    host.dataset.corner = CORNERS[0];
    // The count stands outside: it would be read out all the time.
    text.setAttribute("role", "status");
    text.setAttribute("aria-live", "polite");
    button.setAttribute("aria-label", "lmarena_proxy");
    link.textContent = INSTALL_URL;
    Object.assign(link, { href: INSTALL_URL, target: "_blank", rel: "noopener noreferrer" });
    button.append(dot);
    box.append(button, text, running);
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(BADGE_STYLE);
    const root = host.attachShadow({ mode: "closed" });
    root.adoptedStyleSheets = [sheet];
    root.append(box);
    let prefersDot = stored("localStorage", "lmarena_proxy.badge") === "collapsed";
    let isFolded = prefersDot;
    /** @type {[string, number]} */
    let shown = ["", 0];

    /** @param {boolean} folded */
    const fold = (folded) => {
      const count = shown[1];
      isFolded = folded;
      box.className = `${box.dataset.colour} ${folded ? "collapsed" : ""}`;
      button.setAttribute("aria-expanded", String(!folded));
      const unit = folded ? "" : language === "en" ? " running" : " 个进行中";
      running.textContent = count === 0 ? "" : `${count}${unit}`;
    };

    /** Whether the badge, as it stands, lies over something to click or to write in. */
    const coversControls = () => {
      const { left, right, top, bottom } = box.getBoundingClientRect();
      for (let y = top; ; y = Math.min(y + PROBE_PX, bottom)) {
        for (let x = left; ; x = Math.min(x + PROBE_PX, right)) {
          const below = document.elementsFromPoint(x, y).find((element) => element !== host);
          if (below?.closest(CONTROLS)) return true;
          if (x >= right) break;
        }
        if (y >= bottom) return false;
      }
    };

    /** Finds a free corner, the present one first. @returns {boolean} whether there is one */
    const settle = () => {
      const present = host.dataset.corner;
      for (const corner of [present, ...CORNERS]) {
        if (host.dataset.corner !== corner) host.dataset.corner = corner; // the page may observe its attributes
        if (!coversControls()) return true;
      }
      host.dataset.corner = present;
      return false;
    };

    /** Not under the person's hands: what they are about to press stays where it is. */
    const place = () => {
      if (document.hidden || !host.isConnected) return;
      if (host.matches(":hover") || root.querySelector(":focus-visible")) return;
      fold(wantsDot());
      if (settle() || isFolded) return;
      fold(true);
      settle();
    };

    /** Whether the person has folded it while it asked for what it asks for now. */
    let isHeard = false;
    const wantsDot = () => prefersDot && (isHeard || !CALLING.includes(shown[0]));

    /** @param {string} status @param {number} count of running exchanges */
    const show = (status, count) => {
      const isNew = status !== shown[0];
      shown = [status, count];
      if (isNew) {
        const [colour, english, translated] = TEXTS[status];
        isHeard = false;
        box.dataset.colour = colour;
        text.textContent = `lmarena_proxy: ${language === "en" ? english : translated}`;
        if (["reinstall", "outdated"].includes(status)) text.append(link);
        button.title = text.textContent;
        host.dataset.status = status;
      }
      fold(isNew ? wantsDot() : isFolded);
      if (isNew) place();
    };
    listen(box, "click", (/** @type {Event} */ event) => {
      if (event.target === link) return;
      prefersDot = isHeard = !isFolded;
      stored("localStorage", "lmarena_proxy.badge", prefersDot ? "collapsed" : "open");
      fold(prefersDot);
    });
    listen(window, "resize", place);
    return {
      /** @param {string} status @param {number} count */
      update(status, count) {
        if (status !== shown[0] || count !== shown[1]) show(status, count);
        // A page that renders itself anew may have dropped it.
        if (document.body && !host.isConnected) document.documentElement.append(host);
      },
      place,
    };
  })();

  /** What the badge is to say, and how many exchanges run. @returns {[string, number]} */
  const outlook = () => {
    const { link, role, trouble, due, state } = tab;
    if (role === "stopped") return ["reinstall", 0];
    if (role === "waiting") return [state === "verification" ? state : "standing_by", 0];
    const ready = due ?? (link?.outdated ? "outdated" : "ready");
    if (link?.welcomed) return [state === "ready" ? ready : state, link.running];
    // The check's own page may forbid the connection: what is due there is the check.
    return [state === "verification" ? state : (trouble ?? "connecting"), 0];
  };

  const render = () => {
    try {
      badge.update(...outlook());
    } catch {
      // a page that has broken what the badge is drawn with: the relay goes on
    }
  };

  // ==== Readiness ====================================================================================================

  /** @returns {string | null} the auth cookie's value, put together from its parts where it was split */
  const authCookie = () => {
    const pairs = readCookies(document).split("; ").map((/** @type {string} */ pair) => pair.split(/=(.*)/s, 2));
    /** @type {Map<string, string>} */
    const cookies = new Map(pairs);
    let value = cookies.get(tab.authCookie) ?? "";
    if (value !== "") return value;
    for (let part = 0, more; (more = cookies.get(`${tab.authCookie}.${part}`)); part += 1) value += more;
    return value || null;
  };

  /** @param {string} value `base64-` and base64 or base64url of JSON, or JSON, either one perhaps URL-encoded
   * @returns {string | null} the account's user id */
  const userIdIn = (value) => {
    try {
      let text = value.includes("%") ? decodeURIComponent(value) : value;
      if (text.startsWith("base64-")) {
        const binary = atob(text.slice("base64-".length).replace(/-/g, "+").replace(/_/g, "/"));
        text = decode(new TextDecoder(), Uint8Array.from(binary, (letter) => letter.charCodeAt(0)));
      }
      const id = parse(text)?.user?.id;
      return typeof id === "string" && id !== "" ? id : null;
    } catch {
      return null; // not an error: the person is signed out, or the site has changed the cookie
    }
  };

  const userIdNow = () => userIdIn(authCookie() ?? "");

  /** What the program knows the account by: the id itself stays in the browser. @param {string | null} userId */
  const accountOf = async (userId) => {
    if (userId === null) return null;
    const hash = new Uint8Array(await digest("SHA-256", new TextEncoder().encode(userId)));
    return Array.from(hash, (byte) => byte.toString(16).padStart(2, "0")).join("");
  };

  /** The window as the page's own scripts see it: Firefox's name for it, where this script is kept apart. */
  const pageWindow = () => /** @type {any} */ (window).wrappedJSObject ?? window;

  /** @param {string | null} userId @returns {[PageState, string]} */
  const pageState = (userId) => {
    const isCheck = document.title === CHECK_TITLE || "_cf_chl_opt" in pageWindow();
    if (isCheck) return ["verification", "a human check is due"];
    if (document.readyState === "loading") return ["loading", "the page is loading"];
    if (userId !== null) return ["ready", ""];
    return ["sign_in", `the cookie ${tab.authCookie} ${authCookie() === null ? "is missing" : "cannot be read"}`];
  };

  let looks = 0;

  /** Looks at the page again and tells the program what has changed. */
  const look = async () => {
    const turn = ++looks;
    const userId = userIdNow();
    const [state, detail] = pageState(userId);
    const account = await accountOf(userId);
    if (turn !== looks) return; // a later look has begun meanwhile, and knows better
    if (state !== "ready" || tab.state !== "sign_in") tab.signedInAt = 0;
    else {
      // The site loads its page anew when one has signed in: what was sent before that would be broken off.
      tab.signedInAt ||= now();
      if (now() - tab.signedInAt < SIGNED_IN_MS) return;
    }
    if (state !== tab.state || account !== tab.account) {
      assign(tab, { state, account, due: null });
      if (tab.link) say(tab.link, { type: "state", state, account, detail });
    }
    offerToLead();
    render();
  };

  // ==== Model list ===================================================================================================

  /** @param {string} text @param {number} start of a bracket or quote @returns {number} just behind its end, or -1 */
  const closing = (text, start) => {
    let [depth, inString] = [0, false];
    for (let at = start; at < text.length; at += 1) {
      const letter = text[at];
      if (inString && letter === "\\") at += 1;
      else if (letter === '"') inString = !inString;
      else if (!inString && (letter === "[" || letter === "{")) depth += 1;
      else if (!inString && (letter === "]" || letter === "}")) depth -= 1;
      if (depth === 0 && !inString) return at + 1;
    }
    return -1;
  };

  /** @param {string} text @param {RegExp} before (global) what stands before the JSON value @returns {any[]} */
  const valuesAfter = (text, before) => {
    const values = [];
    for (const match of text.matchAll(before)) {
      const start = match.index + match[0].length;
      try {
        values.push(parse(text.slice(start, closing(text, start))));
      } catch {
        // cut off, or not JSON: the next place may be
      }
    }
    return values;
  };

  /** The page's models. They stand as JSON in an inline script, or inside the strings that make up the page's data
   * stream (`self.__next_f.push([1,"..."])`), cut anywhere between two of them. */
  const pageModels = () => {
    const scripts = Array.from(document.scripts, (script) => (script.src ? "" : script.textContent ?? ""));
    const stream = scripts.flatMap((text) => valuesAfter(text, /__next_f\.push\(\[1,\s*(?=")/g)).join("");
    for (const text of [stream, ...scripts]) {
      for (const list of valuesAfter(text, /\binitialModels"?\s*:\s*(?=\[)/g)) {
        const models = list.filter(
          (/** @type {any} */ model) => typeof model?.id === "string" && typeof model?.publicName === "string",
        );
        if (models.length > 0) return models;
      }
    }
    return [];
  };

  /** @type {any[]} */
  let models = [];

  // ==== Link: what goes to the program ===============================================================================

  /** The one exit. @param {Link} link @param {string | Uint8Array} data */
  const transmit = (link, data) => {
    if (socketState(link.socket) === OPEN) socketSend(link.socket, data);
  };

  /** @param {Link} link @param {{type: string, [field: string]: unknown}} message */
  const say = (link, message) => transmit(link, stringify(bare(message)));

  /** @param {Uint8Array} frame @param {number} at @param {number} value, big-endian */
  const putUint32 = (frame, at, value) => {
    for (let byte = 0; byte < 4; byte += 1) frame[at + byte] = value >>> (24 - 8 * byte);
  };

  /** Sends the queued bytes in one frame, then the ends of the exchanges they belong to. @param {Link} link */
  const flush = (link) => {
    const { records, outcomes } = link;
    link.outcomes = [];
    if (records.length > 0) {
      const frame = new Uint8Array(link.recordBytes);
      for (let record = 0, at = 0; record < records.length; record += 1) {
        const { id, bytes } = records[record];
        putUint32(frame, at, id);
        putUint32(frame, at + 4, bytesIn(bytes));
        copyBytes(frame, bytes, at + HEAD_BYTES);
        at += HEAD_BYTES + bytesIn(bytes);
      }
      assign(link, { records: [], recordBytes: 0 });
      transmit(link, frame);
    }
    for (let outcome = 0; outcome < outcomes.length; outcome += 1) say(link, outcomes[outcome]);
  };

  /** Everything that arrives in one turn of the event loop goes out together at its end. @param {Link} link */
  const flushSoon = (link) => {
    if (link.flushDue) return;
    link.flushDue = true;
    nextTurn(() => {
      link.flushDue = false;
      flush(link);
    });
  };

  /** @param {Link} link @param {number} id @param {Uint8Array} chunk */
  const queueBytes = (link, id, chunk) => {
    const most = FRAME_BYTES - HEAD_BYTES;
    for (let start = 0, rest; (rest = bytesIn(chunk) - start) > 0; start += most) {
      const length = rest < most ? rest : most;
      const bytes = new Uint8Array(bufferOf(chunk), offsetOf(chunk) + start, length);
      if (link.recordBytes + HEAD_BYTES + length > FRAME_BYTES) flush(link);
      push(link.records, { id, bytes });
      link.recordBytes += HEAD_BYTES + length;
    }
    flushSoon(link);
  };

  /** @param {Link} link @param {Outcome} outcome */
  const queueOutcome = (link, outcome) => {
    push(link.outcomes, outcome);
    flushSoon(link);
  };

  /** Waits while the program is behind. A hidden tab's timers set by timers fire once a minute: hence the turn.
   * @param {Link} link @param {AbortSignal} signal */
  const roomToSend = async (link, signal) => {
    while (bufferedAmount(link.socket) > UNSENT_BYTES && !isAborted(signal)) {
      await new Promise((resolve) => setTimeout(() => nextTurn(() => resolve(null)), BACKPRESSURE_POLL_MS));
    }
  };

  /** @param {Link} link */
  const sendModels = (link) => say(link, { type: "models", models });

  // ==== Relay ========================================================================================================

  /** @type {RequestInit} A redirect may lead anywhere: it is not followed. */
  const FETCH_OPTIONS = { credentials: "same-origin", redirect: "manual", cache: "no-store" };
  const RELAYED_HEADERS = ["content-type", "retry-after", "cf-mitigated"];

  /** @param {any} message a `fetch` @returns {string | null} why it is not relayed */
  const refusal = ({ method, path, body }) => {
    if (method !== "POST" && method !== "PUT") return `method ${method} is not relayed, only POST and PUT`;
    if (typeof body !== "string") return "the body must be text";
    const isRelayed = typeof path === "string" && execute(RELAYED_PATH, path) !== null;
    // A path that normalizing changes (a dot segment, say) is not the path it looks like.
    if (isRelayed && href(new URL(path, location.origin)) === location.origin + path) return null;
    return `path ${path} is not relayed`;
  };

  /** @param {Headers} headers @returns {Record<string, string>} those that the program is told */
  const toldHeaders = (headers) => {
    /** @type {Record<string, string>} */
    const told = bare({});
    for (let at = 0; at < RELAYED_HEADERS.length; at += 1) {
      const value = getHeader(headers, RELAYED_HEADERS[at]);
      if (value !== null) told[RELAYED_HEADERS[at]] = value;
    }
    return told;
  };

  /** The badge says what the program takes from an answer: that the check, or a sign-in, is due although the page
   * looks well. @param {number} status @param {Record<string, string>} headers */
  const noteDue = (status, headers) => {
    const isPage = execute(/^text\/html/i, headers["content-type"] ?? "") !== null;
    const isCheck = isPage && (status === 403 || status === 503);
    if (isCheck || headers["cf-mitigated"] === "challenge") tab.due = "check_due";
    else if (status === 401) tab.due = "sign_in_stale";
    else if (status === 200) tab.due = null;
  };

  /** Passes a response on, up to its last byte. @param {Link} link @param {number} id @param {Response} response
   * @param {AbortSignal} signal @returns {Promise<Outcome>} */
  const passOn = async (link, id, response, signal) => {
    const status = responseStatus(response);
    const told = toldHeaders(responseHeaders(response));
    say(link, { type: "response", id, status, headers: told });
    noteDue(status, told);
    const stream = responseBody(response);
    if (stream !== null) {
      const reader = streamReader(stream);
      for (;;) {
        await roomToSend(link, signal);
        const { done, value } = await readStream(reader);
        if (done) break;
        queueBytes(link, id, value);
      }
    }
    return { type: "end", id };
  };

  /** One exchange with the site. @param {Link} link @param {any} message a `fetch`
   * @param {AbortController} controller @returns {Promise<Outcome>} */
  const exchange = async (link, { id, method, path, body }, controller) => {
    const headers = bare({ "Content-Type": "text/plain;charset=UTF-8" });
    const signal = signalOf(controller);
    const url = location.origin + path; // not the path alone: the page may have a <base> elsewhere
    const response = await fetch(url, bare({ ...FETCH_OPTIONS, method, body, headers, signal }));
    if (responseType(response) === "opaqueredirect") {
      abort(controller);
      return { type: "error", id, reason: "refused", message: "redirected" };
    }
    return passOn(link, id, response, signal);
  };

  /** The command for what runs until an outcome, and can be aborted.
   * @param {(message: any) => string | null} refusal
   * @param {(link: Link, message: any, controller: AbortController) => Promise<Outcome>} run
   * @returns {(link: Link, message: any) => Promise<void>} */
  const relayed = (refusal, run) => async (link, message) => {
    const { id } = message;
    if (!isInteger(id) || id < 0 || id > 0xffffffff) return; // there is no way to answer this
    const reason = id in link.exchanges ? `id ${id} is in use` : refusal(message);
    if (reason !== null) return queueOutcome(link, { type: "error", id, reason: "refused", message: reason });
    const controller = new AbortController();
    link.exchanges[id] = controller;
    link.running += 1;
    render();
    try {
      queueOutcome(link, await run(link, message, controller));
    } catch (error) {
      const why = isAborted(signalOf(controller)) ? "aborted" : "network";
      queueOutcome(link, { type: "error", id, reason: why, message: `${error}` });
    } finally {
      delete link.exchanges[id];
      link.running -= 1;
      render();
    }
  };

  // ==== Uploads ======================================================================================================

  // An image that is too large to travel inside a message goes the way on which the page brings its own there: one
  // server action of the page gives an address to put the bytes at, another one the address under which the site then
  // has them. An action is called by an id that changes with every deployment of the site: none is known here in
  // advance. They are learned from the page's own calls and, once an upload is asked for, from the scripts that the
  // page has loaded, where each stands beside its name. As long as they are not known, uploads are not offered.

  const PUT_ACTION = "generateUploadUrl";
  const GET_ACTION = "getSignedUrl";
  const NO_STORAGE = "what the site gives is no https address";
  const IMAGE_TYPE = /^image\/[\w.+-]+$/;
  const ACTION_ID = /^[0-9a-f]{32,128}$/;
  const ACTION_IN_SCRIPT =
    /createServerReference\)?\(\s*["']([0-9a-f]{32,128})["'],[^"'()]{0,200}["'](generateUploadUrl|getSignedUrl)["']/g;

  /** By name. @type {Record<string, string>} */
  let actions = bare({});
  /** Whether the site has had a deployment since this page was loaded: its scripts name what there was before. */
  let hasAged = false;
  /** Scripts that name no action: what stands at an address stays. @type {Set<string>} */
  const barren = new Set();

  /** The end of an upload that brought no address: for a reason of the wire, or with an answer of the site. */
  class UploadEnded {
    /** @param {"not_offered" | "refused" | "network"} reason @param {string} message @param {Response} [response] */
    constructor(reason, message, response) {
      assign(this, { reason, message, response });
    }
  }

  const pageAddress = () => location.origin + location.pathname + location.search;

  /** @param {string} text @param {string} [base] @returns {URL | null} */
  const readAddress = (text, base) => {
    try {
      return new URL(text, base);
    } catch {
      return null;
    }
  };

  /** @param {string} text @returns {URL | null} where the site may have its storage */
  const storageAddress = (text) => {
    const url = readAddress(text);
    return url && (url.protocol === "https:" || url.origin === location.origin) ? url : null;
  };

  /** What an action gives. Its reply has a row for each part: `1:{"success":true,"data":{...}}`.
   * @param {string} text @param {string[]} fields
   * @returns {{data?: Record<string, string>, words?: string}} data with these fields, or how the site refuses */
  const readReply = (text, fields) => {
    for (const [, row] of text.matchAll(/^[0-9a-f]+:(\{.*)$/gm)) {
      try {
        const value = parse(row);
        const data = value.data ?? value;
        if (fields.every((field) => typeof data[field] === "string")) return { data };
        if (value.success === false) return { words: `${value.error || value.message || "without a word"}` };
      } catch {
        // not JSON: the next row may be
      }
    }
    return {};
  };

  const isLearned = () => PUT_ACTION in actions && GET_ACTION in actions;

  /** @param {string} address @param {string} script its text */
  const learnFromScript = (address, script) => {
    const named = Array.from(script.matchAll(ACTION_IN_SCRIPT));
    for (const [, id, name] of named) actions[name] ??= id;
    if (named.length === 0) barren.add(address);
  };

  const loadedScripts = () => [
    ...Array.from(document.scripts, (script) => script.src),
    ...performance.getEntriesByType("resource").map((entry) => entry.name).filter((name) => /\.js(\?|$)/.test(name)),
  ];

  /** The scripts of the page as the site has it now. @param {AbortSignal} signal */
  const presentScripts = async (signal) => {
    const headers = { Accept: "text/html" };
    const response = await fetch(pageAddress(), bare({ ...FETCH_OPTIONS, headers, signal }));
    const html = responseStatus(response) === 200 ? await responseText(response) : "";
    return Array.from(html.matchAll(/<script\b[^>]*\ssrc="([^"]+)"/g), ([, src]) => src.replaceAll("&amp;", "&"));
  };

  /** @type {RequestInit} The page has loaded them: the browser need not do it again. */
  const FROM_CACHE = { credentials: "same-origin", cache: "force-cache" };

  /** @param {string[]} addresses of scripts @param {AbortSignal} signal */
  const searchScripts = async (addresses, signal) => {
    const own = new Set();
    for (const address of addresses) {
      const url = readAddress(address, location.origin);
      if (url?.origin === location.origin && !barren.has(url.href)) own.add(url.href);
    }
    for (const address of Array.from(own).slice(0, SCRIPTS_SEARCHED)) {
      if (isLearned() || isAborted(signal)) return;
      try {
        const response = await fetch(address, bare({ ...FROM_CACHE, signal }));
        const size = Number(getHeader(responseHeaders(response), "content-length"));
        const isGood = responseStatus(response) === 200 && size <= SCRIPT_BYTES;
        if (isGood) learnFromScript(address, await responseText(response));
      } catch {
        // it cannot be had now
      }
    }
  };

  const search = async () => {
    const controller = new AbortController();
    const signal = signalOf(controller);
    const timer = setTimeout(() => abort(controller), LEARNING_MS);
    try {
      await searchScripts(hasAged ? await presentScripts(signal) : loadedScripts().filter(Boolean), signal);
    } catch {
      // what the page is made of cannot be read: nothing is learned
    }
    clearTimeout(timer);
  };

  let searching = Promise.resolve();

  /** One search at a time: what one upload has learned the next one need not look for. */
  const learn = () => {
    const before = searching;
    searching = (async () => {
      await before;
      if (!isLearned()) await search();
    })();
    return searching;
  };

  /** Calls one of the page's actions, as the page does; for an id that the site does not know any more it is learned
   * anew, once. @param {string} name @param {string[]} args @param {string[]} fields of the reply
   * @param {AbortSignal} signal @returns {Promise<Record<string, string>>} */
  const callAction = async (name, args, fields, signal) => {
    for (let attempt = 0, tried = ""; attempt < 2; attempt += 1) {
      if (!(name in actions)) await learn();
      const id = actions[name];
      if (id === undefined || id === tried) break;
      const type = "text/plain;charset=UTF-8";
      const headers = bare({ Accept: "text/x-component", "Content-Type": type, "Next-Action": id });
      const options = { ...FETCH_OPTIONS, method: "POST", headers, body: stringify(args), signal };
      const response = await fetch(pageAddress(), bare(options));
      if (responseType(response) === "opaqueredirect") throw new UploadEnded("refused", "redirected");
      const status = responseStatus(response);
      if (status !== 200 && status !== 404) throw new UploadEnded("refused", `status ${status}`, response);
      const { data, words } = status === 200 ? readReply(await responseText(response), fields) : {};
      if (data) return data;
      if (words) throw new UploadEnded("refused", words);
      tried = id;
      hasAged = true;
      if (actions[name] === id) actions = bare({}); // another upload may have learned them anew already
    }
    throw new UploadEnded("not_offered", "the page has no upload that this script knows");
  };

  /** @param {string} data in base64 */
  const bytesOf = (data) => {
    let text;
    try {
      text = decodeBase64(data);
    } catch {
      throw new UploadEnded("refused", "the data is not base64");
    }
    const bytes = new Uint8Array(text.length);
    for (let at = 0; at < text.length; at += 1) bytes[at] = codeAt(text, at);
    return bytes;
  };

  /** @param {any} message an `upload` @returns {string | null} why it is not carried out */
  const uploadRefusal = ({ name, content_type, data }) => {
    if (typeof name !== "string" || typeof data !== "string") return "name and data of an upload must be text";
    return execute(IMAGE_TYPE, `${content_type}`) === null ? `${content_type} is not uploaded, only images` : null;
  };

  /** @param {any} message an `upload` @param {AbortSignal} signal @returns {Promise<string>} its address at the site */
  const bring = async ({ name, content_type, data }, signal) => {
    const body = bytesOf(data);
    const place = await callAction(PUT_ACTION, [name, content_type], ["uploadUrl", "key"], signal);
    const target = storageAddress(place.uploadUrl);
    if (target === null) throw new UploadEnded("refused", NO_STORAGE);
    const headers = bare({ "Content-Type": content_type });
    /** @type {RequestInit} The address is signed: the storage needs, and gets, no cookie. */
    const options = { method: "PUT", body, headers, credentials: "omit", redirect: "error", signal };
    const status = responseStatus(await fetch(href(target), bare(options)));
    if (status < 200 || status > 299) throw new UploadEnded("network", `the site's storage answered ${status}`);
    const { url } = await callAction(GET_ACTION, [place.key], ["url"], signal);
    if (storageAddress(url) === null) throw new UploadEnded("refused", NO_STORAGE);
    return url;
  };

  /** @param {Link} link @param {any} message an `upload` @param {AbortController} controller
   * @returns {Promise<Outcome>} */
  const upload = async (link, message, controller) => {
    const { id } = message;
    const signal = signalOf(controller);
    try {
      return { type: "uploaded", id, url: await bring(message, signal) };
    } catch (error) {
      if (!(error instanceof UploadEnded) || isAborted(signal)) throw error;
      const { reason, message, response } = /** @type {any} */ (error);
      return response ? passOn(link, id, response, signal) : { type: "error", id, reason, message };
    }
  };

  /** The key that the page was last given for an upload by hand. @type {string | null} */
  let keyByHand = null;

  /** Whether this call of the page may be one of the two actions. Nothing is consumed.
   * @param {any[]} args of the page's fetch @returns {{id: string, given: string[]} | null} */
  const overhearAction = ([input, init]) => {
    const headers = init?.headers;
    const isObject = typeof headers === "object" && headers !== null;
    // Anything else could be read only once.
    if (!(headers instanceof Headers || (isObject && Object.getPrototypeOf(headers) === Object.prototype))) return null;
    const id = getHeader(new Headers(headers), "next-action");
    if (id === null || execute(ACTION_ID, id) === null) return null;
    const url = new URL(input instanceof Request ? input.url : input, document.baseURI);
    if (url.origin !== location.origin || typeof init.body !== "string") return null;
    const given = parse(init.body);
    const isKnown = Array.isArray(given) && (given.length === 1 || given.length === 2);
    return isKnown && given.every((value) => typeof value === "string") ? { id, given } : null;
  };

  /** Learns the ids from an upload by hand. @param {NonNullable<ReturnType<typeof overhearAction>>} action
   * @param {Promise<Response>} answered */
  const learnFromCall = async ({ id, given }, answered) => {
    try {
      const response = await answered; // this is heard before the page hears of it, so the body is still whole
      if (responseStatus(response) !== 200 || (given.length === 1 && given[0] !== keyByHand)) return;
      const text = await responseText(responseClone(response));
      if (given.length === 2) {
        const { data } = readReply(text, ["uploadUrl", "key"]);
        if (!data) return;
        keyByHand = data.key;
        actions[PUT_ACTION] = id;
      } else if (readReply(text, ["url"]).data) {
        actions[GET_ACTION] = id;
      }
    } catch {
      // the page has seen its own error; there is nothing to learn
    }
  };

  // ==== Captures: conversations opened by hand =======================================================================

  /** Waiting for a connection. @type {Capture[]} */
  let captures = [];

  const between = new BroadcastChannel(SHARED_NAME);

  /** @param {any} capture @returns {capture is Capture} */
  const isCapture = (capture) =>
    capture?.type === "captured" &&
    [capture.session_id, capture.message_id, capture.mode].every((field) => typeof field === "string");

  /** @param {Capture} capture */
  const captureKey = (capture) => `${capture.session_id} ${capture.message_id}`;

  /** Sends the waiting captures, through the tab that leads if this is another one. A leader without a connection does
   * not answer: it calls for them once it has been welcomed. */
  const deliverCaptures = () => {
    if (tab.link?.welcomed) {
      for (const capture of captures) say(tab.link, capture);
      captures = [];
    } else if (tab.role !== "leading" && captures.length > 0) {
      between.postMessage({ type: "captures", captures });
    }
  };

  /** @param {Capture} capture */
  const report = (capture) => {
    captures = [...captures, capture].slice(-CAPTURES_KEPT);
    deliverCaptures();
  };

  listen(between, "message", (/** @type {MessageEvent} */ event) => {
    const message = messageData(event);
    if (message?.type === "able") {
      giveWay();
    } else if (message?.type === "leading") {
      deliverCaptures();
    } else if (message?.type === "captures" && tab.link?.welcomed && Array.isArray(message.captures)) {
      const taken = message.captures.filter(isCapture);
      taken.forEach(report);
      between.postMessage({ type: "taken", keys: taken.map(captureKey) });
    } else if (message?.type === "taken" && tab.role !== "leading") {
      captures = captures.filter((capture) => !message.keys.includes(captureKey(capture)));
    }
  });

  // ==== Commands of the program ======================================================================================

  /** @type {Record<string, (link: Link, message: any) => unknown>} */
  const commands = bare({
    /** @param {Link} link @param {any} message */
    welcome(link, message) {
      link.welcomed = true;
      link.outdated = typeof message.version === "string" && message.version !== VERSION;
      tab.retries = 0;
      if (message.heartbeat_seconds > 0) link.beatMs = 1000 * message.heartbeat_seconds;
      if (typeof message.auth_cookie === "string" && message.auth_cookie) tab.authCookie = message.auth_cookie;
      if (models.length > 0) sendModels(link);
      deliverCaptures();
      between.postMessage({ type: "leading" });
      look();
    },
    fetch: relayed(refusal, exchange),
    upload: relayed(uploadRefusal, upload),
    /** @param {Link} link @param {any} message */
    abort(link, message) {
      if (message.id in link.exchanges) abort(link.exchanges[message.id]);
    },
    /** @param {Link} link @param {any} message */
    ping(link, message) {
      // By the program's clock: two pings that waited on the way arrive together.
      if (link.pingedAt > 0) link.beatMs = 1000 * (message.t - link.pingedAt);
      link.pingedAt = message.t;
      say(link, { type: "pong", t: message.t });
    },
    /** @param {Link} link */
    send_models(link) {
      const found = pageModels();
      if (found.length > 0) models = found; // a page shown later may have none: the old list still holds
      sendModels(link);
    },
    // Loading the page lets the site's own check run, in front of the person.
    reload() {
      const key = "lmarena_proxy.reloaded_at";
      const pastMs = Date.now() - Number(stored("sessionStorage", key) ?? 0);
      if (pastMs >= 0 && pastMs < RELOAD_PAUSE_MS) return; // below zero: the clock was set back
      stored("sessionStorage", key, String(Date.now()));
      location.reload();
    },
  });

  // ==== Connection ===================================================================================================

  const connect = () => {
    assign(tab, { retryTimer: 0, policyForbids: false });
    /** @type {WebSocket} */
    let socket;
    try {
      socket = new WebSocket(BRIDGE_URL);
    } catch {
      tab.trouble = "policy_forbids"; // a browser that takes ws:// from an https page for mixed content
      return retryLater();
    }
    const link = newLink(socket);
    let opened = false;
    tab.link = link;
    listen(socket, "open", () => {
      opened = true;
      tab.trouble = null;
      const { state, account } = tab;
      const hello = { protocol: PROTOCOL, script: VERSION, url: location.href, state, account, features: FEATURES };
      say(link, { type: "hello", ...hello });
      render();
    });
    listen(socket, "message", (/** @type {MessageEvent} */ event) => {
      if (link.over) return;
      link.heardAt = now();
      const data = messageData(event);
      const message = typeof data === "string" ? parse(data) : null;
      if (message?.type in commands) commands[message.type](link, message);
    });
    // Safari refuses ws:// from an https page with this alone: no close follows.
    listen(socket, "error", () =>
      setTimeout(() => {
        if (opened || link.over) return;
        tab.trouble = "policy_forbids";
        hangUp(link, 0);
      }, CLOSE_MS),
    );
    setTimeout(() => noticeQuestion(() => !link.over && socketState(socket) === CONNECTING), ASKING_MS);
    listen(socket, "close", (/** @type {CloseEvent} */ event) => {
      if (!opened && !link.over && tab.role === "leading") void diagnose(now() - link.heardAt > ASKING_MS);
      hangUp(link, closeCode(event));
    });
    render();
  };

  /** The end of a connection: told by the browser, or found by the silence. @param {Link} link @param {number} code */
  const hangUp = (link, code) => {
    if (link.over) return;
    link.over = true;
    for (const id in link.exchanges) abort(link.exchanges[id]);
    if (tab.link === link) tab.link = null;
    if (code === CLOSED_FOR_REINSTALL) {
      tab.role = "stopped";
      stepDown(); // a tab that has the new script already can take over
    } else if (tab.role === "leading" && tab.link === null) {
      retryLater();
    }
    render();
  };

  /** A path that has silently ceased to carry anything closes no connection: neither end is told. The program's pings
   * show that it is there. */
  const listenForSilence = () => {
    const { link } = tab;
    if (link === null || !(link.beatMs > 0)) return;
    const patienceMs = SILENT_BEATS * link.beatMs;
    if (now() - link.heardAt < (patienceMs < LEAST_PATIENCE_MS ? LEAST_PATIENCE_MS : patienceMs)) return;
    socketClose(link.socket);
    hangUp(link, 0);
  };

  const retryLater = () => {
    const delay = Math.min(FIRST_RETRY_MS * 2 ** tab.retries, LAST_RETRY_MS);
    tab.retries += 1;
    tab.retryTimer = setTimeout(connect, delay * (0.75 + Math.random() / 4));
  };

  /** Something has changed that may let the next try succeed: it is not waited for. */
  const retryNow = () => {
    if (tab.retryTimer === 0) return;
    clearTimeout(tab.retryTimer);
    connect();
  };

  /** The browser's word on connections from this page to this computer. The first name it knows decides; they changed
   * with its versions. @returns {Promise<PermissionStatus | null>} */
  const localNetworkPermission = async () => {
    for (const name of ["loopback-network", "local-network", "local-network-access"]) {
      try {
        return await navigator.permissions.query({ name: /** @type {PermissionName} */ (name) });
      } catch {
        // an unknown name
      }
    }
    return null;
  };

  /** A connection that the browser asks about stays as it is until the person has answered.
   * @param {() => boolean} isWaiting */
  const noticeQuestion = async (isWaiting) => {
    const permission = isWaiting() ? await localNetworkPermission() : null;
    if (permission?.state !== "prompt" || !isWaiting()) return;
    tab.trouble = "permission_prompt";
    render();
  };

  let diagnosing = false;
  /** One is enough: each query gives another. @type {PermissionStatus | null} */
  let watched = null;

  /** Finds out why the connection did not open. Neither the WebSocket nor the program can tell.
   * @param {boolean} hasAsked whether it took so long that the browser has asked the person */
  const diagnose = async (hasAsked) => {
    if (diagnosing) return;
    diagnosing = true;
    let permission = await localNetworkPermission();
    if (permission?.state === "prompt" && !hasAsked) {
      const askedAt = now();
      try {
        // This raises the browser's question where the WebSocket alone does not, and stays open until it is answered.
        const asked = fetch(new URL("/health", INSTALL_URL), { mode: "no-cors", credentials: "omit" });
        setTimeout(() => noticeQuestion(() => diagnosing), ASKING_MS);
        await asked;
        retryNow();
      } catch {
        permission = await localNetworkPermission();
        hasAsked = now() - askedAt > ASKING_MS;
      }
    }
    diagnosing = false;
    if (permission && !watched) {
      watched = permission;
      permission.onchange = retryNow;
    }
    tab.trouble = "not_running";
    if (permission?.state === "denied") tab.trouble = "permission_denied";
    if (permission?.state === "prompt" && hasAsked) tab.trouble = "permission_prompt"; // closed without an answer
    if (tab.policyForbids) tab.trouble = "policy_forbids";
    render();
  };

  listen(document, "securitypolicyviolation", (/** @type {SecurityPolicyViolationEvent} */ event) => {
    if (event.disposition !== "enforce" || event.effectiveDirective !== "connect-src") return;
    if (!event.blockedURI.startsWith(new URL(BRIDGE_URL).origin)) return;
    assign(tab, { policyForbids: true, trouble: "policy_forbids" });
    render();
  });

  // ==== Leading tab ==================================================================================================

  // One tab of a browser profile holds the lock and connects; the others stand by. The browser hands it on when that
  // tab closes, reloads or crashes. A tab that holds a lock is also never frozen, however long it stays hidden.

  /** Ends this tab's turn, or its place in the queue. */
  let stepDown = () => {};

  const lead = () => {
    const leaving = new AbortController();
    const left = new Promise((resolve) => leaving.signal.addEventListener("abort", resolve));
    stepDown = () => {
      leaving.abort();
      clearTimeout(tab.retryTimer);
      tab.retryTimer = 0;
      if (tab.role === "leading") tab.role = "waiting";
      const { link } = tab;
      if (link === null) return;
      socketClose(link.socket);
      hangUp(link, 0); // its close event may come much later
    };
    const begin = () => {
      tab.role = "leading";
      connect();
      return left;
    };
    if (!navigator.locks) begin();
    else navigator.locks.request(SHARED_NAME, { mode: "exclusive", signal: leaving.signal }, begin).catch(() => {});
  };

  // The lock goes by who came first. So a tab that could do the work says so while it waits, and a leader that cannot
  // (its page is at the check still, which the person has passed in the other one) queues again behind it. It goes to
  // and fro only with the pages themselves: who gives way is not able, and who is not able does not offer.

  /** Whether this page can do the program's work, as far as this tab knows. */
  const isAble = () => tab.state === "ready" && tab.trouble !== "policy_forbids";

  const offerToLead = () => {
    if (tab.role === "waiting" && isAble()) between.postMessage({ type: "able" });
  };

  const giveWay = () => {
    if (tab.role !== "leading" || isAble() || tab.link?.running) return; // what runs is not cut off
    stepDown();
    lead();
    render();
  };

  // ==== Capture ======================================================================================================

  /** What a session opened or continued in this tab is known by. @type {Map<string, {mode: string, model: string}>} */
  const seen = new Map();

  /** Which of two models has spoken, by the lines' first letter, and how its answer ended: the kinds `d` and `3`.
   * Chunks end anywhere, also inside a character. @param {ReadableStream} stream */
  const hearAnswer = async (stream) => {
    const side = () => ({ spoke: false, ended: false, failed: false });
    const answer = { a: side(), b: side() };
    const hear = (/** @type {string} */ line) => {
      if (!/^[ab]\w:/.test(line)) return;
      const speaker = line[0] === "a" ? answer.a : answer.b;
      speaker.spoke = true;
      if (line[1] === "3") speaker.failed = true;
      else if (line[1] === "d") speaker.ended = parse(line.slice(3)).finishReason !== "error";
    };
    const reader = streamReader(stream);
    const decoder = new TextDecoder();
    let rest = "";
    for (;;) {
      const { done, value } = await readStream(reader);
      rest += decode(decoder, value, { stream: !done });
      if (done) break;
      const lines = rest.split("\n");
      rest = /** @type {string} */ (lines.pop());
      lines.forEach(hear);
    }
    hear(rest);
    return answer;
  };

  /** Whether this call of the page opens or continues a conversation. Nothing is consumed.
   * @param {any[]} args of the page's fetch
   * @returns {{path: string[], body: () => Promise<string>, userId: string | null} | null} */
  const overhear = ([input, init]) => {
    const request = input instanceof Request ? input : null;
    if (request === null && typeof input !== "string" && !(input instanceof URL)) return null;
    const url = new URL(request ? request.url : input, document.baseURI);
    const path = url.origin === location.origin ? CAPTURED_PATH.exec(url.pathname) : null;
    const method = String(init?.method ?? request?.method).toUpperCase();
    if (path === null || method !== (path[2] ? "PUT" : "POST")) return null;
    if (init?.body instanceof ReadableStream) return null;
    const copy = new Response(init?.body ?? requestClone(request).body);
    return { path, body: () => responseText(copy), userId: userIdNow() };
  };

  /** Follows the answer in the background, and reports the conversation once it has ended well.
   * @param {NonNullable<ReturnType<typeof overhear>>} overheard @param {Promise<Response>} answered */
  const follow = async ({ path, body, userId }, answered) => {
    try {
      const response = await answered; // this is heard before the page hears of it, so the body is still whole
      if (response.status !== 200 || responseBody(response) === null) return;
      const copy = responseBody(responseClone(response));
      const answering = hearAnswer(copy).catch(() => null); // read at once: a page that stops does not wait for this
      const sent = parse(await body());
      const session = path[1] ?? path[2] ?? sent.id;
      const message = path[3] ?? sent.modelAMessageId;
      const known = seen.get(session);
      const model = sent.modelAId ?? sent.modelId ?? known?.model ?? null;
      if (sent.mode) seen.set(session, { mode: sent.mode, model });
      const answer = await answering;
      if (!answer) return;
      const second = (/** @type {any} */ m) => m.role === "assistant" && m.participantPosition === "b";
      const pair = sent.modelBId || sent.modelBMessageId || answer.b.spoke || sent.messages?.some(second);
      const mode = sent.mode ?? known?.mode ?? (pair ? "side-by-side" : "direct");
      const account = userId === null ? tab.account : await accountOf(userId);
      const whose = { type: "captured", session_id: session, mode, account };
      const sides = { a: { message_id: message, model_id: model }, b: { message_id: message, model_id: model } };
      // A retry is of one side; what opens or continues a conversation of two brings both.
      if (!path[3]) sides.b = { message_id: sent.modelBMessageId, model_id: sent.modelBId ?? null };
      for (const position of /** @type {("a"|"b")[]} */ (path[3] && answer.a.spoke ? ["a"] : ["a", "b"])) {
        const { ended, failed } = answer[position];
        const capture = { ...whose, ...sides[position], ...(mode === "direct" ? {} : { position }) };
        if (ended && !failed && isCapture(capture)) report(capture);
      }
    } catch {
      // the page has seen its own error; there is nothing to capture
    }
  };

  // The page gets the native promise and the native response. Error trackers compare `fetch.toString()` with the
  // native text, and reach for an iframe's fetch where it differs: a bare proxy's text lacks the name.
  const nativeText = Function.prototype.toString.bind(pageFetch);
  const heardFetch = new Proxy(pageFetch, {
    apply(target, self, args) {
      let overheard = null;
      let action = null;
      try {
        overheard = overhear(args);
        action = overhearAction(args);
      } catch {
        // an odd argument: the native function judges it
      }
      const answered = call(target, self, args);
      if (overheard !== null) void follow(overheard, answered);
      if (action !== null) void learnFromCall(action, answered);
      return answered;
    },
    get: (target, name) => (name === "toString" ? nativeText : Reflect.get(target, name)),
  });
  try {
    window.fetch = heardFetch;
  } catch {
    // Kept apart from the page: its calls are not heard, and all else works.
    console.info("lmarena_proxy: conversations opened by hand are not noticed: this script may not touch the page");
  }

  // ==== Start ========================================================================================================

  const lookForModels = () => {
    if (models.length > 0) return;
    models = pageModels();
    if (models.length > 0 && tab.link?.welcomed) sendModels(tab.link);
  };

  listen(document, "DOMContentLoaded", () => {
    // The page may set its title, and drop the badge, at any time.
    const observer = new MutationObserver(look);
    if (document.head) observer.observe(document.head, { childList: true, subtree: true, characterData: true });
    observer.observe(document.documentElement, { childList: true });
    look();
    lookForModels();
  });
  listen(document, "readystatechange", look);
  listen(document, "visibilitychange", () => {
    look();
    if (!document.hidden) retryNow();
  });
  listen(window, "load", lookForModels);
  listen(window, "online", retryNow);
  // A page kept for the back button holds neither the lock nor the connection.
  listen(window, "pagehide", () => stepDown());
  listen(window, "pageshow", (/** @type {PageTransitionEvent} */ event) => event.persisted && lead());
  if ("cookieStore" in window) listen(window.cookieStore, "change", look);
  window.setInterval(() => {
    listenForSilence();
    void look();
    badge.place(); // the site's controls come and go
  }, LOOK_MS);

  look();
  lead();
})();
