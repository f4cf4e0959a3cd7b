// The console: a chat and a fill-in-the-middle sheet over the server's own OpenAI API.
// Everything that a model or a server said enters the page as text, never as markup.

const KEY_ENTRY = "expertline.key";
const ALTERNATIVES = 5;
const SAMPLING = { temperature: "temperature", "max-tokens": "max_tokens", seed: "seed" };

const byId = (id) => document.getElementById(id);
const conversation = []; // complete turns: what the next request repeats
const tokenOf = new WeakMap(); // a token's span -> what is known of the token
let running = null; // AbortController of the request under way
let lastRequest = null; // { path, body }

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// ---- HTTP ----

/** Something that went wrong, in words for the person at the page. */
class Failure extends Error {}

/** Sends one request to the API; a refusal becomes a Failure with the server's own message. */
async function call(path, body, signal) {
  const headers = {};
  const key = byId("key").value.trim();
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  const method = body ? "POST" : "GET";
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  if (!response.ok) throw new Failure(await refusal(response));
  return response;
}

async function refusal(response) {
  const answer = await response.json().catch(() => null); // a proxy may answer with a page
  return answer?.error?.message ?? `The server answered with HTTP ${response.status}.`;
}

/** The line for any error that sending or reading can end with. */
function messageOf(error) {
  if (error instanceof Failure) return error.message;
  // fetch and its readers report every loss of the connection as a TypeError.
  if (error instanceof TypeError) return "The connection to the server was lost.";
  return `Unexpected answer: ${error.message}`;
}

/** JSON events of an SSE body, up to [DONE]; wherever the network cut the bytes. */
export async function* readEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Failure("The connection closed before the answer was complete.");
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop(); // an unfinished line waits for its other part
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // blank lines, comments, event names
        const data = line.slice("data:".length).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Failure(event.error.message ?? "The server reported an error.");
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // of a stream that broke there is nothing to cancel
  }
}

// ---- Two shapes of choices, one shape of pieces: { text, tokens: [{ bytes, p, top }] } ----

function chatPiece(choice) {
  const entry = ({ token, bytes, logprob }) => ({
    bytes: bytes ? Uint8Array.from(bytes) : bytesOf(token),
    p: probability(logprob),
  });
  const tokens = choice.logprobs?.content ?? [];
  return {
    text: choice.delta.content ?? "",
    tokens: tokens.map((token) => ({ ...entry(token), top: token.top_logprobs.map(entry) })),
  };
}

function completionPiece(choice) {
  const known = choice.logprobs ?? { tokens: [] };
  const entry = ([token, logprob]) => ({ bytes: bytesOf(token), p: probability(logprob) });
  return {
    text: choice.text,
    tokens: known.tokens.map((token, i) => ({
      ...entry([token, known.token_logprobs[i]]),
      top: Object.entries(known.top_logprobs?.[i] ?? {}).map(entry),
    })),
  };
}

const probability = (logprob) => Math.exp(logprob ?? 0);

/** A token that is no whole characters is named by its bytes, as in bytes:\xe2\x80. */
function bytesOf(token) {
  if (!/^bytes:(\\x[0-9a-f]{2})+$/.test(token)) return new TextEncoder().encode(token);
  return Uint8Array.from(token.slice("bytes:\\x".length).split("\\x"), (hex) => parseInt(hex, 16));
}

// ---- An answer on the page ----

/** Shows one answer as it comes: tokens where they are known, plain text where not. */
class Answer {
  text = "";
  #output = element("div", "output");
  #stats = element("p", "stats");
  #spans = [];
  #decoder = new TextDecoder(); // a character's bytes may come in several tokens
  #started = performance.now();
  #first = null; // { at, tokens } of the first piece
  #last = this.#started;
  #count = null; // as the server counts
  #ending = "";

  constructor(parent, label) {
    this.#output.tabIndex = 0;
    this.#output.setAttribute("role", "group");
    this.#output.setAttribute("aria-label", label);
    this.#stats.setAttribute("role", "status");
    parent.append(this.#output, this.#stats);
  }

  add(chunk, pieceOf) {
    this.#count = chunk.usage?.completion_tokens ?? this.#count;
    const choice = chunk.choices[0];
    if (!choice) return;
    const { text, tokens } = pieceOf(choice);
    this.#ending = choice.finish_reason ?? this.#ending;
    this.text += text;
    if (!text && !tokens.length) return;
    this.#last = performance.now();
    this.#first ??= { at: this.#last, tokens: tokens.length };
    const scrolled = keptAtEnd(this.#output.closest("#conversation"));
    // Text may come later than its tokens, which then are on the page already.
    if (tokens.length) this.#output.append(...tokens.map((token) => this.#span(token)));
    else if (!this.#spans.length) this.#output.append(text);
    scrolled();
  }

  /** The last word on an answer, however it ended. */
  settle(ending = this.#ending) {
    const scrolled = keptAtEnd(this.#output.closest("#conversation"));
    if (this.#spans.length) this.#align();
    this.#stats.textContent = this.#measured(ending);
    scrolled();
  }

  #span(token) {
    const span = element("span", "token", this.#decoder.decode(token.bytes, { stream: true }));
    span.style.setProperty("--doubt", (1 - token.p).toFixed(3));
    tokenOf.set(span, token);
    this.#spans.push(span);
    return span;
  }

  /** Sets apart tokens that are not part of the text: the end token, a stop string's. */
  #align() {
    let rest = this.text;
    for (const span of this.#spans) {
      const said = span.textContent;
      if (rest.startsWith(said)) rest = rest.slice(said.length);
      else if (rest && said.startsWith(rest)) [span.textContent, rest] = [rest, ""];
      else span.classList.add("unsaid");
    }
    if (rest) this.#output.textContent = this.text; // tokens do not explain it: the text counts
  }

  #measured(ending) {
    if (!this.#first) return ending;
    const count = this.#count ?? this.#spans.length;
    // The first piece's tokens were made before the clock of decoding began to run.
    const decoded = count - this.#first.tokens;
    const [tokens, since] = decoded > 0 ? [decoded, this.#first.at] : [count, this.#started];
    const rate = (1000 * tokens) / Math.max(this.#last - since, 1);
    const waited = Math.round(this.#first.at - this.#started);
    const parts = [`${count} tokens`, `${rate.toFixed(1)} tokens/s`, `first token after ${waited} ms`];
    return [...parts, ending].filter(Boolean).join(" · ");
  }
}

/** Whoever reads the end of a growing box goes on to; whoever has scrolled up is left there. */
function keptAtEnd(box) {
  const atEnd = box && box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  return () => atEnd && box.scrollTo(0, box.scrollHeight);
}

// ---- Requests ----

/** Streams one request into an answer; false if it came to nothing that can be kept. */
async function run(path, body, pieceOf, answer) {
  running = new AbortController();
  const { signal } = running;
  lastRequest = { path, body };
  showBusy(true);
  try {
    const response = await call(path, body, signal);
    for await (const chunk of readEvents(response.body)) answer.add(chunk, pieceOf);
    answer.settle();
    return true;
  } catch (error) {
    answer.settle(signal.aborted ? "stopped" : "failed");
    if (signal.aborted) return answer.text !== "";
    showError(messageOf(error));
    return false;
  } finally {
    running = null;
    showBusy(false);
  }
}

/** What chats and completions have in common; an empty field leaves the server its default. */
function common() {
  const body = { model: byId("model").value };
  for (const [id, name] of Object.entries(SAMPLING)) {
    const { value } = byId(id);
    if (value !== "") body[name] = Number(value);
  }
  return { ...body, stream: true, stream_options: { include_usage: true } };
}

/** Whether a request may start now; finds the models first if there are none yet. */
async function ready() {
  if (running || !Object.keys(SAMPLING).every((id) => byId(id).reportValidity())) return false;
  showError("");
  if (!byId("model").value) await loadModels();
  return byId("model").value !== "" && !running;
}

async function chat() {
  const message = byId("message").value;
  if (!message.trim() || !(await ready())) return;
  const asked = turn("user", "You");
  asked.append(element("div", "output", message));
  const answered = turn("assistant", byId("model").value);
  const answer = new Answer(answered, "Answer");
  byId("conversation").scrollTo(0, byId("conversation").scrollHeight);
  byId("message").value = "";
  const user = { role: "user", content: message };
  const system = byId("system").value.trim() ? [{ role: "system", content: byId("system").value }] : [];
  const messages = [...system, ...conversation, user];
  const body = { ...common(), messages, logprobs: true, top_logprobs: ALTERNATIVES };
  if (await run("v1/chat/completions", body, chatPiece, answer)) {
    conversation.push(user, { role: "assistant", content: answer.text });
    return;
  }
  // A failed turn is not part of the conversation: its message goes back to be sent again.
  byId("message").value ||= message;
  for (const shown of [asked, answered]) answer.text ? shown.classList.add("failed") : shown.remove();
}

function turn(role, name) {
  const shown = element("article", `turn ${role}`);
  shown.append(element("h2", "", name));
  byId("conversation").append(shown);
  return shown;
}

function resetConversation() {
  conversation.length = 0;
  byId("conversation").replaceChildren();
  showError("");
  byId("message").focus();
}

async function fillIn() {
  if (!(await ready())) return;
  byId("middle").replaceChildren();
  const answer = new Answer(byId("middle"), "Middle");
  const texts = { prompt: byId("prefix").value, suffix: byId("suffix").value };
  const body = { ...common(), ...texts, logprobs: ALTERNATIVES };
  await run("v1/completions", body, completionPiece, answer);
}

async function loadModels() {
  try {
    const { data } = await (await call("v1/models")).json();
    byId("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
    showError("");
  } catch (error) {
    byId("model").replaceChildren();
    showError(messageOf(error));
  }
}

function showBusy(busy) {
  for (const button of document.querySelectorAll(".send, #reset")) button.disabled = busy;
  for (const button of document.querySelectorAll(".stop")) button.disabled = !busy;
  for (const button of document.querySelectorAll(".last button")) button.disabled = !lastRequest;
  byId("copied").textContent = "";
}

function showError(message) {
  const scrolled = keptAtEnd(byId("conversation")); // the line takes some of its height
  byId("error").textContent = message;
  byId("error").hidden = !message;
  scrolled();
}

// ---- The last request, for a terminal or a program; the key is named and never written ----

function asCurl({ path, body }) {
  const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
  return [
    `curl -N ${quoted(new URL(path, document.baseURI).href)}`,
    `-H "Authorization: Bearer $OPENAI_API_KEY"`,
    `-H 'Content-Type: application/json'`,
    `-d ${quoted(JSON.stringify(body, null, 2))}`,
  ].join(" \\\n  ");
}

function asPython({ path, body }) {
  const chats = "messages" in body;
  const fields = Object.entries(body).map(([name, value]) => `    ${name}=${pythonLiteral(value)},`);
  return [
    "import os",
    "",
    "import openai",
    "",
    "client = openai.OpenAI(",
    `    base_url=${pythonLiteral(new URL("v1", document.baseURI).href)},`,
    '    api_key=os.environ.get("OPENAI_API_KEY", "none"),',
    ")",
    `stream = client.${chats ? "chat.completions" : "completions"}.create(`,
    ...fields,
    ")",
    "for chunk in stream:",
    "    for choice in chunk.choices:",
    `        print(choice.${chats ? "delta.content" : "text"} or "", end="", flush=True)`,
    "",
  ].join("\n");
}

function pythonLiteral(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(pythonLiteral).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value); // JSON's strings are Python's too
  const entries = Object.entries(value).map(([name, part]) => `"${name}": ${pythonLiteral(part)}`);
  return `{${entries.join(", ")}}`;
}

/** By selection, since over plain HTTP from another machine there is no navigator.clipboard. */
function copy(text) {
  const focused = document.activeElement;
  const holder = element("textarea", "hidden");
  holder.value = text;
  document.body.append(holder);
  holder.select();
  byId("copied").textContent = document.execCommand("copy") ? "Copied." : "The browser refused.";
  holder.remove();
  focused.focus();
}

// ---- Tooltips: under the pointer, or stepped through with the arrow keys ----

function showToken(span) {
  document.querySelector(".token.current")?.classList.remove("current");
  const tooltip = byId("tooltip");
  tooltip.hidden = !span;
  if (!span) return;
  span.classList.add("current");
  const { bytes, p, top } = tokenOf.get(span);
  const head = element("p", "chosen", `${visible(bytes)}  ${percent(p)}`);
  const rows = top.toSorted((a, b) => b.p - a.p).map((other) => row(other, visible(bytes)));
  tooltip.replaceChildren(head, ...rows);
  place(tooltip, span.getClientRects()[0] ?? span.getBoundingClientRect());
}

function row({ bytes, p }, chosen) {
  const shown = element("div", visible(bytes) === chosen ? "alternative same" : "alternative");
  shown.style.setProperty("--p", p.toFixed(4));
  shown.append(element("span", "", visible(bytes)), element("span", "", percent(p)));
  return shown;
}

/** Below its token, or above where there is no room. */
function place(tooltip, token) {
  const { offsetWidth: width, offsetHeight: height } = tooltip;
  const below = token.bottom + 6;
  const top = below + height < innerHeight ? below : Math.max(token.top - height - 6, 0);
  tooltip.style.left = `${Math.max(Math.min(token.left, innerWidth - width - 8), 8)}px`;
  tooltip.style.top = `${top}px`;
}

function visible(bytes) {
  const signs = { " ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍" };
  return new TextDecoder().decode(bytes).replace(/[ \n\t\r]/g, (space) => signs[space]);
}

function percent(p) {
  if (p < 0.0001) return "<0.01 %";
  return `${(100 * p).toFixed(p < 0.1 ? 2 : 1)} %`;
}

function stepThroughTokens(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const output = event.target;
  if (event.key === "Escape") showToken(null);
  if (!step || !output.matches(".output[tabindex]")) return;
  const tokens = [...output.querySelectorAll(".token")].filter((span) => span.textContent);
  const next = tokens.indexOf(output.querySelector(".current")) + step;
  if (!tokens.length) return;
  event.preventDefault();
  showToken(tokens[Math.max(Math.min(next, tokens.length - 1), 0)]);
}

// ---- Tabs and wiring ----

function selectTab(tab) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    const selected = other === tab;
    other.setAttribute("aria-selected", String(selected));
    other.tabIndex = selected ? 0 : -1;
    byId(other.getAttribute("aria-controls")).hidden = !selected;
  }
  byId("system").parentElement.hidden = tab.id !== "tab-chat";
  showToken(null);
}

function moveAmongTabs({ key, currentTarget }) {
  if (key !== "ArrowLeft" && key !== "ArrowRight") return;
  const other = currentTarget.querySelector("[aria-selected=false]"); // there are two
  selectTab(other);
  other.focus();
}

function onSubmit(form, action) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    action();
  });
  form.querySelector(".stop").addEventListener("click", () => running?.abort());
}

function start() {
  onSubmit(byId("chat"), chat);
  onSubmit(byId("fim"), fillIn);
  byId("reset").addEventListener("click", resetConversation);
  byId("copy-curl").addEventListener("click", () => copy(asCurl(lastRequest)));
  byId("copy-python").addEventListener("click", () => copy(asPython(lastRequest)));
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.addEventListener("click", () => selectTab(tab));
  }
  document.querySelector("[role=tablist]").addEventListener("keydown", moveAmongTabs);
  document.addEventListener("keydown", (event) => {
    const sends = event.key === "Enter" && (event.ctrlKey || event.metaKey);
    if (sends) document.querySelector("form:not([hidden])").requestSubmit();
    else stepThroughTokens(event);
  });
  document.addEventListener("pointerover", ({ target }) => showToken(target.closest(".token")));
  document.addEventListener("focusout", () => showToken(null));
  document.addEventListener("scroll", () => showToken(null), { capture: true, passive: true });
  byId("shade").addEventListener("change", ({ target }) => {
    document.body.classList.toggle("unshaded", !target.checked);
  });
  // The session's own storage: gone with the tab, and no other tab can read it.
  byId("key").value = sessionStorage.getItem(KEY_ENTRY) ?? "";
  byId("key").addEventListener("change", () => {
    sessionStorage.setItem(KEY_ENTRY, byId("key").value.trim());
    loadModels();
  });
  loadModels();
}

start();
