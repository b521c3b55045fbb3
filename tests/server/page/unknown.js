// The names of all that a drawing of Markdown must not hold: whatever is new has to be allowed here first.
(root) => {
  const tags = "h3 h4 h5 h6 p ul ol li blockquote div table thead tbody tr th td hr span button pre code em strong del a";
  const found = [];
  for (const element of root.querySelectorAll("*")) {
    const isLink = element.localName === "a";
    const names = ["class", "type", "start", ...(isLink ? ["href", "title", "target", "rel"] : [])];
    if (!tags.split(" ").includes(element.localName)) found.push(element.localName);
    for (const { name } of element.attributes) if (!names.includes(name)) found.push(name);
    if (isLink && !(/^https?:\/\//.test(element.href) && element.rel.includes("noopener"))) found.push(`link ${element.href}`);
  }
  return found;
}
