// The messages of a conversation.

import { canContinue, continueAnswer, giveResults, regenerate, replaceMessage, runs } from "./answers.js";
import { $, copyButton, h, onEnter, syncChildren, textButton } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { lastOf } from "./store.js";

const views = new WeakMap(); // message -> { root, update }

/** The view of a message: its element, and a function that brings it up to date. */
export function viewOf(conversation, message) {
  const make = { user: userView, assistant: answerView, tool: resultView }[message.role];
  if (!views.has(message)) views.set(message, make(conversation, message));
  return views.get(message);
}

export function showMessages(conversation) {
  const all = conversation.messages.map((message) => viewOf(conversation, message));
  syncChildren($("thread"), all.map(({ root }) => root));
  for (const { update } of all) update();
}

function fold(summary, text, className = "") {
  return h("details", { className: `fold ${className}` }, h("summary", {}, summary), h("pre", { dir: "auto" }, text));
}

/** Changes what a fold shows; a text that has only grown is not set anew. */
function setFold(details, summary, text) {
  const [first, second] = details.children;
  if (first.textContent !== summary) first.textContent = summary;
  const shown = second.firstChild?.data ?? "";
  if (shown === text) return;
  if (shown && text.startsWith(shown)) second.firstChild.appendData(text.slice(shown.length));
  else second.textContent = text;
}

/* ---------- What users edit ---------- */

/** A form in the place of a message (or of its text); `submit` takes the new text and says whether it could. */
function editForm(label, message, submit, end) {
  const rows = Math.min(12, message.content.split("\n").length + 1);
  const field = h("textarea", { value: message.content, rows, "aria-label": label, dir: "auto" });
  const onsubmit = (event) => {
    event.preventDefault();
    if (!submit(field.value)) return;
    end();
    $("input").focus();
  };
  const form = h("form", { onsubmit }, field,
    h("div", { className: "actions" },
      h("span", { className: "quiet" }, "What follows is dropped and answered anew."),
      h("button", { className: "primary", type: "submit" }, "Send"),
      h("button", { type: "button", onclick: end }, "Cancel")));
  onEnter(field, () => form.requestSubmit());
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); end(); }
  });
  return form;
}

/** A button that swaps `shown` for a form, and back. */
function editButton(conversation, message, label, shown) {
  const button = textButton("Edit", () => {
    const end = () => { form.replaceWith(shown); actions.hidden = false; button.focus(); };
    const form = editForm(label, message, (text) => replaceMessage(conversation, message, text), end);
    const actions = button.parentElement;
    actions.hidden = true;
    shown.replaceWith(form);
    form.querySelector("textarea").focus();
  });
  return button;
}

function userView(conversation, message) {
  const bubble = h("div", { className: "bubble", dir: "auto" }, message.content);
  const edit = editButton(conversation, message, "Edit your message", bubble);
  const actions = h("div", { className: "actions" }, edit, copyButton(() => message.content));
  const root = h("article", { className: "user", "aria-label": "You" }, bubble, actions);
  return { root, update: () => { edit.hidden = runs.has(conversation.id); } };
}

function resultView(conversation, message) {
  const details = fold(`Result of ${message.name}`, message.content);
  const edit = editButton(conversation, message, `Edit the result of ${message.name}`, details);
  const actions = h("div", { className: "actions" }, edit);
  const root = h("article", { className: "tool", "aria-label": "Tool" }, details, actions);
  return { root, update: () => { edit.hidden = runs.has(conversation.id); } };
}

/* ---------- Answers ---------- */

function answerView(conversation, message) {
  const parts = answerParts(conversation, message);
  let results = null;
  function update() {
    const live = runs.get(conversation.id)?.message === message, last = lastOf(conversation) === message;
    showContent(parts, message, live);
    parts.root.setAttribute("aria-busy", String(live));
    parts.stats.textContent = live ? "" : describe(message.stats);
    parts.copy.hidden = live || !message.content;
    parts.again.hidden = !last || runs.has(conversation.id);
    parts.more.hidden = parts.again.hidden || !canContinue(conversation);
    const wanted = last && !live && message.tool_calls.length > 0;
    if (wanted && !results) parts.actions.before((results = resultsForm(conversation, message)));
    if (results) results.hidden = !wanted;
  }
  return { root: parts.root, update };
}

function answerParts(conversation, message) {
  const thinking = fold("", "", "thinking"), body = h("div", { className: "markdown", dir: "auto" });
  const calls = h("div"), stats = h("span", { className: "quiet" });
  const copy = copyButton(() => message.content);
  const button = (label, act) => textButton(label, () => { act(conversation); $("input").focus(); });
  const again = button("Regenerate", regenerate), more = button("Continue", continueAnswer);
  const actions = h("div", { className: "actions" }, copy, again, more, stats);
  const root = h("article", { "aria-label": "Model" }, thinking, body, calls, actions);
  return { root, thinking, body, calls, stats, copy, again, more, actions };
}

function showContent({ thinking, body, calls }, message, live) {
  thinking.hidden = !message.reasoning_content;
  setFold(thinking, thoughtLabel(message, live), message.reasoning_content.trim());
  renderMarkdown(body, message.content, !live);
  body.classList.toggle("waiting", live && !message.content && !message.tool_calls.length);
  showCalls(calls, message.tool_calls);
}

function thoughtLabel({ stats }, live) {
  if (live && stats.thought === undefined) return "Thinking …";
  return stats.thought > 0 ? `Thought for ${stats.thought.toFixed(1)} s` : "Thinking";
}

function showCalls(parent, calls) {
  calls.forEach((call, i) => {
    const details = parent.children[i] ?? parent.appendChild(fold("", ""));
    setFold(details, `Call of ${call.function.name}`, readable(call.function.arguments));
  });
  while (parent.children.length > calls.length) parent.lastChild.remove();
}

function readable(json) {
  try { return JSON.stringify(JSON.parse(json), null, 2); } catch { return json; }
}

/** A form for what the called tools return; an empty field stands for success. */
function resultsForm(conversation, { tool_calls: calls }) {
  const fields = calls.map((call) => {
    const { name, arguments: given } = call.function;
    const field = h("textarea", { className: "code", rows: 2, placeholder: '{"success": true}' });
    return { call, field, label: h("label", {}, `Result of ${name}(${given.length > 200 ? "…" : given})`, field) };
  });
  const form = h("form", { className: "results" }, fields.map(({ label }) => label),
    h("button", { type: "submit", className: "primary" }, calls.length > 1 ? "Send results" : "Send result"));
  form.onsubmit = (event) => {
    event.preventDefault();
    const results = fields.map(({ call, field }) => ({ call, content: field.value || field.placeholder }));
    if (giveResults(conversation, results)) $("input").focus();
  };
  for (const { field } of fields) onEnter(field, () => form.requestSubmit());
  return form;
}

/** What an answer has cost: tokens, speed, the wait for the first token, the part of the prompt that was reused. */
function describe({ generated, latest = generated, prompt, cached, first, last, finish }) {
  const parts = [];
  if (generated > 0 || latest === 0) parts.push(`${generated} token${generated === 1 ? "" : "s"}`);
  if (latest > 1 && last - first > 0.001) parts.push(`${((latest - 1) / (last - first)).toFixed(1)} tok/s`);
  if (first >= 0) parts.push(`first after ${first.toFixed(2)} s`);
  if (prompt >= 0 && cached >= 0) parts.push(`${cached} of ${prompt} prompt tokens cached`);
  if (finish === "stopped") parts.push("stopped");
  if (finish === "length") parts.push("cut off at the length limit");
  return parts.join(" · ");
}
