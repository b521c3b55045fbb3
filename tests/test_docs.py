"""The documentation names files, code and headings that exist."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".ci", "benchmarks", "csrc", "docs", "recipes", "src", "tests")
CODE = (".py", ".pyi", ".h", ".cpp")
#: These look like paths of this repository: another project, and a folder of a data set.
FOREIGN = {"llama.cpp", "sgd_x/"}
#: The log and the changelog tell of the past, so they may name what is gone.
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "recipes/*/*.md", "src/godwit/default_model/*.md")
    for path in ROOT.glob(pattern)
    if path.name not in ("CHANGELOG.md", "log.md")
)

# A file of code, or whatever lies in a folder of this repository; with * for any text.
_PATH = re.compile(
    rf"(?<![\w./*~-])(?:[\w.*-]+/)*[\w.*-]+(?:{'|'.join(map(re.escape, CODE))})\b"
    rf"|(?<![\w./*~-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w.*/-]*"
)
_QUOTED = re.compile(r"`([^`\n]+)`")
_PACKAGE = re.compile(r"(?:\w+/)+")
_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


@cache
def entries() -> frozenset[str]:
    """Files and folders of the repository, also by the ends of their paths; folders end with a slash."""
    below = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.name != "__pycache__")
    found = [(*path.relative_to(ROOT).parts[:-1], path.name + "/" * path.is_dir()) for path in below]
    ends = {"/".join(parts[start:]) for parts in found for start in range(len(parts))}
    return frozenset(ends | {f"{folder}/" for folder in FOLDERS})


def paths_in(text: str) -> set[str]:
    """Paths that a document mentions, also in code blocks, and the `folder/` names that it quotes."""
    found = {match.group().rstrip(".") for match in _PATH.finditer(text)}
    quoted = set(filter(_PACKAGE.fullmatch, _QUOTED.findall(_FENCE.sub("", text))))
    return (found | quoted) - FOREIGN


def exists(path: str) -> bool:
    """Whether there is such a file or folder; `path` may be the end of its path, with * for any text."""
    known = entries()
    if "*" in path:
        return bool(fnmatch.filter(known, path))
    return path in known or path.rstrip("/") + "/" in known


def headings(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path: Path, text: str) -> Iterator[str]:
    """Relative links that lead nowhere."""
    for link in _LINK.findall(_FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in headings(target.read_text())):
            yield link


def names_in(text: str) -> set[str]:
    """The identifiers that a document quotes; of a dotted one its last part."""
    quoted = _QUOTED.findall(_FENCE.sub("", text))
    return {name.rsplit(".", 1)[-1] for name in quoted if _NAME.fullmatch(name)}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_and_links_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not sorted(path for path in paths_in(text) if not exists(path))
    assert not list(broken_links(ROOT / name, text))


def test_the_design_quotes_names_of_the_code() -> None:
    files = (path for folder in ("src", "csrc", "tests") for path in (ROOT / folder).rglob("*"))
    words = {word for path in files if path.suffix in CODE for word in re.findall(r"\w+", path.read_text())}
    assert not sorted(names_in((ROOT / "docs/design.md").read_text()) - words)


def test_what_is_gone_is_noticed() -> None:
    text = "`shrink/recipe.py` and `csrc/gone-*.h`, in `nowhere/`; `engine/core.py`, benchmarks/gone.json."
    gone = {path for path in paths_in(text) if not exists(path)}
    assert gone == {"shrink/recipe.py", "csrc/gone-*.h", "nowhere/", "benchmarks/gone.json"}
    assert paths_in("~/.codex/other.py https://a.org/docs/x.py") == set()
    assert exists("cache/disk.py") and exists("engine/cache/") and exists("csrc/*-inl.h")
    assert names_in("`Service.chat`, `a b`, `T`\n```\n`fenced`\n```") == {"chat", "T"}
    links = "[a](gone.md) [b](README.md#install) [c](README.md#gone) [d](https://a.org/x)"
    assert list(broken_links(ROOT / "CONTRIBUTING.md", links)) == ["gone.md", "README.md#gone"]
