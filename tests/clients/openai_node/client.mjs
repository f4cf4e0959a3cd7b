// openai-node: chat, streams, helpers, tools, cancellation.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({
  baseURL: `${process.env.EXPERTLINE_URL}/v1`,
  apiKey: "none",
  maxRetries: 0,
});
const messages = [{ role: "user", content: "Which light?" }];
const asked = { model: "nano", messages, max_tokens: 16, temperature: 0 };
const tool = {
  type: "function",
  function: {
    name: "switch",
    parameters: {
      type: "object",
      properties: { on: { type: "boolean" } },
      required: ["on"],
      additionalProperties: false,
    },
  },
};

const whole = await client.chat.completions.create(asked);
const text = whole.choices[0].message.content;
assert.ok(text.length > 0);

let streamed = "";
const options = { stream: true, stream_options: { include_usage: true } };
let usage = null;
for await (const chunk of await client.chat.completions.create({ ...asked, ...options })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, text);
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);

const helper = client.chat.completions.stream(asked);
assert.equal((await helper.finalChatCompletion()).choices[0].message.content, text);

const called = await client.chat.completions.create({
  ...asked,
  max_tokens: 100,
  tools: [tool],
  tool_choice: "required",
  parallel_tool_calls: false,
});
const [call] = called.choices[0].message.tool_calls;
assert.equal(typeof JSON.parse(call.function.arguments).on, "boolean");

const endless = await client.completions.create({
  model: "nano",
  prompt: "x",
  max_tokens: 3000,
  ignore_eos: true,
  stream: true,
});
let pieces = 0;
for await (const _ of endless) {
  if (++pieces === 3) endless.controller.abort();
}
assert.ok(pieces < 3000);

await assert.rejects(
  client.chat.completions.create({ ...asked, model: "other" }),
  (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
);
const response = await client.responses.create({
  model: "nano",
  input: "hi",
  max_output_tokens: 8,
});
assert.ok(response.output_text.length > 0);
