"""A class has a name of its own: whoever reads it anywhere knows which one is meant."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "src" / "godwit"


def classes(tree: ast.Module) -> Iterator[str]:
    """All classes of a module, inner ones included."""
    return (node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def aliases(tree: ast.Module) -> Iterator[str]:
    """Names of types that a module gives to others: ``Name = ...`` in camel case at its top level."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        yield from (name for name in names if name.lstrip("_")[:1].isupper() and not name.isupper())


def doubles(sources: dict[str, str]) -> dict[str, list[str]]:
    """Names of classes that stand for something else, too, with the modules of both."""
    places = defaultdict[str, list[str]](list)
    known = set[str]()
    for module, source in sources.items():
        tree = ast.parse(source)
        own = list(classes(tree))
        known.update(own)
        for name in (*own, *aliases(tree)):
            places[name].append(module)
    return {name: places[name] for name in sorted(known) if len(places[name]) > 1}


def test_no_two_classes_share_a_name() -> None:
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.rglob("*.py"))}
    assert len(sources) > 100 and not doubles(sources)


def test_planted_doubles_are_found() -> None:
    sources = {
        "a": "class One: ...\nclass Two:\n    class Inner: ...\nShared = int",
        "b": "def f():\n    class Inner: ...\nShared = str\nT = 1",
        "c": "One = dict[str, int]\nclass Three: ...\nclass Four: ...\nclass Four: ...",
    }
    assert doubles(sources) == {"Four": ["c", "c"], "Inner": ["a", "b"], "One": ["a", "c"]}
