// Answers under way, and what users do to a conversation: say, answer, continue, stop, edit, regenerate.

import { Failure, requestBody, streamAnswer } from "./api.js";
import { awaitsResults, conversations, isComplete, keep, lastOf, titleFrom } from "./store.js";

const SAVE_EVERY = 3000; // milliseconds
const CUT_OFF = ["length", "stopped", "failed"];

/** Id of a conversation -> { message, controller, began, base } while it is answered. */
export const runs = new Map();
/** Id of a conversation -> what went wrong last. */
export const failures = new Map();

/** What the page does at these moments; it sets them when it starts. */
export const hooks = {
  mayAnswer: () => true, // (conversation): whether the settings allow an answer
  model: async () => "", // the name of the model to ask
  begun: () => {}, // (conversation)
  grown: () => {}, // (conversation, message)
  ended: () => {}, // (conversation, message)
  changed: () => {}, // (conversation): besides the above
  keyRefused: () => {}, // (what is wrong)
};

const mayAnswer = (conversation) => !runs.has(conversation.id) && hooks.mayAnswer(conversation);

export function save(conversation, updated) {
  if (!keep(conversation, updated))
    showFailure(conversation, "The browser cannot keep more conversations; export and delete some.");
}

export function showFailure(conversation, text) {
  failures.set(conversation.id, text);
  hooks.changed(conversation);
}

/** Lets the model answer; resolves when the answer is complete, stopped or has failed. */
export async function answer(conversation) {
  if (!mayAnswer(conversation)) return;
  const body = requestBody(conversation);
  const message = { role: "assistant", content: "", reasoning_content: "", tool_calls: [], stats: {} };
  conversation.messages.push(message);
  await run(conversation, message, body);
}

/** Whether the end of an answer is missing, and can be asked for. */
export function canContinue({ messages }) {
  const { role, content, tool_calls: calls, stats } = messages.at(-1) ?? {};
  return role === "assistant" && Boolean(content) && !calls.length && CUT_OFF.includes(stats.finish);
}

/** Lets the model go on with its last answer. */
export async function continueAnswer(conversation) {
  if (!canContinue(conversation) || !mayAnswer(conversation)) return;
  const body = { ...requestBody(conversation), continue_final_message: true, add_generation_prompt: false };
  await run(conversation, lastOf(conversation), body);
}

async function run(conversation, message, body) {
  const before = message.stats, base = before.generated ?? 0;
  const controller = new AbortController(), began = performance.now();
  const own = { message, controller, began, base, saved: began };
  message.stats = message.content ? { generated: base, thought: before.thought } : {};
  runs.set(conversation.id, own);
  failures.delete(conversation.id);
  hooks.begun(conversation);
  try {
    body.model = await hooks.model();
    for await (const chunk of streamAnswer(body, controller.signal)) {
      absorb(own, chunk);
      if (performance.now() - own.saved > SAVE_EVERY) {
        own.saved = performance.now();
        save(conversation);
      }
      hooks.grown(conversation, message);
    }
    if (!message.stats.finish) throw new Failure("The connection ended before the answer was complete.");
  } catch (error) {
    message.stats.finish = error.name === "AbortError" ? "stopped" : "failed";
    if (error.name !== "AbortError") recordFailure(conversation, error);
    if (message.stats.first === undefined && before.finish) message.stats = before; // nothing was added
  }
  finish(conversation, message);
}

export function recordFailure(conversation, error) {
  const known = error instanceof Failure;
  if (!known) console.error(error);
  if (error.status === 401) hooks.keyRefused(error.message);
  else failures.set(conversation.id, known ? error.message : "This page has a fault; the browser's console says more.");
}

function finish(conversation, message) {
  const { stats } = message;
  if (!["stop", "tool_calls"].includes(stats.finish)) message.tool_calls = message.tool_calls.filter(isComplete);
  if (!message.content && !message.reasoning_content && !message.tool_calls.length && stats.finish !== "stop")
    conversation.messages = conversation.messages.filter((each) => each !== message);
  runs.delete(conversation.id);
  save(conversation);
  hooks.ended(conversation, message);
}

/** Adds a chunk of the stream to the answer. Times are seconds since the request. */
function absorb({ message, began, base }, chunk) {
  const { stats } = message, now = (performance.now() - began) / 1000;
  if (chunk.usage) {
    stats.latest = chunk.usage.completion_tokens;
    stats.generated = base + stats.latest;
    stats.prompt = chunk.usage.prompt_tokens;
    stats.cached = chunk.usage.prompt_tokens_details?.cached_tokens ?? chunk.usage.cached_tokens;
  }
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const { content, reasoning_content: thought, tool_calls: calls } = choice.delta ?? {};
  if (content || thought || calls) {
    stats.first ??= now;
    stats.last = now;
  }
  if (thought) message.reasoning_content += thought;
  if (content || calls) stats.thought ??= now - stats.first;
  if (content) message.content += content;
  for (const call of calls ?? []) addToCall(message.tool_calls, call);
  if (choice.finish_reason) stats.finish = choice.finish_reason;
}

function addToCall(calls, { index = calls.length, id, function: part = {} }) {
  if (!(index >= 0 && index <= calls.length)) return;
  calls[index] ??= { id: "", type: "function", function: { name: "", arguments: "" } };
  if (id) calls[index].id = id;
  calls[index].function.name += part.name ?? "";
  calls[index].function.arguments += part.arguments ?? "";
}

export function stopAnswer({ id }) {
  runs.get(id)?.controller.abort();
}

/** Says something and has it answered; false where that cannot be now. */
export function say(conversation, text) {
  if (!text.trim() || !mayAnswer(conversation)) return false;
  if (awaitsResults(conversation)) {
    showFailure(conversation, "The model waits for the result of its tool call; give it first, or edit a message.");
    return false;
  }
  conversation.messages.push({ role: "user", content: text });
  conversation.title ||= titleFrom(text);
  conversations.set(conversation.id, conversation);
  save(conversation);
  answer(conversation);
  return true;
}

/** Answers the calls of the last message with what their tools return; false where that cannot be now. */
export function giveResults(conversation, results) {
  if (!mayAnswer(conversation)) return false;
  for (const { call, content } of results)
    conversation.messages.push({ role: "tool", tool_call_id: call.id, name: call.function.name, content });
  save(conversation);
  answer(conversation);
  return true;
}

/** Puts `text` in place of a message, drops what follows and answers again; false where that cannot be now. */
export function replaceMessage(conversation, message, text) {
  if (!text.trim() || !mayAnswer(conversation)) return false;
  const { messages } = conversation;
  let end = messages.indexOf(message) + 1;
  while (message.role === "tool" && messages[end]?.role === "tool") end++; // results of the same turn stay
  const changed = (each) => (each === message ? { ...message, content: text } : each);
  conversation.messages = messages.slice(0, end).map(changed);
  save(conversation);
  answer(conversation);
  return true;
}

export function regenerate(conversation) {
  if (!mayAnswer(conversation)) return;
  if (lastOf(conversation)?.role === "assistant") conversation.messages.pop();
  answer(conversation);
}
