// Conversations as files: what is exported can be imported, as can OpenAI's `messages` from elsewhere.

import { Failure, parseTools, wireMessages } from "./api.js";
import { SAMPLING, conversations, newConversation, restored, titleFrom } from "./store.js";

const CONTROLS = /[^\p{L}\p{N}]+/gu;

export function fileName({ title }) {
  return `${title.replace(CONTROLS, "-").replace(/^-|-$/g, "") || "conversation"}.json`;
}

/** A conversation as JSON that other programs can read. */
export function exported(conversation, model) {
  const { title, updated, tools, sampling } = conversation;
  return { title, model, updated, messages: wireMessages(conversation, true), tools: toolsOf(tools), sampling };
}

function toolsOf(text) {
  try { return parseTools(text); } catch { return text; }
}

/**
 * The conversations in the text of a file: one of ours, several in a list, or `messages` alone.
 * Throws a Failure that says what is wrong with the file.
 */
export function imported(text, name) {
  let content;
  try {
    content = JSON.parse(text);
  } catch {
    throw new Failure(`${name} is not JSON, so it is not an exported conversation.`);
  }
  const entries = Array.isArray(content) && !content[0]?.role ? content : [content];
  const found = entries.map(conversationOf);
  if (!found.length || found.includes(null)) throw new Failure(`${name} holds something that is not a conversation.`);
  return found;
}

function conversationOf(entry) {
  const messages = Array.isArray(entry) ? entry : entry?.messages;
  if (!Array.isArray(messages) || !messages.every((message) => typeof message?.role === "string")) return null;
  const systems = messages.filter(({ role }) => role === "system" || role === "developer");
  const rest = messages.filter((message) => !systems.includes(message)).map((message) => ({ ...message }));
  for (const message of rest) message.content = plain(message.content);
  nameResults(rest);
  const made = restored(JSON.stringify({
    ...newConversation(), title: entry.title, updated: entry.updated || Date.now(), messages: rest,
    system: systems.map(({ content }) => plain(content)).join("\n\n"), tools: textOfTools(entry.tools),
    sampling: samplingOf(entry.sampling),
  }));
  if (!made?.messages.length) return null;
  for (const { role, stats } of made.messages) if (role === "assistant") stats.finish = "stop";
  made.title ||= titleFrom(made.messages.find(({ role }) => role === "user")?.content ?? "") || "Imported";
  return made;
}

/** The text of a message, whose content may be a list of parts. */
function plain(content) {
  if (Array.isArray(content)) return content.map((part) => part?.text ?? "").join("");
  return typeof content === "string" ? content : "";
}

/** The results of tools bear the names of the tools; in OpenAI's form only the calls do. */
function nameResults(messages) {
  const names = new Map(messages.flatMap(({ tool_calls: calls }) => calls ?? []).map((call) => [call?.id, call?.function?.name]));
  for (const message of messages)
    if (message.role === "tool") message.name = String(message.name ?? names.get(message.tool_call_id) ?? "a tool");
}

function textOfTools(tools) {
  if (typeof tools === "string") return tools;
  return Array.isArray(tools) && tools.length ? JSON.stringify(tools, null, 1) : "";
}

function samplingOf(given) {
  return Object.fromEntries(SAMPLING.map((name) => [name, given?.[name] === undefined ? "" : String(given[name])]));
}

/** Adds conversations to those that are kept. */
export function addConversations(added) {
  for (const conversation of added) conversations.set(conversation.id, conversation);
}
