"""What a model writes becomes elements that can do no harm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.server.page.actor import Server, call, delta, text
from tests.server.page.steps import say, settled

if TYPE_CHECKING:
    from playwright.sync_api import Page

HERE = Path(__file__).parent
UNKNOWN = (HERE / "unknown.js").read_text("utf-8")
GROWING = (HERE / "growing.js").read_text("utf-8")
HOSTILE = (
    "<script>hacked = 1</script>",
    "<img src=x onerror=hacked=1>",
    "[a](javascript:hacked=1)",
    "[a](JaVaScRiPt:hacked=1) ![a](data:text/html,x) <a href='javascript:hacked=1'>x</a>",
    '[a](https://x.org/"onmouseover="hacked=1) https://x.org/"><script>hacked=1</script>',
    "```<img src=x onerror=hacked=1>\n</code></pre><script>hacked=1</script>",
    "|<svg onload=hacked=1>|b|\n|---|---|\n|<iframe srcdoc='<script>parent.hacked=1</script>'>|c|",
    "[a](vbscript:x) [b](//x.org) [c](https://user@x.org:99999/) [d](http://[bad)",
)
REPEATED = (
    "*",
    "*a ",
    "a* **b",
    "`",
    "` ``",
    "[",
    "[a](http://",
    "> ",
    "> a",
    "- ",
    "- a\n",
    "  - a\n",
    "1. a\n",
    "|",
)
MORE = (
    "```\n\n",
    "~~x **y _z ",
    "#",
    "(",
    "\\",
    " ",
    "\t",
    "|a|\n|-|\n",
    "https://",
    "_a",
    "<",
    "a\n",
    "![",
    "- > ",
)
NONSENSE = (
    *(piece * (200_000 // len(piece)) for piece in REPEATED + MORE),
    "|a" * 30_000 + "\n" + "|-" * 30_000 + "\n" + "|b\n" * 30_000,
    "```" + "a" * 100_000 + "\na" * 50_000,
    "\n".join(" " * 2 * depth + "- a" for depth in range(500)),
)


def drawing(page: Page, source: str) -> str:
    return str(page.evaluate("(s) => renderMarkdown(document.createElement('div'), s).innerHTML", source))


def test_inside_a_paragraph(page: Page) -> None:
    source = "**bold** and *it* and `co<de>`, ***both***, ~~gone~~, snake_case_name, 2 * 3, \\*no\\*, **open"
    assert drawing(page, source) == (
        "<p><strong>bold</strong> and <em>it</em> and <code>co&lt;de&gt;</code>, "
        "<strong><em>both</em></strong>, <del>gone</del>, snake_case_name, 2 * 3, *no*, **open</p>"
    )


def test_links(page: Page) -> None:
    kept = 'target="_blank" rel="noopener noreferrer"'
    assert drawing(page, "See http://x.org/a_b. Or [he*r*e](https://x.org/x_(y)).") == (
        f'<p>See <a href="http://x.org/a_b" title="http://x.org/a_b" {kept}>http://x.org/a_b</a>. Or '
        f'<a href="https://x.org/x_(y)" title="https://x.org/x_(y)" {kept}>he<em>r</em>e</a>.</p>'
    )


def test_blocks(page: Page) -> None:
    source = "# One *two*\npara\ngraph\n- a\n  1. b\n- [x] c\n\n  d\n> quoted\n> - e\n\n---\n7) seven"
    assert drawing(page, source) == (
        '<h3 class="heading level1">One <em>two</em></h3><p>para\ngraph</p>'
        '<ul><li><p>a</p><ol start="1"><li><p>b</p></li></ol></li><li><p>☑ c</p><p>d</p></li></ul>'
        "<blockquote><p>quoted</p><ul><li><p>e</p></li></ul></blockquote><hr>"
        '<ol start="7"><li><p>seven</p></li></ol>'
    )


def test_code_in_a_list_loses_the_indent_of_the_list(page: Page) -> None:
    source = "1. a\n   ```\n   if x:\n     y\n   ```\n2. b"
    assert "<code>if x:\n  y</code>" in drawing(page, source)
    assert drawing(page, source).count("<li>") == 2


def test_tables(page: Page) -> None:
    assert drawing(page, "| x | y |\n|:--|--:|\n| 1 \\| 2 | **2** | more |\n| only |") == (
        '<div class="table"><table><thead><tr><th class="">x</th><th class="right">y</th></tr></thead>'
        '<tbody><tr><td class="">1 | 2</td><td class="right"><strong>2</strong></td></tr>'
        '<tr><td class="">only</td></tr></tbody></table></div>'
    )


@pytest.mark.parametrize("close", ["\n```", "\n```\n", "", "\n"])
def test_blocks_of_code(page: Page, close: str) -> None:
    code = "if a < b:\n\n    **no**\n~~~"
    button = '<button type="button" class="small">Copy</button>'
    rest = "\n" if close == "\n" else ""
    kept = f"<pre><code>{code.replace('<', '&lt;')}{rest}</code></pre>"
    bar = f'<div class="bar"><span class="quiet">py</span>{button}</div>'
    assert drawing(page, f"```py\n{code}{close}") == f'<div class="block">{bar}{kept}</div>'


@pytest.mark.parametrize("source", HOSTILE)
def test_what_a_model_writes_stays_text(page: Page, server: Server, source: str) -> None:
    server.replies.append([delta(reasoning_content=source), *call(source, source), *text(source)])
    say(page, source)
    answer = settled(page)
    answer.locator("summary").first.click()
    assert answer.locator(".markdown").evaluate(UNKNOWN) == []
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("#messages :is(script, img, svg, iframe)").count() == 0
    assert page.locator(".user .bubble").inner_text() == source


@pytest.mark.parametrize("tag", ["a", "img"])
def test_planted_harm_would_be_seen(page: Page, tag: str) -> None:
    planted = f"const root = document.createElement('div'); root.append(document.createElement('{tag}'))"
    assert len(page.evaluate(f"() => {{ {planted}; return ({UNKNOWN})(root); }}")) == 1


def test_drawn_piece_by_piece_as_drawn_at_once(page: Page) -> None:
    """For random texts; also, nothing but known elements comes of them, and no word is lost."""
    assert page.evaluate(f"({GROWING})({UNKNOWN}, 500)") == []


@pytest.mark.parametrize("source", NONSENSE)
def test_long_nonsense_is_drawn_too(page: Page, source: str) -> None:
    """The stack would overflow if it grew with the text, and the test end if time grew with its square."""
    drawn = "(s) => renderMarkdown(document.createElement('div'), s).childElementCount"
    assert page.evaluate(drawn, f"x\n\n{source}") >= 1
