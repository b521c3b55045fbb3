"""What a model writes becomes elements that can do no harm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.server.page.actor import Server, call, delta, text
from tests.server.page.steps import drawing, say, settled

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
    r"\(\href{javascript:hacked=1}{x} \url{javascript:hacked=1}\) $$\includegraphics{https://x.org/i.png}$$",
    r"$\htmlClass{primary}{x}$ $\htmlId{input}{x}$ $\htmlStyle{position:fixed}{x}$",
    r"$\text{<img src=x onerror=hacked=1>}$ \(</span><script>hacked=1</script>\)",
    r"$$\def\a{\a\a}\a$$ \[\rule{9999em}{9999em}\] $\fcolorbox{red;background:url(//x.org)}{blue}{x}$",
    '```html\n<img src=x onerror=hacked=1><script>hacked=1</script>\n```\n```"><img src=x>\n```',
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
    *(piece * (100_000 // len(piece)) for piece in REPEATED + MORE),
    "|a" * 20_000 + "\n" + "|-" * 20_000 + "\n" + "|b\n" * 20_000,
    "```" + "a" * 100_000 + "\na" * 50_000,
    "\n".join(" " * 2 * depth + "- a" for depth in range(500)),
)


def test_inside_a_paragraph(canvas: Page) -> None:
    source = "**bold** and *it* and `co<de>`, ***both***, ~~gone~~, snake_case_name, 2 * 3, \\*no\\*, **open"
    assert drawing(canvas, source) == (
        "<p><strong>bold</strong> and <em>it</em> and <code>co&lt;de&gt;</code>, "
        "<em><strong>both</strong></em>, <s>gone</s>, snake_case_name, 2 * 3, *no*, **open</p>"
    )


def test_links(canvas: Page) -> None:
    kept = 'target="_blank" rel="noopener noreferrer"'
    assert drawing(canvas, "See http://x.org/a_b. Or [he*r*e](https://x.org/x_(y)).") == (
        f'<p>See <a href="http://x.org/a_b" title="http://x.org/a_b" {kept}>http://x.org/a_b</a>. Or '
        f'<a href="https://x.org/x_(y)" title="https://x.org/x_(y)" {kept}>he<em>r</em>e</a>.</p>'
    )


def test_blocks(canvas: Page) -> None:
    source = "# One *two*\npara\ngraph\n- a\n  1. b\n- [x] c\n\n  d\n> quoted\n> - e\n\n---\n7) seven"
    assert drawing(canvas, source) == (
        '<h3 class="heading level1">One <em>two</em></h3><p>para\ngraph</p>'
        "<ul><li><p>a</p><ol><li>b</li></ol></li><li><p>☑ c</p><p>d</p></li></ul>"
        "<blockquote><p>quoted</p><ul><li>e</li></ul></blockquote><hr>"
        '<ol start="7"><li>seven</li></ol>'
    )


def test_code_in_a_list_loses_the_indent_of_the_list(canvas: Page) -> None:
    source = "1. a\n   ```\n   if x:\n     y\n   ```\n2. b"
    assert "<code>if x:\n  y</code>" in drawing(canvas, source)
    assert drawing(canvas, source).count("<li>") == 2


def test_tables(canvas: Page) -> None:
    assert drawing(canvas, "| x | y |\n|:--|--:|\n| 1 \\| 2 | **2** | more |\n| only |") == (
        '<div class="table" tabindex="0" role="region" aria-label="Table">'
        '<table><thead><tr><th>x</th><th class="right">y</th></tr></thead>'
        '<tbody><tr><td>1 | 2</td><td class="right"><strong>2</strong></td></tr>'
        '<tr><td>only</td><td class="right"></td></tr></tbody></table></div>'
    )


AS_WRITTEN = (
    r"C:\new\(x86) and \\host\share, \d+\s*(a|b)\b, a\, b\; c",
    "&lt;b&gt; <b>bold</b> &amp;nbsp; <!-- no --> <https:x>",
    "two  spaces\n   and an indent\n\ttab\\\nand a backslash",
    "[1]: https://x.org\n\n[1] [note] ![a](data:x) [b](c.md)",
    "Title\n=====\nno heading",
    "1986 was a year - 2 * 3 * 4 = 24, a_b_c, __init__x",
)


@pytest.mark.parametrize("source", AS_WRITTEN)
def test_what_is_no_markdown_is_shown_as_it_was_written(canvas: Page, source: str) -> None:
    blocks = "(s) => [...renderMarkdown(document.createElement('div'), s).children].map((e) => e.textContent)"
    assert "\n\n".join(canvas.evaluate(blocks, source)) == source


@pytest.mark.parametrize("close", ["\n```", "\n```\n", "", "\n"])
def test_blocks_of_code(canvas: Page, close: str) -> None:
    code = "if a < b:\n\n    **no**\n~~~"
    button = '<button type="button" class="small">Copy</button>'
    kept = f'<pre tabindex="0" role="group" aria-label="Code"><code>{code.replace("<", "&lt;")}</code></pre>'
    bar = f'<div class="bar"><span class="quiet">none</span>{button}</div>'
    assert drawing(canvas, f"```none\n{code}{close}") == f'<div class="block">{bar}{kept}</div>'


@pytest.mark.parametrize(("language", "marked"), [("py", "keyword"), ("JS", "keyword"), ("html", "tag")])
def test_code_has_colours(canvas: Page, language: str, marked: str) -> None:
    code = "if a < b & c: '<b>\"x'\n</script>return &amp; import"
    drawn = drawing(canvas, f"```{language}\n{code}\n```")
    assert f'<span class="hljs-{marked}">' in drawn
    text = "(s) => renderMarkdown(document.createElement('div'), s).querySelector('code').textContent"
    assert canvas.evaluate(text, f"```{language}\n{code}\n```") == code


@pytest.mark.parametrize("source", HOSTILE)
def test_what_a_model_writes_stays_text(page: Page, server: Server, source: str) -> None:
    server.replies.append([delta(reasoning_content=source), *call(source, source), *text(source)])
    say(page, source)
    answer = settled(page)
    answer.locator("summary").first.click()
    assert answer.locator(".markdown").evaluate(UNKNOWN) == []
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("article :is(script, img, iframe, style, object, input)").count() == 0
    assert page.locator(".user .bubble").inner_text() == source


@pytest.mark.parametrize("tag", ["a", "img"])
def test_planted_harm_would_be_seen(canvas: Page, tag: str) -> None:
    planted = f"const root = document.createElement('div'); root.append(document.createElement('{tag}'))"
    assert len(canvas.evaluate(f"() => {{ {planted}; return ({UNKNOWN})(root); }}")) == 1


def test_drawn_piece_by_piece_as_drawn_at_once(canvas: Page) -> None:
    """For random texts; also, nothing but known elements comes of them, and no word is lost."""
    assert canvas.evaluate(f"({GROWING})({UNKNOWN}, 200)") == []


@pytest.mark.parametrize("source", NONSENSE)
def test_long_nonsense_is_drawn_too(canvas: Page, source: str) -> None:
    """The stack would overflow if it grew with the text, and the test end if time grew with its square."""
    drawn = "(s) => renderMarkdown(document.createElement('div'), s).childElementCount"
    assert canvas.evaluate(drawn, f"x\n\n{source}") >= 1


def test_blocks_that_are_complete_stay_as_they_are(canvas: Page) -> None:
    """However long an answer grows, what was drawn before is not drawn again."""
    script = """() => {
      const root = document.createElement("div"), seen = new Set();
      let text = "", made = 0;
      for (let i = 0; i < 400; i++) {
        text += `Paragraph ${i} with *words*.\\n\\n\\`\\`\\`py\\nreturn ${i}\\n\\`\\`\\`\\n\\n`;
        renderMarkdown(root, text);
        for (const child of root.children) if (!seen.has(child)) { seen.add(child); made++; }
      }
      const grown = root.innerHTML, first = root.firstChild;
      renderMarkdown(root, text, true);
      return [made, root.children.length, grown === root.innerHTML, first === root.firstChild];
    }"""
    assert canvas.evaluate(script) == [800, 800, True, True]
