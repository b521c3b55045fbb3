// The settings of a conversation, the choice of the model, and its defaults.

import { save } from "./answers.js";
import { fetchModels, parseTools } from "./api.js";
import { $, h } from "./dom.js";
import { setPanel } from "./panels.js";
import { SAMPLING, local, shown } from "./store.js";

const MODEL = "godwit.model";
const UNSET = { max_tokens: "no limit", seed: "random" };

export function startSettings() {
  $("settings-form").oninput = readSettings;
  $("settings-form").onsubmit = (event) => event.preventDefault();
  $("model").onchange = () => { local.set(MODEL, $("model").value); showDefaults(); };
}

export function showSettings() {
  const { system, tools, sampling } = shown.conversation;
  $("system").value = system;
  $("tools").value = tools;
  for (const name of SAMPLING) $(name).value = sampling[name] ?? "";
  checkTools();
}

function readSettings() {
  const { conversation } = shown;
  conversation.system = $("system").value;
  conversation.tools = $("tools").value;
  for (const name of SAMPLING) conversation.sampling[name] = $(name).value;
  checkTools();
  save(conversation, conversation.updated);
}

function checkTools() {
  let problem = "";
  try { parseTools($("tools").value); } catch (error) { problem = error.message; }
  $("tools").setCustomValidity(problem);
  $("tools-problem").textContent = problem;
}

/** Whether the settings are right; wrong ones are shown. */
export function checkSettings() {
  if ($("settings-form").checkValidity()) return true;
  setPanel("settings", true);
  return $("settings-form").reportValidity();
}

/* ---------- Models ---------- */

const defaults = new Map(); // name of a model -> what it does where a setting is left open

export async function loadModels() {
  const models = await fetchModels();
  const chosen = $("model").value || local.get(MODEL);
  $("model").replaceChildren(...models.map(({ id }) => h("option", { value: id, selected: id === chosen }, id)));
  for (const { id, default_sampling: own } of models) defaults.set(id, own ?? {});
  showDefaults();
}

/** The name of the model to ask. */
export async function chosenModel() {
  if (!$("model").value) await loadModels();
  return $("model").value;
}

function showDefaults() {
  const own = defaults.get($("model").value) ?? {};
  for (const name of SAMPLING) {
    const value = own[name];
    $(name).placeholder = typeof value === "number" ? String(value) : UNSET[name] ?? "default";
  }
}
