// Godwit's chat page: starts it and ties its parts together.
//
// Nothing comes from outside. Texts of models and users become text nodes, never HTML: the page works under a
// content security policy with scripts and styles of this server alone and require-trusted-types-for 'script'.

import * as answers from "./answers.js";
import { useKey } from "./api.js";
import { $, announce, isNarrow, onEnter } from "./dom.js";
import * as list from "./list.js";
import { closePanels, setPanel, startPanels } from "./panels.js";
import { checkSettings, chosenModel, loadModels, showSettings, startSettings } from "./settings.js";
import { byTime, conversations, lastOf, local, newConversation, shown, watchOtherTabs } from "./store.js";
import { showMessages, viewOf } from "./thread.js";

const CURRENT = "godwit.current";
const { runs, failures } = answers;

/* ---------- The conversation on the page ---------- */

function openConversation(conversation) {
  shown.conversation = conversation;
  local.set(CURRENT, conversation.id);
  list.showList();
  showSettings();
  showConversation();
  scrollDown();
  if (isNarrow()) setPanel("list", false);
  $("input").focus();
}

function showConversation() {
  const { conversation } = shown, { messages, title } = conversation;
  const running = runs.has(conversation.id), failure = failures.get(conversation.id);
  document.title = title ? `${title} · Godwit` : "Godwit";
  showMessages(conversation);
  $("empty").hidden = messages.length > 0 || running;
  $("failure").hidden = !failure;
  $("failure").textContent = failure ?? "";
  $("retry").hidden = running || !["user", "tool"].includes(lastOf(conversation)?.role);
  $("send").hidden = running;
  $("stop").hidden = !running;
}

/* ---------- Answers ---------- */

function onBegun(conversation) {
  list.showList();
  if (conversation !== shown.conversation) return;
  announce("Answering");
  showConversation();
  scrollDown();
}

const painting = { frame: 0, notBefore: 0 };

/** Shows what has come with a next frame; the longer that takes, the longer is the pause before the next. */
function onGrown(conversation, message) {
  if (painting.frame || performance.now() < painting.notBefore) return later(conversation, message);
  painting.frame = requestAnimationFrame(() => paint(conversation, message));
}

function later(conversation, message) {
  painting.timer ??= setTimeout(() => {
    painting.timer = undefined;
    if (runs.has(conversation.id) && !painting.frame) onGrown(conversation, message);
  }, Math.max(30, painting.notBefore - performance.now()));
}

function paint(conversation, message) {
  painting.frame = 0;
  if (conversation !== shown.conversation || runs.get(conversation.id)?.message !== message) return;
  const began = performance.now(), stick = isAtEnd();
  viewOf(conversation, message).update();
  if (stick) scrollDown();
  painting.notBefore = performance.now() + 3 * (performance.now() - began);
}

function onEnded(conversation, message) {
  list.showList();
  if (conversation !== shown.conversation) return;
  const calls = message.tool_calls.map((call) => `The model calls ${call.function.name}; type the result.`);
  if (!failures.has(conversation.id)) announce([message.content, ...calls].join(" "));
  const follow = isAtEnd() || failures.has(conversation.id);
  showConversation();
  if (follow) scrollDown();
}

/* ---------- The end in sight ---------- */

function isAtEnd() {
  const { scrollHeight, scrollTop, clientHeight } = $("messages");
  return scrollHeight - scrollTop - clientHeight < 60;
}

function scrollDown() {
  $("messages").scrollTop = $("messages").scrollHeight;
}

/** When the composer grows or a keyboard opens, the last line stays above it. */
function keepEndInSight() {
  let atEnd = true;
  $("messages").addEventListener("scroll", () => { atEnd = isAtEnd(); });
  new ResizeObserver(() => { if (atEnd) scrollDown(); }).observe($("messages"));
}

/* ---------- The key ---------- */

/** Asks for the key; `problem` says what was wrong with the one that was given. */
function askForKey(problem) {
  $("key-problem").textContent = problem;
  $("key").setAttribute("aria-invalid", String(Boolean(problem)));
  $("key-form").hidden = false;
  $("key").value = "";
  $("key").focus();
}

async function onKey(event) {
  event.preventDefault();
  useKey($("key").value);
  $("key-form").hidden = true;
  $("input").focus();
  await connect();
  if ($("key-form").hidden && !$("retry").hidden) answers.answer(shown.conversation);
}

async function connect() {
  const { conversation } = shown;
  failures.delete(conversation.id);
  showConversation();
  await loadModels().catch((error) => {
    answers.recordFailure(conversation, error);
    showConversation();
  });
}

/* ---------- Start ---------- */

function fitInput() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight}px`;
}

function submitInput() {
  if (!answers.say(shown.conversation, $("input").value)) return;
  $("input").value = "";
  fitInput();
}

function onEscape(event) {
  if (event.key !== "Escape" || event.isComposing) return;
  if (runs.has(shown.conversation.id)) answers.stopAnswer(shown.conversation);
  else closePanels();
}

function onOtherTab(id, changed) {
  if (runs.has(id)) return;
  if (changed) conversations.set(id, changed);
  else conversations.delete(id);
  if (id !== shown.conversation.id) return list.showList();
  shown.conversation = changed ?? newConversation(shown.conversation);
  list.showList();
  showSettings();
  showConversation();
}

function saveRunning() {
  for (const [id, conversation] of conversations) if (runs.has(id)) answers.save(conversation);
}

function start() {
  Object.assign(answers.hooks, {
    mayAnswer: (conversation) => conversation !== shown.conversation || checkSettings(),
    model: chosenModel, begun: onBegun, grown: onGrown, ended: onEnded, keyRefused: askForKey,
    changed: (conversation) => { if (conversation === shown.conversation) showConversation(); },
  });
  list.hooks.open = openConversation;
  startPanels();
  list.startList();
  startSettings();
  $("new").onclick = () => openConversation(newConversation(shown.conversation));
  $("retry").onclick = () => { answers.answer(shown.conversation); $("input").focus(); };
  $("stop").onclick = () => { answers.stopAnswer(shown.conversation); $("input").focus(); };
  $("composer").onsubmit = (event) => { event.preventDefault(); submitInput(); };
  $("key-form").onsubmit = onKey;
  $("input").oninput = fitInput;
  onEnter($("input"), submitInput);
  addEventListener("keydown", onEscape);
  addEventListener("pagehide", saveRunning);
  watchOtherTabs(onOtherTab);
  keepEndInSight();
  openConversation(conversations.get(local.get(CURRENT)) ?? newConversation(byTime()[0]));
  connect();
}

start();
