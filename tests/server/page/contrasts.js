// The smallest contrast between a visible text and what lies behind it (as WCAG 2 defines it), and where it is.
() => {
  const parts = (colour) => colour.match(/[\d.]+/g).map(Number);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (element) => {
    const colour = parts(getComputedStyle(element).backgroundColor);
    return colour[3] === 0 ? behind(element.parentElement) : colour;
  };
  const hasText = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  const contrast = (element) => {
    const [low, high] = [parts(getComputedStyle(element).color), behind(element)].map(luminance).sort((a, b) => a - b);
    return [(high + 0.05) / (low + 0.05), element.outerHTML.slice(0, 200)];
  };
  const shown = [...document.body.querySelectorAll("*")].filter((element) => element.checkVisibility() && hasText(element));
  return shown.map(contrast).sort(([a], [b]) => a - b)[0];
}
