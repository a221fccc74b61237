// The Vercel AI SDK through its provider for OpenAI-compatible servers. See perform.mjs.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateImage, generateObject, generateText, jsonSchema, Output, streamText, tool } from "ai";

import { perform, picture } from "./perform.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false; // it would write them to standard output

const TIMEOUT_MILLISECONDS = 60_000;
const CITY = jsonSchema({ type: "object", properties: { city: { type: "string" } }, required: ["city"] });

const connect = (url) => (structured) =>
  createOpenAICompatible({
    name: "arena",
    baseURL: `${url}/v1`,
    apiKey: "any",
    includeUsage: true,
    supportsStructuredOutputs: structured,
  });

// The options of a call from their JSON. `tools`: offer one. `output`: ask for an object that way.
function options(provider, { model, tools, output, structured = false, ...rest }) {
  return {
    model: provider(structured)(model),
    ...(tools && { tools: { weather: tool({ description: "The weather", inputSchema: CITY }) } }),
    ...(output && { output: Output.object({ schema: CITY }) }),
    ...rest,
  };
}

async function text(provider, given) {
  const abortSignal = AbortSignal.timeout(TIMEOUT_MILLISECONDS);
  const result = await generateText({ ...options(provider, given), abortSignal });
  return {
    text: result.text,
    reasoning: result.reasoningText ?? "",
    finish_reason: result.finishReason,
    usage: result.usage,
    tool_calls: result.toolCalls.length,
    model: result.response.modelId,
    ignored: result.response.headers["x-ignored-parameters"] ?? null,
  };
}

// `leave`: abort once there is text.
async function stream(provider, { leave, ...given }) {
  const controller = new AbortController();
  const timeout = AbortSignal.timeout(TIMEOUT_MILLISECONDS);
  const result = streamText({
    ...options(provider, given),
    abortSignal: AbortSignal.any([controller.signal, timeout]),
    onError: () => {}, // errors are read from the stream's parts
  });
  const seen = { text: "", reasoning: "", parts: [], errors: [], finish_reason: null, usage: null };
  for await (const part of result.fullStream) {
    if (seen.parts.at(-1) !== part.type) seen.parts.push(part.type);
    if (part.type === "text-delta") seen.text += part.text;
    if (part.type === "reasoning-delta") seen.reasoning += part.text;
    if (part.type === "error") seen.errors.push(describe(part.error));
    if (part.type === "finish") [seen.finish_reason, seen.usage] = [part.finishReason, part.totalUsage];
    if (leave && seen.text) controller.abort();
  }
  return seen;
}

async function object(provider, given) {
  const { object } = await generateObject({ ...options(provider, given), schema: CITY });
  return { object };
}

// `images`: base64 pictures to be edited.
async function image(provider, { model, prompt, images, ...rest }) {
  const asked = images ? { text: prompt, images } : prompt;
  const result = await generateImage({ model: provider(false).imageModel(model), prompt: asked, ...rest });
  return {
    pictures: result.images.map((each) => picture(each.base64)),
    media_types: result.images.map((each) => each.mediaType),
  };
}

// An error of the SDK, or the error object of a stream as it came.
function describe(error) {
  const told = error.data?.error ?? error;
  return {
    name: error.name ?? null,
    message: error.message,
    status: error.statusCode ?? null,
    is_retryable: error.isRetryable ?? null,
    code: told.code ?? null,
    param: told.param ?? null,
    type: told.type ?? null,
  };
}

await perform(connect, { text, stream, object, image }, describe);
