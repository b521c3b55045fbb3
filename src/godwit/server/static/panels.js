// The list and the settings, which lie over the messages on a narrow screen; light and dark.

import { $, isNarrow } from "./dom.js";
import { local } from "./store.js";

const PANELS = ["settings", "list"];
const THEME = "godwit.theme";

export function startPanels() {
  showTheme();
  setPanel("list", !isNarrow());
  setPanel("settings", false);
  $("list-button").onclick = () => togglePanel("list", $("new"));
  $("settings-button").onclick = () => togglePanel("settings", $("system"));
  $("settings-close").onclick = () => { setPanel("settings", false); $("settings-button").focus(); };
  $("theme-button").onclick = toggleTheme;
  document.querySelector("main").addEventListener("click", onTap);
  addEventListener("storage", ({ key }) => { if (key === THEME) showTheme(); });
}

export function setPanel(id, open) {
  $(id).hidden = !open;
  $(`${id}-button`).setAttribute("aria-expanded", String(open));
}

function togglePanel(id, first) {
  setPanel(id, $(id).hidden);
  if (!$(id).hidden) first.focus();
}

/** Closes the panels that lie over the messages, or the one with the focus; the list stays where there is room. */
export function closePanels() {
  for (const id of PANELS) {
    if ($(id).hidden || !(isNarrow() || (id === "settings" && $(id).contains(document.activeElement)))) continue;
    setPanel(id, false);
    $(`${id}-button`).focus();
  }
}

/** On a narrow screen, a tap beside a panel closes it. */
function onTap(event) {
  if (!isNarrow() || event.target.closest("[aria-controls]")) return;
  for (const id of PANELS) setPanel(id, false);
}

/** Light and dark as the system has it, until the button says otherwise; back again it follows the system. */
function toggleTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const theme = (local.get(THEME) ?? system) === "dark" ? "light" : "dark";
  if (theme === system) local.remove(THEME);
  else local.set(THEME, theme);
  showTheme();
}

function showTheme() {
  document.documentElement.dataset.theme = local.get(THEME) ?? "";
}
