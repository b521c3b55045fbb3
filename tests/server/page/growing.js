// Draws random texts at once and piece by piece; returns those that differ, hold `unknown` elements or lose a word.
(unknown, rounds) => {
  const pieces = ["word", "word", " ", "\n", "\n\n", "**", "*", "_", "`", "```", "~~~", "\n```py\n", "~~", "# ", "- ", "1. ", "> ", "|",
    "\n|--|--|\n", "  ", "    ", "[", "](", "](https://x.org)", ")", "https://y.org/", "\\", "<b>", "---", "\t", "\r\n", "=", ".",
    "\\(", "\\)", "\\[", "\\]", "$", "\n$$\n", "\n\\[\n", "\n\\]\n", "&amp;", "^2"];
  let seed = 7;
  const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
  const words = (text) => text.split("word").length;
  const wrong = [];
  for (let round = 0; round < rounds; round++) {
    const parts = Array.from({ length: 1 + random(40) }, () => pieces[random(pieces.length)]), text = parts.join("");
    const whole = renderMarkdown(document.createElement("div"), text), grown = document.createElement("div");
    parts.forEach((_, i) => renderMarkdown(grown, parts.slice(0, i + 1).join("")));
    const again = grown.innerHTML;
    renderMarkdown(grown, text, true);
    const addresses = [...whole.querySelectorAll("a")].map(({ href }) => href).join("");
    // Tables drop the cells beyond their columns, links their addresses, formulas what they cannot show twice.
    const lost = !whole.querySelector("table") && words(whole.textContent + addresses) < words(text);
    if (whole.innerHTML !== again || whole.innerHTML !== grown.innerHTML || unknown(whole).length || lost)
      wrong.push([text, whole.innerHTML, again, unknown(whole)]);
  }
  return wrong.slice(0, 5);
}
