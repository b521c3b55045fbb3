// Talking to the server.

import { SAMPLING, tab } from "./store.js";

const KEY = "godwit.key";

/** What goes wrong on the way to an answer, as one sentence for the user. */
export class Failure extends Error {
  constructor(message, status = 0) {
    super(String(message).slice(0, 500));
    this.status = status;
  }
}

/** For `catch`: lets through that the user has stopped an answer, and puts other errors in words. */
const inWords = (words) => (error) => { throw error.name === "AbortError" ? error : new Failure(words); };

export const useKey = (key) => tab.set(KEY, key);

async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json" }, key = tab.get(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const unreachable = inWords("The server cannot be reached; check that it is running.");
  const response = await fetch(path, { ...options, headers }).catch(unreachable);
  if (response.ok) return response;
  if (response.status === 401) throw keyFailure(key);
  const { error } = await response.json().catch(() => ({})) ?? {};
  const words = error?.message || `The server answered with status ${response.status}.`;
  throw new Failure(words, response.status);
}

function keyFailure(key) {
  if (tab.get(KEY) === key) tab.remove(KEY);
  return new Failure(key ? "Wrong key: the server does not accept it." : "", 401);
}

/** The data of server-sent events, one at a time. */
async function* readEvents(body) {
  const reader = body.getReader(), decoder = new TextDecoder();
  const broken = inWords("The connection broke before the answer was complete.");
  let buffer = "", data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(broken);
      if (done) return;
      const lines = (buffer + decoder.decode(value, { stream: true })).split("\n");
      buffer = lines.pop();
      for (const line of lines.map((each) => each.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line || !data.length) continue;
        yield data.join("\n");
        data = [];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The chunks of a streamed answer. */
export async function* streamAnswer(body, signal) {
  const response = await request("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  for await (const data of readEvents(response.body)) {
    if (data === "[DONE]") return;
    let chunk;
    try { chunk = JSON.parse(data); } catch { throw new Failure("The server sent something that is not JSON."); }
    if (chunk.error) throw new Failure(chunk.error.message || "The server could not finish the answer.");
    yield chunk;
  }
}

/** The models there are, each with its `id`. */
export async function fetchModels() {
  const { data } = await (await request("v1/models")).json();
  return data;
}

/** The tools in the text of the settings, each as the API wants it. */
export function parseTools(text) {
  if (!text.trim()) return [];
  let list;
  try {
    list = JSON.parse(text);
  } catch (error) {
    throw new Failure(`The tools are not valid JSON: ${error.message}.`);
  }
  list = list?.tools ?? list;
  if (!Array.isArray(list)) throw new Failure('The tools have to be a list, such as [{"name": "add"}].');
  return list.map((entry, i) => {
    const inner = entry?.function ?? entry;
    if (typeof inner?.name !== "string" || !inner.name) throw new Failure(`Tool ${i + 1} has no name.`);
    return entry.function ? entry : { type: "function", function: entry };
  });
}

/** The messages as the API has them; `named`: results of tools say whose they are. */
export function wireMessages({ system, messages }, named = false) {
  const wire = messages.map(({ role, content, reasoning_content, tool_calls, tool_call_id, name }) => {
    if (role === "tool") return named ? { role, tool_call_id, name, content } : { role, tool_call_id, content };
    const message = { role, content: content || (tool_calls?.length ? null : "") };
    if (reasoning_content) message.reasoning_content = reasoning_content;
    if (tool_calls?.length) message.tool_calls = tool_calls;
    return message;
  });
  return system.trim() ? [{ role: "system", content: system }, ...wire] : wire;
}

/** A request for an answer, which names no model yet; what is not set is left to the server. */
export function requestBody(conversation) {
  const body = { messages: wireMessages(conversation), stream: true, stream_options: { include_usage: true } };
  const tools = parseTools(conversation.tools);
  if (tools.length) body.tools = tools;
  for (const name of SAMPLING)
    if (conversation.sampling[name]) body[name] = Number(conversation.sampling[name]);
  return body;
}
