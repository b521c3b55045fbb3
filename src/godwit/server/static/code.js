// Blocks of code and their colours.

import hljs from "./vendor/highlight.js";
import { copyButton, h } from "./dom.js";

const MAX_LENGTH = 100_000; // characters that are coloured
const MAX_GROWING = 20_000; // the same while the block still grows
const SCROLLS = { tabIndex: 0, role: "group", "aria-label": "Code" }; // also by keyboard
const PIECES = /<span class="([^"]*)">|(<\/span>)|([^<]+)/g;
const ENTITIES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#x27;": "'" };

/** A block of code with its language and a button that copies it. */
export function codeBlock(text, info, growing) {
  const language = info.trim().split(/\s+/, 1)[0];
  const code = h("code", {}, coloured(text, language, growing ? MAX_GROWING : MAX_LENGTH));
  // The block may be drawn anew around the button, so the button looks for its code when it is used.
  const button = copyButton(() => button.closest(".block").querySelector("code").textContent);
  const bar = h("div", { className: "bar" }, h("span", { className: "quiet" }, info.trim()), button);
  return h("div", { className: "block" }, bar, h("pre", SCROLLS, code));
}

/** Nodes for code, with colours where the language is known. */
function coloured(text, language, limit) {
  if (text.length > limit || !hljs.getLanguage(language)) return [text];
  const root = h("code");
  let parent = root;
  for (const [, opened, closed, words] of hljs.highlight(text, { language, ignoreIllegals: true }).value.matchAll(PIECES)) {
    if (words) parent.append(words.replace(/&(?:amp|lt|gt|quot|#x27);/g, (entity) => ENTITIES[entity]));
    else if (closed) parent = parent.parentNode;
    else parent = parent.appendChild(h("span", { className: opened }));
  }
  return root.textContent === text ? [...root.childNodes] : [text];
}
