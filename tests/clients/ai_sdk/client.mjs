// Vercel's AI SDK: text, stream, objects, a tools loop, completions, errors.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import {
  APICallError,
  generateObject,
  generateText,
  isStepCount,
  Output,
  streamObject,
  streamText,
  tool,
} from "ai";
import { z } from "zod";

globalThis.AI_SDK_LOG_WARNINGS = false; // that generateObject has a successor
const provider = createOpenAICompatible({
  name: "expertline",
  baseURL: `${process.env.EXPERTLINE_URL}/v1`,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const common = {
  model: provider.chatModel("nano"),
  prompt: "Write a Python function `read_file`.",
  maxRetries: 0,
  temperature: 0,
};
const short = { ...common, maxOutputTokens: 16 };
const enough = { ...common, maxOutputTokens: 200 };
const Lights = z.object({ red: z.boolean(), lamp: z.enum(["left", "right"]) });

async function text() {
  const whole = await generateText(short);
  assert.equal(whole.finishReason, "length");
  assert.equal(whole.usage.outputTokens, 16);
  assert.equal(whole.usage.totalTokens, whole.usage.inputTokens + 16);

  const stream = streamText(short);
  let said = "";
  for await (const piece of stream.textStream) said += piece;
  assert.equal(said, whole.text);
  assert.equal(await stream.finishReason, "length");
  assert.equal((await stream.usage).outputTokens, 16);
}

async function objects() {
  const { object } = await generateObject({ ...enough, schema: Lights });
  assert.deepEqual(Lights.parse(object), object);
  const { output } = await generateText({ ...enough, output: Output.object({ schema: Lights }) });
  assert.deepEqual(output, object);
  const stream = streamObject({ ...enough, schema: Lights });
  let last = null;
  for await (const partial of stream.partialObjectStream) last = partial;
  assert.deepEqual(last, object);
  assert.deepEqual(await stream.object, object);
}

async function tools() {
  const seen = [];
  const look = tool({
    description: "Looks at the light.",
    inputSchema: z.object({ closely: z.boolean() }),
    execute: async ({ closely }) => {
      seen.push(closely);
      return "it is red";
    },
  });
  // Of its own accord nano would call again and again until it runs out of tokens.
  const providerOptions = { expertline: { parallel_tool_calls: false } };
  const loop = { ...enough, providerOptions, tools: { look }, stopWhen: isStepCount(2) };
  // The first step must call, the second must not.
  const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : "required" });
  const whole = await generateText({ ...loop, prepareStep });
  assert.equal(whole.steps.length, 2);
  assert.equal(whole.steps[0].finishReason, "tool-calls");
  assert.equal(whole.steps[0].toolCalls.length, 1);
  assert.ok(whole.text.length > 0);

  const stream = streamText({ ...loop, prepareStep });
  await stream.consumeStream();
  assert.equal((await stream.steps)[0].toolCalls.length, 1);
  assert.deepEqual(seen.map((closely) => typeof closely), ["boolean", "boolean"]);
}

async function completions() {
  const model = provider.completionModel("nano");
  const whole = await generateText({ ...short, model, prompt: "def add(a, b):\n" });
  const stream = streamText({ ...short, model, prompt: "def add(a, b):\n" });
  assert.equal(await stream.text, whole.text);
}

async function errors() {
  await assert.rejects(
    generateText({ ...short, model: provider.chatModel("other") }),
    (error) =>
      APICallError.isInstance(error) &&
      error.statusCode === 404 &&
      !error.isRetryable &&
      error.data.error.code === "model_not_found",
  );
}

for (const check of [text, objects, tools, completions, errors]) await check();
