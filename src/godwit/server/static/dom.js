// Small helpers for elements, buttons and the clipboard.

export const $ = (id) => document.getElementById(id);

/** An element with properties (or, where it has no such property, attributes) and children: nodes or texts. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  for (const child of children.flat()) element.append(child);
  return element;
}

/** Makes `nodes` the children of `parent` and leaves alone those that are in place already. */
export function syncChildren(parent, nodes) {
  nodes.forEach((node, i) => {
    if (parent.childNodes[i] !== node) parent.insertBefore(node, parent.childNodes[i] ?? null);
  });
  while (parent.childNodes.length > nodes.length) parent.lastChild.remove();
}

export function iconButton(name, label, onclick) {
  const [svg, use] = ["svg", "use"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return h("button", { type: "button", className: "icon", title: label, "aria-label": label, onclick }, svg);
}

export function textButton(label, onclick) {
  return h("button", { type: "button", className: "small", onclick }, label);
}

export function copyButton(text) {
  const button = textButton("Copy", () => copyText(text(), button));
  return button;
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not allowed, or a page that came over plain HTTP from another machine
    const field = h("textarea", { value: text, className: "sr-only" });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    button.focus();
  }
  button.textContent = "Copied";
  announce("Copied");
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

/** Tells users of screen readers. */
export function announce(text) {
  $("status").textContent = text.slice(0, 2000);
}

/** Submits on Enter, but not with Shift, nor while an input method composes, nor on a touch screen's keyboard. */
export function onEnter(field, submit) {
  field.addEventListener("keydown", (event) => {
    const other = event.key !== "Enter" || event.shiftKey || event.isComposing;
    if (other || matchMedia("(pointer: coarse)").matches) return;
    event.preventDefault();
    submit();
  });
}

/** Offers `text` as a file. */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

export const isNarrow = () => matchMedia("(max-width: 50rem)").matches;
