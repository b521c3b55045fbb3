"""The chat page's files: what they need, how they are served, and what they must not do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from godwit.server.chat_page import DIRECTORY, POLICY, ChatPage, read_chat_page
from tests.server.conftest import Engines, running

VENDOR = DIRECTORY / "vendor"
FONT = "vendor/fonts/KaTeX_Main-Regular.woff2"
OWN_SCRIPTS = sorted(DIRECTORY.glob("*.js"))


@pytest.fixture(scope="module")
def page() -> ChatPage:
    return read_chat_page()


def test_everything_that_is_loaded_is_there(page: ChatPage) -> None:
    html = page.html.decode()
    prefix = f"static/{page.digest}/"
    linked = re.findall(r'(?:src|href)="(?!data:|#)([^"]+)"', html)
    assert len(linked) == 3
    for name in linked:
        assert name.removeprefix(prefix) in page.files
    scripts = {name: content.decode() for name, content in page.files.items() if name.endswith(".js")}
    for name, source in scripts.items():
        for other in re.findall(r'^(?:import|export)[^"\n;]*"(\.[^"]+)"', source, re.M):
            assert (DIRECTORY / name).parent.joinpath(other).resolve().relative_to(
                DIRECTORY
            ).as_posix() in scripts
    for name, content in page.files.items():
        if name.endswith(".css"):
            for other in re.findall(r"url\(([^)]+)\)", content.decode()):
                assert f"vendor/{other}" in page.files


def test_nothing_of_the_page_makes_html_or_code_from_text(page: ChatPage) -> None:
    assert not re.search(
        r"\son[a-z]+=\"|\sstyle=\"|<style|<script(?! type=\"module\" src=)", page.html.decode()
    )
    for path in OWN_SCRIPTS:
        source = path.read_text("utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function", source
        ), path
    assert "unsafe" not in POLICY
    for source in ("script-src 'self'", "default-src 'none'", "require-trusted-types-for 'script'"):
        assert source in POLICY


def test_files_are_of_a_size_that_can_be_read() -> None:
    for path in [*OWN_SCRIPTS, DIRECTORY / "page.css", DIRECTORY / "page.html"]:
        lines = path.read_text("utf-8").splitlines()
        assert len(lines) <= 250, path
        assert max(map(len, lines)) <= 180, path


def test_the_libraries_are_the_ones_that_are_recorded() -> None:
    """With their licences, and small enough to be sent along."""
    recorded = json.loads((VENDOR / "package.json").read_text("utf-8"))["dependencies"]
    licences = (VENDOR / "LICENSES.txt").read_text("utf-8")
    for name, version in recorded.items():
        assert f"==== {name} {version} ====" in licences
    banners = {
        "markdown-it.js": "markdown-it",
        "highlight.js": "@highlightjs/cdn-assets",
        "katex.js": "katex",
    }
    for file, name in banners.items():
        assert recorded[name] in (VENDOR / file).read_text("utf-8")
    assert sum(path.stat().st_size for path in VENDOR.rglob("*") if path.is_file()) < 900_000


def test_the_digest_follows_the_files(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<link href='__STATIC__/a.css'>", "utf-8")
    digests = set()
    for name, content in (("a.css", "a"), ("a.css", "b"), ("b.css", "b"), ("README.md", "x")):
        (tmp_path / name).write_text(content, "utf-8")
        page = read_chat_page(tmp_path)
        assert f"static/{page.digest}/a.css".encode() in page.html
        digests.add(page.digest)
    assert len(digests) == 3
    assert set(page.files) == {"a.css", "b.css"}


def test_files_are_cached_and_need_no_key(engines: Engines, page: ChatPage) -> None:
    with running(engines("hello"), names=("m",), keys=("secret-key",)) as server, server.client() as client:
        answer = client.get("/")
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.content == page.html
        again = client.get("/", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        for name, kind in (("app.js", "text/javascript"), ("page.css", "text/css"), (FONT, "font/woff2")):
            answer = client.get(f"/static/{page.digest}/{name}")
            assert answer.content == page.files[name]
            assert answer.headers["content-type"].startswith(kind)
            assert "immutable" in answer.headers["cache-control"]
            assert answer.headers["x-content-type-options"] == "nosniff"
        missing = (
            "x",
            "",
            "vendor/package.json",
            "../app.py",
            "..%2Fapp.py",
            "%2e%2e/chat_page.py",
            "page.html",
        )
        for path in (f"/static/{'0' * 16}/app.js", *(f"/static/{page.digest}/{name}" for name in missing)):
            answer = client.get(path)
            assert answer.status_code == 404, path
        assert client.get("/v1/models").status_code == 401


def test_the_list_of_models_tells_the_defaults(engines: Engines) -> None:
    with running(engines("hello"), sampling={"top_k": 7}) as server, server.client() as client:
        told = client.get("/v1/models").json()["data"][0]["default_sampling"]
    assert (told["top_k"], told["temperature"], told["min_p"], told["max_tokens"]) == (7, 1.0, 0.0, None)
