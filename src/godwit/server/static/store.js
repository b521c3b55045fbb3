// Conversations, and how this browser keeps them.

const PREFIX = "godwit.conversation.";
export const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
  "frequency_penalty", "max_tokens", "seed"];

/** A place to keep texts, in which a browser that keeps nothing (or no more) does no harm. */
function place(storage) {
  const attempt = (act, other) => { try { return act(window[storage]); } catch { return other; } };
  return {
    get: (key) => attempt((kept) => kept.getItem(key), null),
    set: (key, value) => attempt((kept) => (kept.setItem(key, value), true), false),
    remove: (key) => attempt((kept) => kept.removeItem(key)),
    keys: () => attempt((kept) => Object.keys(kept), []),
  };
}

/** Kept for good, and kept until the tab is closed. */
export const local = place("localStorage"), tab = place("sessionStorage");

export const byTime = () => [...conversations.values()].sort((a, b) => b.updated - a.updated);
export const lastOf = ({ messages }) => messages.at(-1);
export const awaitsResults = (conversation) => lastOf(conversation)?.tool_calls?.length > 0;
export const titleFrom = (text) => text.trim().split("\n")[0].slice(0, 60);

/** A conversation with the settings of another. */
export function newConversation(like) {
  const id = Array.from(crypto.getRandomValues(new Uint32Array(3)), (n) => n.toString(36)).join("");
  const { system = "", tools = "", sampling = {} } = like ?? {};
  return { id, title: "", updated: Date.now(), system, tools, sampling: { ...sampling }, messages: [] };
}

/** Keeps a conversation; false where the browser has no room for it. */
export function keep(conversation, updated = Date.now()) {
  conversation.updated = updated;
  if (!conversations.has(conversation.id)) return true; // deleted while it was being answered
  return local.set(PREFIX + conversation.id, JSON.stringify(conversation));
}

export function forget({ id }) {
  conversations.delete(id);
  local.remove(PREFIX + id);
}

/** The conversation in a stored text, or null where there is none; every field has its type afterwards. */
export function restored(text) {
  try {
    const kept = JSON.parse(text);
    const messages = kept.messages.filter(({ role }) => ["user", "assistant", "tool"].includes(role));
    messages.forEach(mend);
    const sampling = Object.fromEntries(SAMPLING.map((name) => [name, textOf(kept.sampling?.[name])]));
    const [id, title, system, tools] = ["id", "title", "system", "tools"].map((name) => textOf(kept[name]));
    return { id, title, updated: Number(kept.updated) || 0, system, tools, sampling, messages };
  } catch {
    return null;
  }
}

function textOf(value) {
  return typeof value === "string" ? value : "";
}

function mend(message) {
  const { content, reasoning_content: thought, tool_calls: calls, stats } = message;
  message.content = textOf(content);
  if (message.role !== "assistant") return;
  message.reasoning_content = textOf(thought);
  message.tool_calls = (calls ?? []).filter((call) => textOf(call.function.name) && isComplete(call));
  message.stats = Object.fromEntries(Object.entries(stats ?? {}).filter(([, value]) => Number.isFinite(value)));
  message.stats.finish = textOf(stats?.finish) || "stopped"; // the page was closed
}

/** Whether the arguments of a call are all there. */
export function isComplete(call) {
  try { JSON.parse(call.function.arguments); return true; } catch { return false; }
}

function loadConversations() {
  const kept = local.keys().filter((key) => key.startsWith(PREFIX)).map((key) => restored(local.get(key)));
  return new Map(kept.filter((entry) => entry?.id).map((entry) => [entry.id, entry]));
}

/** By their ids. */
export const conversations = loadConversations();
/** What the page shows. */
export const shown = { conversation: null };

/** Calls `changed(id, conversation)` when another tab has changed a conversation, with null when it has deleted it. */
export function watchOtherTabs(changed) {
  addEventListener("storage", ({ key, newValue }) => {
    if (key?.startsWith(PREFIX)) changed(key.slice(PREFIX.length), newValue ? restored(newValue) : null);
  });
}

/** The conversations that hold all the words, in their titles or in what was said. */
export function search(words) {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  return byTime().filter((conversation) => {
    if (!wanted.length) return true;
    const text = [conversation.title, ...conversation.messages.map(({ content }) => content)].join("\n").toLowerCase();
    return wanted.every((word) => text.includes(word));
  });
}
