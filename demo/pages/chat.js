// @ts-check
"use strict";
// The stand-in's chat page. It sends what the contract says that the site's own page sends by hand: the create call
// for a new chat, post-to-evaluation for a further message, and the retry call.

(() => {
  /** @typedef {{id: string, publicName: string, capabilities: {outputCapabilities: Record<string, unknown>}}} Model */
  /** @typedef {{session: string, message: string, user: string, text: string, mode: string, model: string}} Chat */

  const API = "/nextjs-api/stream";
  const element = (/** @type {string} */ id) => /** @type {any} */ (document.getElementById(id));

  /** @returns {Model[]} the list in this page's inline script, escaped inside a string or plain */
  function readModels() {
    const page = /** @type {any} */ (window);
    if (page.__arena_data) return page.__arena_data.initialModels;
    const row = (page.__next_f || []).map((/** @type {any} */ part) => part[1]).find((/** @type {any} */ text) => String(text).includes('"initialModels":'));
    return JSON.parse(row.slice(row.indexOf("{"))
      .replace(/\]\s*$/, "")).initialModels;
  }

  /** @returns {string} a UUID of version 7, as the site makes them */
  function uuid7() {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    const now = Date.now();
    for (let place = 0; place < 6; place++) bytes[place] = Math.floor(now / 2 ** (8 * (5 - place))) % 256;
    bytes[6] = (bytes[6] & 0x0f) | 0x70;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
    return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
  }

  /** @param {Model} model */
  function modalityOf(model) {
    const output = model.capabilities.outputCapabilities;
    return output.video ? "video" : output.image ? "image" : output.search ? "search" : "chat";
  }

  const models = readModels();
  /** @type {Chat | null} */
  let chat = null;

  /**
   * The two or three messages of a create or post call.
   * @param {Chat} next the chat as it will be
   * @param {string | null} second the other participant's message id, outside direct mode
   * @param {string | null} secondModel
   */
  function newMessages(next, second, secondModel) {
    const common = { experimental_attachments: [], evaluationSessionId: next.session, status: "pending", failureReason: null };
    const answer = (/** @type {string} */ id, /** @type {string} */ position, /** @type {string | null} */ modelId) =>
      ({ id, role: "assistant", content: "", parentMessageIds: [next.user], participantPosition: position, modelId, ...common });
    const named = next.mode === "battle" ? null : next.model;
    const messages = [
      { id: next.user, role: "user", content: next.text, parentMessageIds: [], participantPosition: "a", modelId: null, ...common },
      answer(next.message, "a", named),
    ];
    return second ? [...messages, answer(second, "b", secondModel)] : messages;
  }

  /** @param {string} text */
  function createCall(text) {
    const model = models[element("model").selectedIndex];
    const mode = element("mode").value;
    const next = { session: uuid7(), message: uuid7(), user: uuid7(), text, mode, model: model.id };
    const second = mode === "direct" ? null : uuid7();
    const secondModel = mode === "side-by-side" ? model.id : null;
    const body = {
      id: next.session, mode, userMessageId: next.user, modelAMessageId: next.message, modality: modalityOf(model),
      ...(mode === "battle" ? {} : { modelAId: model.id }),
      ...(secondModel ? { modelBId: secondModel } : {}),
      ...(second ? { modelBMessageId: second } : {}),
      messages: newMessages(next, second, secondModel),
    };
    return { method: "POST", path: `${API}/create-evaluation`, body, next };
  }

  /**
   * @param {Chat} current
   * @param {string} text
   */
  function furtherCall(current, text) {
    const next = { ...current, message: uuid7(), user: uuid7(), text };
    const second = current.mode === "direct" ? null : uuid7();
    const secondModel = current.mode === "side-by-side" ? current.model : null;
    const body = {
      id: next.session, userMessageId: next.user, modelAMessageId: next.message,
      ...(current.mode === "battle" ? {} : { modelAId: current.model }),
      ...(second ? { modelBMessageId: second } : {}),
      messages: newMessages(next, second, secondModel),
    };
    return { method: "POST", path: `${API}/post-to-evaluation/${next.session}`, body, next };
  }

  /** @param {Chat} current */
  function retryCall(current) {
    const model = models.find((entry) => entry.id === current.model);
    const now = new Date().toISOString();
    const message = {
      id: uuid7(), role: "user", content: current.text, experimental_attachments: [], parentMessageIds: [],
      participantPosition: "a", evaluationId: null, evaluationSessionId: current.session,
      status: model && modalityOf(model) === "image" ? "success" : "pending", failureReason: null, metadata: null,
      createdAt: now, updatedAt: now,
    };
    const path = `${API}/retry-evaluation-session-message/${current.session}/messages/${current.message}`;
    return { method: "PUT", path, body: { modelId: current.model, messages: [message] }, next: current };
  }

  /** @param {string} line of the answer, without its newline */
  function show(line) {
    const colon = line.indexOf(":");
    const kind = line.slice(1, colon);
    if (!"0g23".includes(kind) || colon < 0) return;
    const content = JSON.parse(line.slice(colon + 1));
    const text = typeof content === "string" ? content : content.map((/** @type {any} */ part) => part.image || part.url || "").join(" ");
    element("answer").textContent += (line[0] === "b" ? "\n[b] " : "") + text;
  }

  /** @param {Response} response */
  async function showAnswer(response) {
    if (!response.ok || !response.body) throw new Error(`${response.status} ${(await response.text()).slice(0, 300)}`);
    const reader = response.body.getReader();
    const decoder = new TextDecoder();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      rest += decoder.decode(value, { stream: !done });
      const lines = rest.split("\n");
      rest = /** @type {string} */ (lines.pop());
      lines.forEach(show);
      if (done) return;
    }
  }

  /** @param {{method: string, path: string, body: object, next: Chat}} call */
  async function run(call) {
    for (const id of ["send", "retry"]) element(id).disabled = true;
    element("answer").textContent = "";
    element("status").textContent = "running";
    try {
      const headers = { "Content-Type": "text/plain;charset=UTF-8" };
      await showAnswer(await fetch(call.path, { method: call.method, headers, body: JSON.stringify(call.body) }));
      chat = call.next;
      history.pushState(null, "", `/c/${chat.session}`);
      element("status").textContent = "done";
    } catch (error) {
      element("status").textContent = "failed";
      element("answer").textContent += String(error);
    }
    element("send").disabled = false;
    element("retry").disabled = chat === null;
  }

  /** @param {any} opened the conversation of this address, as the page brings it */
  function continueConversation(opened) {
    chat = {
      session: opened.session_id, message: opened.message_id, user: "", text: opened.user_text || " ",
      mode: opened.mode, model: opened.model_id,
    };
    element("model").value = opened.model_id;
    element("mode").value = opened.mode;
    element("retry").disabled = false;
  }

  for (const model of models) element("model").add(new Option(model.publicName, model.id));
  const wanted = new URLSearchParams(location.search).get("mode");
  if (wanted) element("mode").value = wanted;
  const opened = /** @type {any} */ (window).standInConversation;
  if (opened) continueConversation(opened);

  element("send").addEventListener("click", () => {
    const text = element("message").value || " ";
    run(chat ? furtherCall(chat, text) : createCall(text));
  });
  element("retry").addEventListener("click", () => chat && run(retryCall(chat)));
  element("new-chat").addEventListener("click", () => {
    chat = null;
    history.pushState(null, "", `/?mode=${element("mode").value}`);
    element("retry").disabled = true;
    element("answer").textContent = "";
    element("status").textContent = "none yet";
  });
  element("sign-out").addEventListener("click", async () => {
    await fetch("/nextjs-api/sign-out", { method: "POST" });
    location.assign("/");
  });
})();
