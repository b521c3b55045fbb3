"""What users do on the chat page."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

FOCUSED = "(element) => element === document.activeElement"


def message_box(page: Page) -> Locator:
    return page.get_by_label("Message", exact=True)


def say(page: Page, words: str) -> None:
    message_box(page).fill(words)
    page.keyboard.press("Enter")


def settled(page: Page) -> Locator:
    """The last message, when nothing is being answered."""
    page.get_by_role("button", name="Send", exact=True).wait_for()
    return page.locator("article").last


def shown(page: Page, words: str) -> Locator:
    """The message that holds `words`, once it is there."""
    found = page.locator("article", has_text=words)
    found.wait_for()
    return found


def open_settings(page: Page) -> None:
    page.get_by_role("button", name="Settings", exact=True).click()


LOAD = """async () => {
  const app = document.querySelector("script[type=module]").src;
  globalThis.renderMarkdown = (await import(new URL("markdown.js", app))).renderMarkdown;
}"""


def load(page: Page) -> None:
    """Makes `renderMarkdown` a global of the page."""
    page.evaluate(LOAD)


def drawing(page: Page, source: str) -> str:
    """The elements that Markdown becomes, as HTML."""
    return str(
        page.evaluate("(s) => renderMarkdown(document.createElement('div'), s, true).innerHTML", source)
    )
