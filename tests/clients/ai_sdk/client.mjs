// Vercel's AI SDK: text, stream, object, tools.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "expertline",
  baseURL: `${process.env.EXPERTLINE_URL}/v1`,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider.chatModel("nano");
const common = { model, prompt: "Which light?", maxRetries: 0, temperature: 0 };

const whole = await generateText({ ...common, maxOutputTokens: 16 });
assert.ok(whole.text.length > 0);
assert.ok(whole.usage.outputTokens <= 16);

const stream = streamText({ ...common, maxOutputTokens: 16 });
let text = "";
for await (const piece of stream.textStream) text += piece;
assert.equal(text, whole.text);
assert.ok((await stream.usage).outputTokens > 0);

const light = z.object({ red: z.boolean(), green: z.boolean() });
const object = await generateText({
  ...common,
  maxOutputTokens: 100,
  output: Output.object({ schema: light }),
});
assert.equal(typeof object.output.red, "boolean");

const called = await generateText({
  ...common,
  maxOutputTokens: 100,
  toolChoice: "required",
  tools: { look: tool({ description: "Looks.", inputSchema: light }) },
});
assert.ok(called.toolCalls.length > 0);
assert.equal(typeof called.toolCalls[0].input.green, "boolean");
