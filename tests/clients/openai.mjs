// The openai package, as programs use it: what it makes of the proxy's answers. See perform.mjs.

import { File } from "node:buffer";

import OpenAI, { toFile } from "openai";

import { perform, picture } from "./perform.mjs";

globalThis.File ??= File; // node 18, which Debian 12 brings, has it in its module only

const connect = (url) => new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", timeout: 60_000 });

async function whole(client, { body }) {
  const { data, response } = await client.chat.completions.create(body).withResponse();
  return { ...data, ignored: response.headers.get("x-ignored-parameters") };
}

// Reads a stream. `leave_at`: what to do once there is text: abort the stream's `controller`, abort the
// `signal` that was given, or `break` out of the loop.
async function stream(client, { body, leave_at: leaveAt }) {
  const ours = new AbortController();
  const chunks = await client.chat.completions.create({ ...body, stream: true }, { signal: ours.signal });
  const seen = { choices: [], usages: [], error: null };
  try {
    for await (const chunk of chunks) {
      if (chunk.usage) seen.usages.push(chunk.usage);
      for (const { index, delta, finish_reason: finishReason } of chunk.choices) {
        const choice = (seen.choices[index] ??= { text: "", reasoning: "", finish_reasons: [] });
        choice.text += delta.content ?? "";
        choice.reasoning += delta.reasoning_content ?? "";
        if (finishReason) choice.finish_reasons.push(finishReason);
      }
      if (!leaveAt || !seen.choices[0]?.text) continue;
      if (leaveAt === "break") break;
      (leaveAt === "signal" ? ours : chunks.controller).abort();
    }
  } catch (error) {
    seen.error = describe(error);
  }
  return seen;
}

// The helper which puts the streamed answer together, and which is stricter about how it ends.
async function assembled(client, { body }) {
  return await client.chat.completions.stream(body).finalChatCompletion();
}

async function models(client) {
  const listed = [];
  for await (const model of client.models.list()) listed.push(model);
  return listed;
}

const model = (client, { id }) => client.models.retrieve(id);

const named = (bytes, place) => toFile(Buffer.from(bytes, "base64"), `${place}.png`, { type: "image/png" });

// What an images call brought; it is given before it is awaited.
async function made(call) {
  const { data: answer, response } = await call.withResponse();
  return {
    created: answer.created,
    urls: answer.data.map((image) => image.url ?? null),
    pictures: answer.data.map((image) => (image.b64_json ? picture(image.b64_json) : null)),
    ignored: response.headers.get("x-ignored-parameters"),
  };
}

const generate = (client, { body }) => made(client.images.generate(body));

// `images`: base64; one alone goes as `image`, a list of them as `image[]`.
async function edit(client, { body, images, mask }) {
  const files = Array.isArray(images) ? await Promise.all(images.map(named)) : await named(images, 0);
  const more = mask ? { mask: await named(mask, "mask") } : {};
  return await made(client.images.edit({ ...body, ...more, image: files }));
}

function describe(error) {
  return {
    name: error.constructor.name,
    message: error.message,
    status: error.status ?? null,
    code: error.code ?? null,
    param: error.param ?? null,
    type: error.type ?? null,
    request_id: error.requestID ?? null,
    should_retry: error.headers?.get("x-should-retry") ?? null,
  };
}

await perform(connect, { whole, stream, assembled, models, model, generate, edit }, describe);
