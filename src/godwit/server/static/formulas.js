// Mathematics: where it begins and ends in Markdown, and how KaTeX draws it.

import "./vendor/katex.js"; // sets the global `katex`
import { h } from "./dom.js";

const { katex } = globalThis;
const MAX_LENGTH = 5000; // characters of one formula that are drawn
const MAX_LINES = 60; // of a formula that stands by itself
const MAX_CACHED = 500;
const ENVIRONMENT = /^\\begin\{((?:equation|align|alignat|gather|multline)\*?)\}/;
const OPTIONS = { output: "htmlAndMathml", throwOnError: true, trust: false, strict: "ignore", maxSize: 20, maxExpand: 500 };

const drawn = new Map(); // written form -> element

/** The element for a formula; one that KaTeX cannot read is shown as it was written. */
export function formula(source, written, display) {
  const key = `${display}${written}`;
  if (!drawn.has(key)) {
    if (drawn.size >= MAX_CACHED) drawn.clear();
    drawn.set(key, draw(source, written, display));
  }
  return drawn.get(key).cloneNode(true);
}

function draw(source, written, display) {
  const element = h("span", { className: display ? "formula display" : "formula" });
  try {
    if (source.length > MAX_LENGTH) throw new Error("too long");
    katex.render(source, element, { ...OPTIONS, displayMode: display });
    if (display) element.tabIndex = 0; // it may have to be scrolled
    return element;
  } catch {
    return h("span", { className: "unread" }, written);
  }
}

/** Teaches a markdown-it parser about formulas. */
export function addFormulas(parser) {
  parser.inline.ruler.before("escape", "formula", inlineFormula);
  parser.block.ruler.before("table", "formula", blockFormula, { alt: ["paragraph", "blockquote", "list"] });
}

/* ---------- Within a paragraph ---------- */

function inlineFormula(state, silent) {
  const found = bracketed(state) ?? dollars(state);
  if (!found) return false;
  const { mark, end, display } = found, from = state.pos + mark.length;
  const source = state.src.slice(from, end);
  if (!silent) {
    const token = state.push("formula", "", 0);
    token.content = source;
    token.meta = { display, written: state.src.slice(state.pos, end + mark.length) };
  }
  state.pos = end + mark.length;
  return true;
}

function bracketed(state) {
  const mark = state.src.slice(state.pos, state.pos + 2);
  if (mark !== "\\(" && mark !== "\\[") return null;
  const end = find(state, mark === "\\(" ? "\\)" : "\\]", state.pos + 2);
  return end > 0 ? { mark, end, display: mark === "\\[" } : null;
}

/** $$...$$, or $...$ where it cannot be two prices or two variables of a shell. */
function dollars(state) {
  const { src, pos } = state;
  if (src[pos] !== "$" || src[pos - 1] === "$") return null;
  const mark = src[pos + 1] === "$" ? "$$" : "$";
  const end = find(state, mark, pos + mark.length);
  if (end <= pos + mark.length) return null;
  const inner = src.slice(pos + mark.length, end);
  if (mark === "$$") return inner.trim() && { mark, end, display: true };
  const tight = !/^\s|\s$/.test(inner) && !/[\p{L}\p{N}\\]$/u.test(src.slice(0, pos).slice(-2));
  const price = /^\d[\d.,]*\s+\p{L}{2,}/u.test(inner);
  return tight && !price && !/^[\p{L}\p{N}$]/u.test(src.slice(end + 1)) ? { mark, end, display: false } : null;
}

/** Where `mark` is next, or -1; remembers from where on there is none, so that time does not grow with the square. */
function find(state, mark, from) {
  const absent = absentIn(state);
  if (from >= absent[mark]) return -1;
  let end = state.src.indexOf(mark, from);
  while (mark === "$" && end > 0 && state.src[end - 1] === "\\") end = state.src.indexOf(mark, end + 1);
  if (end < 0) absent[mark] = from;
  return end;
}

function absentIn({ env, src }) {
  env.absent ??= new Map();
  if (!env.absent.has(src)) env.absent.set(src, {});
  return env.absent.get(src);
}

/* ---------- By itself ---------- */

function blockFormula(state, first, last, silent) {
  const lineAt = (line) => state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]);
  if (state.sCount[first] - state.blkIndent >= 4) return false;
  const opener = openerOf(lineAt(first));
  if (!opener) return false;
  const { mark, closer, oneParagraph } = opener;
  for (let line = first; line <= first + MAX_LINES; line++) {
    if (line >= last) return oneParagraph ? false : push(state, first, last, null, silent); // it still comes
    const text = lineAt(line);
    const outside = text && state.sCount[line] < state.blkIndent;
    if (outside || text.startsWith("```") || (oneParagraph && !text)) return false;
    const end = text.indexOf(closer, line === first ? mark.length : 0);
    if (end < 0) continue;
    if (!/^[\s.,;:]*$/.test(text.slice(end + closer.length))) return false;
    return push(state, first, line + 1, opener, silent);
  }
  return false;
}

function openerOf(text) {
  const environment = ENVIRONMENT.exec(text);
  if (environment) return { mark: environment[0], closer: `\\end{${environment[1]}}`, whole: true };
  if (text.startsWith("\\[")) return { mark: "\\[", closer: "\\]" };
  if (text.startsWith("$$")) return { mark: "$$", closer: "$$", oneParagraph: text.trim() !== "$$" };
  return null;
}

/** A token for these lines: a formula, or without an opener a text that will be one. */
function push(state, first, end, opener, silent) {
  if (silent) return true;
  const written = state.getLines(first, end, state.blkIndent, false).trim();
  const token = state.push(opener ? "formula_block" : "formula_begun", "", 0);
  token.map = [first, end];
  token.meta = { written, display: true };
  token.content = written;
  if (opener && !opener.whole) {
    const at = written.lastIndexOf(opener.closer);
    token.content = written.slice(opener.mark.length, at);
    token.meta.rest = written.slice(at + opener.closer.length);
  }
  state.line = end;
  return true;
}
