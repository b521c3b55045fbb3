"""Mathematics in what a model writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.server.page.actor import Server, delta, text
from tests.server.page.steps import say, settled, shown

if TYPE_CHECKING:
    from playwright.sync_api import Page

PARTS = """(source) => {
  const root = renderMarkdown(document.createElement("div"), source);
  const formulas = [...root.querySelectorAll(".formula")].map((each) => {
    const written = each.querySelector("annotation").textContent.trim();
    return (each.classList.contains("display") ? "display " : "") + written;
  });
  for (const each of root.querySelectorAll(".formula")) each.replaceWith("#");
  return [formulas, root.textContent];
}"""
FORMULAS = [
    (r"The area \(a^2\) grows", ["a^2"], "The area # grows"),
    (r"with $e^{i\pi} + 1 = 0$, $2$ and ($x_1$)", [r"e^{i\pi} + 1 = 0", "2", "x_1"], "with #, # and (#)"),
    ("so $$x *y* z$$ and\n$$\na\n\n- b\n$$\nend", ["display x *y* z", "display a\n\n- b"], "so # and#end"),
    ("\\[\na_1 + b_1\n\\]", ["display a_1 + b_1"], "#"),
    ("- item\n\n  \\[ x \\].\n- $y$", ["display x", "y"], "item#.#"),
    (r"| \(x\) | $y$ |" + "\n|--|--|\n| 1 | \\\\(2 |", ["x", "y"], None),
    ("\\begin{align*}\na &= b\n\\end{align*}", ["display \\begin{align*}\na &= b\n\\end{align*}"], "#"),
    (r"[a \(b\) c](https://x.org) and **$d$**", ["b", "d"], "a # c and #"),
]
PLAIN = [
    "$5 and $6",
    "US$5, 6$ or $7-$8",
    "between $5 million and $6 million, $5 per box or 3 for 10$",
    "$HOME/bin:$PATH and a$b$c",
    r"\(a and \[b",
    r"\$5\$",
    "$ x $ and $$ $$",
    "`$a$` and `\\(b\\)`",
    "```\n$$\nx\n$$\n```",
    r"\(\frac{a\)",
    r"$\undefined{x}$",
    "$$\nx is still",
]


@pytest.mark.parametrize(("source", "formulas", "rest"), FORMULAS)
def test_what_is_mathematics(canvas: Page, source: str, formulas: list[str], rest: str | None) -> None:
    found, words = canvas.evaluate(PARTS, source)
    assert found == formulas
    if rest is not None:
        assert words == rest


@pytest.mark.parametrize("source", PLAIN)
def test_what_is_no_mathematics_stays_as_it_was_written(canvas: Page, source: str) -> None:
    found, words = canvas.evaluate(PARTS, source)
    assert found == []
    assert words.removeprefix("Copy") == source.replace("`", "").replace(r"\$", "$").strip()


def test_a_formula_while_it_comes(page: Page, server: Server) -> None:
    """Its fonts are there, the policy lets it be drawn, and the copy is what the model wrote."""
    source = "It is\n\\[\nx = \\frac{1}{2}\n\\]\n"
    server.replies.append([delta(content=source[:12]), *text(source[12:])])
    say(page, "Formula?")
    answer = settled(page)
    shown(page, "It is").locator(".katex-html").wait_for()
    page.evaluate("document.fonts.ready")
    fonts = page.evaluate("[...document.fonts].filter((f) => f.status === 'loaded').map((f) => f.family)")
    assert {"KaTeX_Main", "KaTeX_Math"} <= set(fonts)
    page.evaluate("navigator.clipboard.writeText = async (text) => { copied = text; }")
    answer.locator(".actions").get_by_role("button", name="Copy").click()
    answer.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("copied") == source


def test_a_formula_cannot_lie_over_the_page(page: Page, server: Server) -> None:
    server.replies.append(
        text(r"\[\rule{19em}{19em}\kern{-19em}\raisebox{-19em}{\rule{19em}{19em}}\] $\raisebox{19em}{x}$")
    )
    say(page, "Black?")
    settled(page)
    box = page.locator("#send").bounding_box()
    assert box is not None
    at = "([x, y]) => document.elementFromPoint(x, y).id"
    assert page.evaluate(at, [box["x"] + box["width"] / 2, box["y"] + box["height"] / 2]) == "send"
