"""The chat page itself: what it keeps, how it looks, how it is used without a mouse."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.server.page.actor import REPOSITORY, Server, call, delta, end, text
from tests.server.page.steps import FOCUSED, message_box, open_settings, say, settled, shown

if TYPE_CHECKING:
    from playwright.sync_api import Dialog, Page

CONTRASTS = (Path(__file__).parent / "contrasts.js").read_text("utf-8")
TITLES = "#conversations .title"


def test_conversations_are_kept(page: Page, server: Server) -> None:
    server.replies.extend([text("Rex it is"), text("Tea"), text("Yes, Rex")])
    say(page, "My dog is called Rex")
    settled(page)
    page.get_by_role("button", name="New conversation").click()
    assert page.get_by_text("Conversations stay in this browser.").is_visible()
    say(page, "Tea or coffee?")
    settled(page)
    page.reload()
    assert page.locator(TITLES).all_inner_texts() == ["Tea or coffee?", "My dog is called Rex"]
    assert page.locator(".markdown").all_inner_texts() == ["Tea"]
    page.get_by_role("button", name="My dog is called Rex").click()
    say(page, "Is he?")
    shown(page, "Yes, Rex")
    contents = [message["content"] for message in server.requests[2]["messages"]]
    assert contents == ["My dog is called Rex", "Rex it is", "Is he?"]


def on_dialog(page: Page, answer: str | None) -> None:
    """Answer the next dialog; None cancels it."""

    def close(dialog: Dialog) -> None:
        if answer is None:
            dialog.dismiss()
        else:
            dialog.accept(answer)

    page.once("dialog", close)


def test_rename_export_and_delete(page: Page, server: Server) -> None:
    server.replies.extend([text("Rex it is"), text("Tea")])
    say(page, "My dog is called Rex")
    settled(page)
    item = page.locator("#conversations li").first
    for name in (None, "  ", "Dogs / cats"):
        on_dialog(page, name)
        item.get_by_role("button", name="Rename").press("Enter")
        assert page.locator(TITLES).all_inner_texts() == [(name or "").strip() or "My dog is called Rex"]
    with page.expect_download() as download:
        item.get_by_role("button", name="Export").press("Enter")
    assert download.value.suggested_filename == "Dogs-cats.json"
    exported = json.loads(download.value.path().read_text("utf-8"))
    assert exported["title"] == "Dogs / cats"
    assert exported["messages"] == [
        *server.requests[0]["messages"],
        {"role": "assistant", "content": "Rex it is"},
    ]
    page.get_by_role("button", name="New conversation").click()
    say(page, "Tea or coffee?")
    settled(page)
    for accept in (False, True):
        on_dialog(page, "" if accept else None)
        page.locator("#conversations li").nth(1).hover()
        page.locator("#conversations li").nth(1).get_by_role("button", name="Delete").click()
        kept = ["Tea or coffee?"] if accept else ["Tea or coffee?", "Dogs / cats"]
        assert page.locator(TITLES).all_inner_texts() == kept
    page.reload()
    assert page.locator(TITLES).all_inner_texts() == ["Tea or coffee?"]


def test_search(page: Page, server: Server) -> None:
    server.replies.extend([text("Rex it is"), text("Tea *then*")])
    say(page, "My dog is called Rex")
    settled(page)
    page.get_by_role("button", name="New conversation").click()
    say(page, "Tea or coffee?")
    settled(page)
    field = page.get_by_label("Search conversations")
    for words, found in (
        ("dog REX", ["My dog is called Rex"]),
        ("then", ["Tea or coffee?"]),
        ("e", ["Tea or coffee?", "My dog is called Rex"]),
        ("dog tea", []),
        ("", ["Tea or coffee?", "My dog is called Rex"]),
    ):
        field.fill(words)
        assert page.locator(TITLES).all_inner_texts() == found
        assert page.get_by_text("No conversation holds these words.").is_hidden() == bool(found)
        assert page.get_by_role("status").inner_text() == f"{len(found)} found"
    field.fill("rex")
    page.locator(TITLES).click()
    assert page.locator(".user .bubble").all_inner_texts() == ["My dog is called Rex"]


def put(page: Page, contents: dict[str, object]) -> None:
    """Choose files to import, by their names; texts are their content, other things become JSON."""
    made = {name: each if isinstance(each, str) else json.dumps(each) for name, each in contents.items()}
    files: Any = [
        {"name": name, "mimeType": "application/json", "buffer": one.encode()} for name, one in made.items()
    ]
    page.locator("#import-file").set_input_files(files)


def test_what_is_exported_can_be_imported(page: Page, server: Server) -> None:
    server.replies.extend(
        [[delta(reasoning_content="Hm"), *call("f", "{}"), *end("tool_calls")], text("Rex")]
    )
    open_settings(page)
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Tools").fill(json.dumps([WEATHER]))
    page.get_by_label("Min p").fill("0.1")
    say(page, "My dog?")
    settled(page).get_by_role("button", name="Send result").click()
    shown(page, "Rex")
    settled(page)
    page.get_by_role("button", name="New conversation").click()
    server.replies.append(text("Tea"))
    say(page, "Tea or coffee?")
    settled(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    exported = download.value.path().read_text("utf-8")
    page.evaluate("localStorage.clear()")
    page.reload()
    assert page.locator(TITLES).count() == 0
    put(page, {"conversations.json": exported})
    page.locator(TITLES, has_text="Tea").wait_for()
    page.reload()
    assert page.locator(TITLES).all_inner_texts() == ["Tea or coffee?", "My dog?"]
    page.get_by_role("button", name="My dog?").click()
    assert page.locator("article").count() == 4
    page.get_by_text("Result of f").wait_for()
    server.replies.append(text("Yes"))
    say(page, "Sure?")
    shown(page, "Yes")
    before, after = server.requests[1], server.requests[3]
    assert after["messages"][: len(before["messages"])] == before["messages"]
    assert (after["tools"], after["min_p"]) == (before["tools"], 0.1)


NO_CONVERSATIONS: dict[str, object] = {
    **{"half": "{", "number": [1], "null": "null", "none": {"messages": []}, "empty": []},
    "numbers": {"messages": [1]},
    "role": {"messages": [{"role": "root"}]},
    "call": {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
}


def test_files_from_elsewhere(page: Page) -> None:
    hi = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    put(page, {"openai": {"messages": [{"role": "system", "content": "S"}, hi]}})
    page.locator(".bubble", has_text="Hi").wait_for()
    good = [{"role": "user", "content": "<b>Ho"}, {"role": "assistant", "content": "No"}]
    for name, wrong in NO_CONVERSATIONS.items():
        put(page, {"good": good, name: wrong})
        page.locator("#import-problem", has_text=f"{name} ").wait_for()
    assert page.locator(TITLES).all_inner_texts() == ["Hi"]
    put(page, {"good": good})
    page.locator(".bubble", has_text="<b>Ho").wait_for()
    assert page.locator("#import-problem").inner_text() == ""


def test_the_last_line_stays_above_the_composer(page: Page, server: Server) -> None:
    server.replies.append(text("line\n" * 100, "the last line"))
    page.set_viewport_size({"width": 390, "height": 700})
    page.reload()
    say(page, "Count")
    settled(page)

    def gap() -> float:
        last = page.locator("article").last.bounding_box()
        composer = page.locator("#composer").bounding_box()
        assert last and composer
        return float(composer["y"] - (last["y"] + last["height"]))

    assert gap() >= 16
    message_box(page).fill("one\ntwo\nthree\nfour\nfive\nsix")
    assert message_box(page).evaluate("(e) => e.clientHeight") > 100
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert gap() >= 16


def test_a_second_tab_sees_the_conversations(page: Page, server: Server) -> None:
    server.replies.extend([text("one"), text("two")])
    other = page.context.new_page()
    other.goto(server.url)
    say(page, "Hello")
    settled(page)
    other.get_by_role("button", name="Hello").click()
    say(other, "More")
    settled(other)
    assert shown(page, "two").locator(".markdown").inner_text() == "two"


def test_spoilt_storage_does_no_harm(page: Page) -> None:
    calls = '{"id": "e", "messages": [{"role": "assistant", "tool_calls": [1]}]}'
    spoilt = ["{", "null", "[]", '{"id": "d", "messages": [null]}', calls]
    half = {"id": "c", "function": {"name": "f", "arguments": '{"half'}}
    answer = {
        "role": "assistant",
        "content": "<i>x",
        "tool_calls": [half],
        "stats": {"first": "x", "cached": {}},
    }
    odd = [answer, {"role": "user", "content": 5}, {"role": "root"}]
    kept = json.dumps({"id": "k", "title": "<b>kept", "messages": odd})
    for i, value in enumerate([*spoilt, kept]):
        page.evaluate(
            "([key, value]) => localStorage.setItem(key, value)", [f"godwit.conversation.{i}", value]
        )
    page.reload()
    assert page.locator(TITLES).all_inner_texts() == ["<b>kept"]
    page.get_by_role("button", name="<b>kept").click()
    assert page.locator(".markdown").all_inner_texts() == ["<i>x"]
    assert page.locator("article").count() == 2


COLOURED = """```py
# remark
@decorated
class Name(Base):
    def f(self): return 'text' + str(1) if None else r"x"
```
```html
<!-- remark --><a href="x" class='y'>z</a>
```
```diff
- gone
+ come
```
```css
a.b #c { color: red !important }
```"""


def test_light_and_dark(page: Page, server: Server) -> None:
    server.replies.append(
        [delta(reasoning_content="Hm"), *text("# A\n> b `c` [d](https://x.org) $x$\n\n" + COLOURED)]
    )
    say(page, "Hello")
    settled(page).locator("summary").click()
    open_settings(page)

    def ground() -> str:
        least, where = page.evaluate(CONTRASTS)
        assert least >= 4.5, where
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    toggle = page.get_by_role("button", name="Light or dark")
    light = ground()
    page.emulate_media(color_scheme="dark")
    dark = ground()
    assert dark != light
    toggle.click()
    assert ground() == light
    page.reload()
    assert ground() == light
    toggle.click()
    page.emulate_media(color_scheme="light")
    assert ground() == light  # it follows the system again


def test_without_a_mouse(page: Page, server: Server) -> None:
    server.replies.append(text("Yes\n```\ncode\n```"))
    assert message_box(page).evaluate(FOCUSED)
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    settled(page)
    assert server.requests[0]["messages"][0]["content"] == "one\ntwo"
    page.get_by_role("button", name="Settings", exact=True).press("Enter")
    assert page.get_by_label("System prompt").evaluate(FOCUSED)
    page.keyboard.press("Escape")
    assert page.get_by_role("button", name="Settings", exact=True).evaluate(FOCUSED)


def test_the_order_and_the_names_of_what_takes_the_focus(page: Page, server: Server) -> None:
    server.replies.append(text("Yes\n```\ncode\n```"))
    say(page, "Hello")
    settled(page)
    page.evaluate("document.activeElement.blur()")
    page.locator("h1").click()  # the focus goes on from there
    page.keyboard.press("Shift+Tab")
    order: list[str] = []
    name = "(e => e.ariaLabel || e.labels?.[0]?.textContent || e.textContent)(document.activeElement).trim()"
    while "Message" not in order and len(order) < 30:
        order.append(page.evaluate(name))
        page.keyboard.press("Tab")
    assert order == [
        *("Skip to the message box", "New conversation", "Search conversations"),
        *("Hello", "Rename", "Export as JSON", "Delete", "Import", "Export all"),
        *("Conversations", "Model", "Light or dark", "Settings"),
        *("Edit", "Copy", "Copy", "Code", "Copy", "Regenerate", "Message"),
    ]
    assert page.get_by_role("button", name="Send", exact=True).evaluate(FOCUSED)


def test_copying_a_block_of_code(page: Page, server: Server) -> None:
    server.replies.append(text("```py\nprint(1)\n```"))
    say(page, "Code?")
    button = settled(page).locator(".bar").get_by_role("button")
    page.evaluate("navigator.clipboard.writeText = async (text) => { copied = text; }")
    button.click()
    button.filter(has_text="Copied").wait_for()
    assert page.evaluate("copied") == "print(1)"
    listen = "addEventListener('copy', () => { copied = [String(document.activeElement.value)]; })"
    page.evaluate(f"navigator.clipboard.writeText = null; {listen}")
    button.click()
    assert page.evaluate("copied") == ["print(1)"]
    assert button.evaluate(FOCUSED)


def test_small_screens(page: Page, server: Server) -> None:
    page.set_viewport_size({"width": 340, "height": 600})
    page.reload()
    table = "|x" * 60 + "|\n" + "|--" * 60 + "|\n"
    server.replies.append(text(f"{'A' * 400}\n```\n{'b' * 400}\n```\n{table}\n$$\n{'x + ' * 200}x\n$$"))
    say(page, "C" * 400)
    settled(page)
    for place in ("document.scrollingElement", "document.querySelector('#messages')"):
        assert page.evaluate(f"{place}.scrollWidth") <= 340
    for place in (".table", ".block pre", ".formula.display"):  # these scroll by themselves, also by keyboard
        wide = page.locator(place)
        assert wide.evaluate("(e) => e.scrollWidth > e.clientWidth && e.tabIndex === 0"), place
        wide.evaluate("(e) => { e.scrollLeft = 50; }")
        assert wide.evaluate("(e) => e.scrollLeft") == 50
    new = page.get_by_role("button", name="New conversation")
    button = page.get_by_role("button", name="Conversations")
    assert new.is_hidden()
    button.click()
    assert new.evaluate(FOCUSED)
    page.keyboard.press("Escape")
    assert new.is_hidden()
    assert button.evaluate(FOCUSED)
    button.click()
    page.mouse.click(330, 300)  # beside the list
    assert new.is_hidden()
    button.click()
    new.click()
    assert new.is_hidden()
    assert page.locator("article").count() == 0


WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
THOUGHT = [delta(reasoning_content="The weather in "), delta(reasoning_content="Lisbon is missing.")]
TABLE = "| City | °C |\n|:--|--:|\n| Lisbon | 19 |\n| Oslo | 4 |\n\n"
WARMER = "Yes, **Lisbon is warmer** today, by \\(\\Delta T = 19 - 4 = 15\\) kelvins:\n\n"
CODE = "To compare cities:\n\n```python\ndef warmer(*cities):\n    return max(cities, key=celsius)\n```"
COSTS = [end("tool_calls", prompt=164, cached=128, generated=9), end(prompt=241, cached=196, generated=74)]
SCENE = (
    text("You are welcome."),
    [THOUGHT[0], 0.2, THOUGHT[1], *call("get_weather", '{"city": "Lisbon"}'), *COSTS[0]],
    [delta(content=WARMER + TABLE), 0.8, delta(content=CODE), *COSTS[1]],
)


def test_the_picture_in_the_docs(page: Page, server: Server) -> None:
    """GODWIT_PICTURE=1 takes it anew."""
    page.set_viewport_size({"width": 1180, "height": 850})
    server.replies.extend(SCENE)
    open_settings(page)
    page.get_by_label("System prompt").fill("You are Godwit, a helpful assistant.")
    page.get_by_label("Temperature").fill("0.6")
    page.get_by_label("Tools").fill(json.dumps([WEATHER], indent=1))
    say(page, "Thanks for the story!")
    settled(page)
    page.get_by_role("button", name="New conversation").click()
    say(page, "Oslo has 4 °C. Is it warmer in Lisbon?")
    settled(page).get_by_label("Result of get_weather").fill('{"celsius": 19}')
    page.keyboard.press("Enter")
    shown(page, "To compare")
    settled(page)
    page.locator("#settings").evaluate("(e) => { e.scrollTop = 0; }")
    picture = REPOSITORY / "docs" / "chat-page.png" if os.environ.get("GODWIT_PICTURE") else None
    assert page.screenshot(path=picture).startswith(b"\x89PNG")
    assert page.locator("article").count() == 4
    assert page.evaluate("document.scrollingElement.scrollHeight") == 850
