// The list of conversations: search, rename, export, import, delete.

import { runs, save, stopAnswer } from "./answers.js";
import { $, announce, download, h, iconButton } from "./dom.js";
import { byTime, conversations, forget, newConversation, search, shown } from "./store.js";
import { addConversations, exported, fileName, imported } from "./transfer.js";

/** What the page does when a conversation is chosen. */
export const hooks = { open: () => {} };

export function startList() {
  $("search").oninput = () => { showList(); announce(`${$("conversations").children.length} found`); };
  $("import").onclick = () => $("import-file").click();
  $("import-file").onchange = importFiles;
  $("export-all").onclick = exportAll;
}

export function showList() {
  const held = document.activeElement?.closest?.("#conversations li")?.dataset.id;
  const found = search($("search").value);
  $("conversations").replaceChildren(...found.map(listItem));
  $("none-found").hidden = found.length > 0 || !conversations.size;
  $("export-all").hidden = !conversations.size;
  if (held) $("conversations").querySelector(`[data-id="${CSS.escape(held)}"] button`)?.focus();
}

function listItem(conversation) {
  const item = h("li");
  item.dataset.id = conversation.id;
  const { title } = conversation, onclick = () => hooks.open(conversation);
  const button = h("button", { type: "button", className: "title", title, onclick }, title);
  if (conversation === shown.conversation) {
    item.dataset.current = "";
    button.setAttribute("aria-current", "true");
  }
  item.append(button,
    iconButton("rename", "Rename", () => renameConversation(conversation)),
    iconButton("export", "Export as JSON", () => exportConversation(conversation)),
    iconButton("delete", "Delete", () => deleteConversation(conversation)));
  return item;
}

function renameConversation(conversation) {
  const title = prompt("New name", conversation.title)?.trim();
  if (!title) return;
  conversation.title = title.slice(0, 120);
  save(conversation, conversation.updated);
  showList();
}

function deleteConversation(conversation) {
  if (!confirm(`Delete "${conversation.title}"?`)) return;
  if (runs.has(conversation.id)) stopAnswer(conversation);
  forget(conversation);
  const { conversation: current } = shown;
  hooks.open(conversation === current ? byTime()[0] ?? newConversation(current) : current);
}

const inFile = (content) => `${JSON.stringify(content, null, 2)}\n`;

function exportConversation(conversation) {
  download(fileName(conversation), inFile(exported(conversation, $("model").value)));
}

function exportAll() {
  download("conversations.json", inFile(byTime().map((each) => exported(each, $("model").value))));
}

async function importFiles() {
  const added = [];
  $("import-problem").textContent = "";
  try {
    for (const file of $("import-file").files) added.push(...imported(await file.text(), file.name));
  } catch (error) {
    $("import-problem").textContent = error.message;
    return;
  } finally {
    $("import-file").value = ""; // so that the same file can be chosen again
  }
  addConversations(added);
  for (const conversation of added) save(conversation, conversation.updated);
  $("search").value = "";
  announce(`${added.length} imported`);
  hooks.open(added[0]);
}
