"""A module imports only from lower floors, wherever in the file the import stands."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "src" / "godwit"
# The rooms of each floor. Anyone may import the ground floor and the package itself, which holds the version.
FLOORS = (
    ("errors", "worker", "worker_child", "file_kinds", "pages", "safe_files", "_native"),
    ("config_fields", "dialect"),
    ("config_rotary",),
    ("config", "qtensor", "text"),
    ("checkpoint", "kernels"),
    ("models",),
    ("engine", "train"),
    ("server", "shrink", "measure"),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms} | {"": 0}


def imported(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """Dotted names that the code imports; `package` is the one it lies in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [alias.name for alias in node.names]
            yield from (".".join([*base, name]) for name in names) if base == ["godwit"] else [".".join(base)]


def room_of(name: str) -> str:
    """The room of a module, by its dotted name; "" for the package itself and what it holds."""
    first = name.split(".")[1] if "." in name else ""
    return "" if first.startswith("__") else first


def breaches(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Imports of `module` that point up, or sideways into another room."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    here = room_of(module)
    names = [n for n in imported(ast.parse(source), package) if n.split(".")[0] == "godwit"]
    rooms = {n: room_of(n) for n in names}
    unknown = {here, *rooms.values()} - FLOOR.keys()
    if unknown:
        return [f"{module}: give {', '.join(sorted(unknown))} a place in FLOORS"]
    return [f"{module} -> {n}" for n, r in rooms.items() if r != here and FLOOR[r] >= max(1, FLOOR[here])]


def test_imports_point_down() -> None:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = ["godwit", *path.relative_to(ROOT).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        found += breaches(
            path.read_text(), ".".join(parts[:-1] if is_package else parts), is_package=is_package
        )
    assert not found


def test_the_package_itself_imports_nothing() -> None:
    assert not list(imported(ast.parse((ROOT / "__init__.py").read_text()), ["godwit"]))


def test_planted_breaches_are_caught() -> None:
    planted = {
        "import godwit.engine": "godwit.models.moe",
        "def f():\n    from godwit.cli.main import main": "godwit.engine.stream",
        "if TYPE_CHECKING:\n    from ..models import CausalLM": "godwit.kernels.ops",
        "from .. import engine": "godwit.models.moe",
        "from godwit import train": "godwit.engine.stream",
        "from godwit.kernels.ops import linear": "godwit.checkpoint.reader",
        "from godwit.text.tokenizer import Tokenizer": "godwit.config",
        "from . import config": "godwit.errors",
        "import godwit.errors": "godwit.somewhere_new",
    }
    for source, module in planted.items():
        assert len(breaches(source, module)) == 1, source
    assert not breaches("from godwit import __version__, errors, _native, config", "godwit.checkpoint.reader")
    assert not breaches("from .ops import linear\nfrom ..errors import UsageError", "godwit.kernels.sdpa")
    assert not breaches("from . import ops", "godwit.kernels", is_package=True)
