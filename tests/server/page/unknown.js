// The names of all that a drawing of Markdown must not hold: whatever is new has to be allowed here first.
(root) => {
  const tags = "h3 h4 h5 h6 p ul ol li blockquote div table thead tbody tr th td hr span button pre code em strong s a";
  const svg = ["svg", "path", "line"];
  const isMath = (element) => element.namespaceURI.endsWith("/MathML") && !element.matches("a, [href]");
  const found = [];
  for (const element of root.querySelectorAll("*")) {
    const isLink = element.localName === "a", isFormula = element.closest(".katex") !== null;
    const known = isFormula ? element.localName === "span" || svg.includes(element.localName) || isMath(element)
      : tags.split(" ").includes(element.localName);
    if (!known) found.push(element.localName);
    for (const { name } of element.attributes) {
      const allowed = ["class", "type", "start", "tabindex", "role", "aria-label"];
      const ofLinks = ["href", "title", "target", "rel"], dangerous = /^on|href|src|action|^id$/.test(name);
      if (isFormula ? dangerous : !allowed.includes(name) && !(isLink && ofLinks.includes(name))) found.push(name);
    }
    if (isLink && !(/^https?:\/\//.test(element.href) && element.rel.includes("noopener"))) found.push(`link ${element.href}`);
  }
  return found;
}
