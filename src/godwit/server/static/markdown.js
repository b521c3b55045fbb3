// Markdown, read by markdown-it and drawn as elements. What a model writes becomes text nodes and a short list
// of elements, never HTML; what is not Markdown is shown as it was written.

import MarkdownIt from "./vendor/markdown-it.js";
import { addFormulas } from "./formulas.js";
import { drawBlocks } from "./drawing.js";

const MAX_READ_AGAIN = 50_000; // characters of an answer that are read once more when it is complete
const ESCAPABLE = /[`*_~#>|+\-.!$<]/; // brackets keep theirs: they are formulas

/**
 * Shows `text` in `parent`. While an answer streams, only its last blocks are read and drawn again; when it is
 * `complete`, a short one is read as a whole once more, and still left alone where nothing changes.
 */
export function renderMarkdown(parent, text, complete = false) {
  const source = text.replace(/\r\n?/g, "\n");
  const before = drawn.get(parent);
  if (before?.source === source && (before.complete || !complete)) return parent;
  const again = complete && source.length < MAX_READ_AGAIN;
  const goesOn = !again && before && source.startsWith(before.source);
  const { from, kept } = goesOn ? before : { from: 0, kept: 0 };
  const tail = source.slice(from);
  const blocks = drawBlocks(parser.parse(tail, {}), !complete);
  patchChildren(parent, blocks.map(({ node }) => node), kept);
  // Lines to come can still change the last block, and where it begins also the one before.
  const settled = Math.max(0, blocks.length - 2);
  const offset = settled ? startOfLine(tail, blocks[settled].line) : 0;
  drawn.set(parent, { source, complete, from: from + offset, kept: kept + settled });
  return parent;
}

const drawn = new WeakMap(); // element -> { source, complete, from: what is read again begins here, kept: children before }

function startOfLine(text, line) {
  let at = 0;
  for (let i = 0; i < line; i++) at = text.indexOf("\n", at) + 1;
  return at;
}

/** Makes the children after the first `kept` equal to `nodes`, and replaces only those that differ. */
function patchChildren(parent, nodes, kept = 0) {
  nodes.forEach((node, i) => {
    const old = parent.childNodes[kept + i];
    if (!old) parent.append(node);
    else if (!old.isEqualNode(node)) patch(old, node);
  });
  while (parent.childNodes.length > kept + nodes.length) parent.lastChild.remove();
}

function patch(old, node) {
  if (old.nodeType === Node.TEXT_NODE && node.nodeType === Node.TEXT_NODE) old.data = node.data;
  else if (old.nodeType === Node.ELEMENT_NODE && old.cloneNode().isEqualNode(node.cloneNode()))
    patchChildren(old, [...node.childNodes]);
  else old.replaceWith(node);
}

/* ---------- The parser ---------- */

const parser = makeParser();

function makeParser() {
  const made = new MarkdownIt({ html: false, linkify: true });
  // Definitions of links and entities would vanish from the text, and underlined headings flicker while a list begins.
  made.disable(["reference", "entity", "lheading"]);
  made.inline.ruler.at("newline", newline);
  made.inline.ruler.at("escape", backslash);
  made.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
  made.linkify.add("//", null).add("ftp:", null);
  made.validateLink = (url) => /^(?:https?:\/\/|mailto:)/i.test(url);
  made.normalizeLinkText = (url) => url;
  addFormulas(made);
  return made;
}

/** Lines end where the model ended them, and what is indented stays so. */
function newline(state, silent) {
  if (state.src[state.pos] !== "\n") return false;
  if (!silent) state.pending += "\n";
  state.pos++;
  return true;
}

/** A backslash goes only where it hides a sign of Markdown; \( or C:\dir keep theirs. */
function backslash(state, silent) {
  const { src, pos } = state, next = src[pos + 1] ?? "";
  if (src[pos] !== "\\") return false;
  if (next === "\\") {
    if (!silent) state.pending += "\\\\";
  } else if (ESCAPABLE.test(next) && pos + 1 < state.posMax) {
    if (!silent) Object.assign(state.push("text_special", "", 0), { content: next, markup: `\\${next}`, info: "escape" });
  } else {
    return false;
  }
  state.pos += 2;
  return true;
}
