// openai-node: chat, completions, streams, helpers, a tools loop, responses, errors, cancellation.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({
  baseURL: `${process.env.EXPERTLINE_URL}/v1`,
  apiKey: "none",
  maxRetries: 0,
});
const messages = [{ role: "user", content: "Write a Python function `read_file`." }];
const asked = { model: "nano", messages, max_tokens: 16, temperature: 0 };
const enough = { ...asked, max_tokens: 100 };
const Lights = z.object({ red: z.boolean(), lamp: z.enum(["left", "right"]) });
const tool = {
  type: "function",
  function: {
    name: "switch",
    description: "Switches a light.",
    parameters: {
      type: "object",
      properties: { on: { type: "boolean" } },
      required: ["on"],
      additionalProperties: false,
    },
  },
};

async function models() {
  const listed = [];
  for await (const model of client.models.list()) listed.push(model.id);
  assert.deepEqual(listed, ["nano"]);
  assert.equal((await client.models.retrieve("nano")).object, "model");
}

async function chat() {
  const whole = await client.chat.completions.create(asked);
  const text = whole.choices[0].message.content;
  assert.equal(whole.choices[0].finish_reason, "length");
  assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + 16);

  let streamed = "";
  let usage = null;
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.chat.completions.create({ ...asked, ...options })) {
    streamed += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(streamed, text);
  assert.deepEqual({ ...usage, prompt_tokens_details: null }, {
    ...whole.usage,
    prompt_tokens_details: null,
  });

  const helper = client.chat.completions.stream(asked);
  let heard = "";
  helper.on("content", (delta) => (heard += delta));
  assert.equal((await helper.finalChatCompletion()).choices[0].message.content, text);
  assert.equal(heard, text);
}

async function completions() {
  const prompt = { model: "nano", prompt: "def add(a, b):\n", max_tokens: 8, temperature: 0 };
  const whole = await client.completions.create(prompt);
  let streamed = "";
  for await (const chunk of await client.completions.create({ ...prompt, stream: true })) {
    streamed += chunk.choices[0].text;
  }
  assert.equal(streamed, whole.choices[0].text);
}

async function structured() {
  const format = { response_format: zodResponseFormat(Lights, "lights") };
  const parsed = await client.chat.completions.parse({ ...enough, ...format });
  assert.deepEqual(Lights.parse(parsed.choices[0].message.parsed), parsed.choices[0].message.parsed);
}

async function tools() {
  const required = { tools: [tool], tool_choice: "required", parallel_tool_calls: false };
  const first = await client.chat.completions.create({ ...enough, ...required });
  assert.equal(first.choices[0].finish_reason, "tool_calls");
  const [call] = first.choices[0].message.tool_calls;
  assert.equal(typeof JSON.parse(call.function.arguments).on, "boolean");

  const streamed = await client.chat.completions.stream({ ...enough, ...required }).finalMessage();
  assert.deepEqual(streamed.tool_calls[0].function.arguments, call.function.arguments);

  const results = [];
  const runner = client.chat.completions.runTools({
    ...enough,
    tool_choice: { type: "function", function: { name: "switch" } }, // ends after this call
    tools: [
      {
        type: "function",
        function: { ...tool.function, parse: JSON.parse, function: ({ on }) => `${on}` },
      },
    ],
  });
  runner.on("functionToolCallResult", (result) => results.push(result));
  await runner.done();
  assert.ok(["true", "false"].includes(results[0]));

  const talk = [
    ...messages,
    first.choices[0].message,
    { role: "tool", tool_call_id: call.id, content: results[0] },
  ];
  const last = await client.chat.completions.create({ ...asked, messages: talk });
  assert.ok(last.choices[0].message.content.length > 0);
}

async function responses() {
  const input = { model: "nano", input: "hi", max_output_tokens: 8, temperature: 0 };
  const whole = await client.responses.create(input);
  const streamed = await client.responses.stream(input).finalResponse();
  assert.equal(streamed.output_text, whole.output_text);
  assert.equal(whole.usage.output_tokens, 8);
}

async function errors() {
  await assert.rejects(
    client.chat.completions.create({ ...asked, model: "other" }),
    (error) =>
      error instanceof OpenAI.NotFoundError &&
      error.code === "model_not_found" &&
      error.requestID.length > 0,
  );
  await assert.rejects(
    client.chat.completions.create({ ...asked, temperature: 3 }),
    (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
  );
}

async function cancelled() {
  const endless = { model: "nano", prompt: "x", max_tokens: 3000, ignore_eos: true, stream: true };
  const stream = await client.completions.create(endless);
  let pieces = 0;
  for await (const _ of stream) {
    if (++pieces === 3) stream.controller.abort();
  }
  assert.ok(pieces < 100);
  for (let tries = 0; (await running()) > 0; tries++) {
    assert.ok(tries < 100, "the server goes on with what nobody reads");
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

async function running() {
  const metrics = await (await fetch(`${process.env.EXPERTLINE_URL}/metrics`)).text();
  const samples = metrics.split("\n").filter((l) => l.startsWith("expertline_requests_running"));
  assert.ok(samples.length > 0);
  return samples.reduce((sum, line) => sum + Number(line.split(" ").at(-1)), 0);
}

for (const check of [models, chat, completions, structured, tools, responses, errors, cancelled]) {
  await check();
}
