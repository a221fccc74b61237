// @ts-check
/** What one copies into the usual clients. Names in it are the model's and the address; nothing is fetched. */

import { shellQuote } from "./shared-b.js";

/**
 * @typedef {{base: string, model: string, needsKey: boolean}} Connection
 * @typedef {{id: string, name: string, language: string, steps?: boolean, code: (connection: Connection) => string}} Client
 */

const KEY_VARIABLE = "LMARENA_PROXY_API_KEY";
const text = JSON.stringify; // its notation of a string is also that of Python, JavaScript and YAML

/** @param {Connection} connection a key in Python's, Node's and YAML's notation */
const pythonKey = ({ needsKey }) => (needsKey ? `os.environ["${KEY_VARIABLE}"]` : '"any"');
const nodeKey = (/** @type {Connection} */ { needsKey }) => (needsKey ? `process.env.${KEY_VARIABLE}` : '"any"');
const plainKey = (/** @type {Connection} */ { needsKey }) => (needsKey ? `<${KEY_VARIABLE}>` : "any");
/** @param {string} base the address as a container sees it */
const fromContainer = (base) => base.replace(/\/\/(127\.0\.0\.1|localhost|\[::1\])(?=[:/]|$)/, "//host.docker.internal");

/** @type {Client[]} */
export const CLIENTS = [
  {
    id: "curl", name: "curl", language: "sh",
    code: ({ base, model, needsKey }) => [
      `curl -N ${shellQuote(`${base}/chat/completions`)}`,
      ...(needsKey ? [`-H "Authorization: Bearer $${KEY_VARIABLE}"`] : []),
      "-H 'Content-Type: application/json'",
      `-d ${shellQuote(`{
    "model": ${text(model)},
    "messages": [{"role": "user", "content": "Hello"}],
    "stream": true
  }`)}`,
    ].join(" \\\n  "),
  },
  {
    id: "openai-python", name: "openai (Python)", language: "python",
    code: (connection) => `${connection.needsKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${text(connection.base)}, api_key=${pythonKey(connection)})
stream = client.chat.completions.create(
    model=${text(connection.model)},
    messages=[{"role": "user", "content": "Hello"}],
    stream=True,
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
`,
  },
  {
    id: "openai-node", name: "openai (Node)", language: "js",
    code: (connection) => `import OpenAI from "openai";

const client = new OpenAI({ baseURL: ${text(connection.base)}, apiKey: ${nodeKey(connection)} });
const stream = await client.chat.completions.create({
  model: ${text(connection.model)},
  messages: [{ role: "user", content: "Hello" }],
  stream: true,
});
for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
`,
  },
  {
    id: "langchain", name: "LangChain", language: "python",
    code: (connection) => `${connection.needsKey ? "import os\n\n" : ""}from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    model=${text(connection.model)},
    base_url=${text(connection.base)},
    api_key=${pythonKey(connection)},
)
for chunk in model.stream("Hello"):
    print(chunk.content, end="", flush=True)
`,
  },
  {
    id: "ai-sdk", name: "Vercel AI SDK", language: "js",
    code: (connection) => `import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { streamText } from "ai";

const arena = createOpenAICompatible({
  name: "arena",
  baseURL: ${text(connection.base)},
  apiKey: ${nodeKey(connection)},
});
const { textStream } = streamText({ model: arena(${text(connection.model)}), prompt: "Hello" });
for await (const piece of textStream) process.stdout.write(piece);
`,
  },
  {
    id: "open-webui", name: "Open WebUI", language: "sh",
    code: (connection) => `pip install open-webui
OPENAI_API_BASE_URL=${shellQuote(connection.base)} \\
OPENAI_API_KEY=${connection.needsKey ? `"$${KEY_VARIABLE}"` : "any"} \\
ENABLE_OLLAMA_API=false ENABLE_TAGS_GENERATION=false ENABLE_FOLLOW_UP_GENERATION=false \\
open-webui serve --port 3000
`,
  },
  {
    id: "sillytavern", name: "SillyTavern", language: "text", steps: true,
    code: (connection) => `API Connections
  API                     Chat Completion
  Chat Completion Source  Custom (OpenAI-compatible)
  Custom Endpoint         ${connection.base}
  Custom API Key          ${plainKey(connection)}
  Model                   ${connection.model}
`,
  },
  {
    id: "cherry-studio", name: "Cherry Studio", language: "text", steps: true,
    code: (connection) => `Settings → Model Provider → Add
  Provider Type  OpenAI
  API Key        ${plainKey(connection)}
  API Host       ${connection.base.replace(/\/v1$/, "")}
  Models         Manage → ${connection.model}
`,
  },
  {
    id: "lobechat", name: "LobeChat", language: "sh",
    code: (connection) => `docker run -d --name lobe-chat -p 3210:3210 \\
  --add-host=host.docker.internal:host-gateway \\
  -e OPENAI_PROXY_URL=${shellQuote(fromContainer(connection.base))} \\
  -e OPENAI_API_KEY=${connection.needsKey ? `"$${KEY_VARIABLE}"` : "any"} \\
  -e OPENAI_MODEL_LIST=${shellQuote(`-all,+${connection.model}`)} \\
  lobehub/lobe-chat
`,
  },
  {
    id: "continue", name: "Continue", language: "yaml",
    code: (connection) => `name: Arena
version: 1.0.0
schema: v1
models:
  - name: ${text(connection.model)}
    provider: openai
    model: ${text(connection.model)}
    apiBase: ${text(connection.base)}
    apiKey: ${text(plainKey(connection))}
    roles: [chat, edit, apply]
`,
  },
];
