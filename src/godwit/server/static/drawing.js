// The elements for what a Markdown parser has read.

import { codeBlock } from "./code.js";
import { h } from "./dom.js";
import { formula } from "./formulas.js";

const MAX_DEPTH = 60; // elements within each other; deeper ones lose their form, not their text
const PLAIN = new Set("p ul ol li blockquote table thead tbody tr th td em strong s".split(" "));
const LINK = { target: "_blank", rel: "noopener noreferrer" };

/** The blocks of a text with the line each begins at; `growing`: more of the text is to come. */
export function drawBlocks(tokens, growing) {
  const root = h("div"), stack = [root], blocks = [];
  for (const token of tokens) {
    if (token.level === 0 && token.nesting >= 0) blocks.push({ line: token.map[0], at: root.childNodes.length });
    if (token.type === "inline") drawInline(token, stack.at(-1));
    else if (token.nesting > 0) stack.push(opened(token, stack));
    else if (token.nesting < 0) stack.pop();
    else stack.at(-1).append(leaf(token, growing && token === tokens.at(-1)));
  }
  const nodes = [...root.childNodes];
  return blocks.map(({ line, at }) => ({ line, node: nodes[at] }));
}

/** The element that a token opens, in its place; the parent again where there is none. */
function opened(token, stack) {
  const parent = stack.at(-1);
  if (token.hidden || stack.length > MAX_DEPTH) return parent;
  const element = elementOf(token);
  parent.append(token.tag === "table" ? scroller(element) : element);
  return element;
}

function elementOf(token) {
  const { tag } = token;
  if (/^h[1-6]$/.test(tag)) {
    const level = Number(tag[1]);
    return h(`h${Math.min(6, level + 2)}`, { className: `heading level${level}` });
  }
  if (tag === "a") return link(token.attrGet("href"), []);
  if (!PLAIN.has(tag)) return h("span");
  const element = h(tag);
  if (tag === "ol" && token.attrGet("start") !== null) element.start = Number(token.attrGet("start"));
  const side = /text-align:(right|center)/.exec(token.attrGet("style") ?? "");
  if (side) element.className = side[1];
  return element;
}

/** A wide table scrolls by itself, also by keyboard. */
function scroller(table) {
  return h("div", { className: "table", tabIndex: 0, role: "region", "aria-label": "Table" }, table);
}

function leaf(token, growing) {
  const { type, content, info, meta } = token;
  if (type === "fence" || type === "code_block") return codeBlock(content.replace(/\n$/, ""), info, growing);
  if (type === "hr") return h("hr");
  if (type === "formula_block") return h("p", {}, formula(content, meta.written, true), meta.rest ?? "");
  return h("p", {}, content);
}

function drawInline({ children }, parent) {
  const stack = [parent];
  for (const token of children) {
    if (token.nesting > 0) stack.push(opened(token, stack));
    else if (token.nesting < 0) stack.pop();
    else stack.at(-1).append(...inlineLeaf(token));
  }
  drawCheckbox(parent);
  parent.normalize();
}

/** The sign for "[ ] " or "[x] " at the beginning of a list's item. */
function drawCheckbox(parent) {
  const item = parent.closest("li"), text = parent.firstChild;
  if (!item || (item !== parent && item.firstChild !== parent) || text?.nodeType !== Node.TEXT_NODE) return;
  text.data = text.data.replace(/^\[([ xX])\] /, (_, mark) => (mark === " " ? "☐ " : "☑ "));
}

function inlineLeaf(token) {
  const { type, content, meta } = token;
  if (type === "code_inline") return [h("code", {}, content)];
  if (type === "formula") return [formula(content, meta.written, meta.display)];
  if (type === "image") return [link(token.attrGet("src"), [content || token.attrGet("src")])]; // nothing is fetched
  return content ? [content] : [];
}

/** A link that leads where it says; anything but a page or a mail address is no link. */
function link(target, label) {
  const url = URL.canParse(target) ? new URL(target) : null;
  if (!["https:", "http:", "mailto:"].includes(url?.protocol)) return h("span", {}, ...label);
  return h("a", { href: url.href, title: url.href, ...LINK }, ...label);
}
