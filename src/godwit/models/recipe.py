"""Quantisation recipes: which weights are stored in which format, built in or from a file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from godwit.checkpoint.packed_layout import ExpertStack, Matrix, Plain, TensorBlob
from godwit.config import ModelConfig
from godwit.errors import UsageError
from godwit.models.inventory import EXACT, parameters
from godwit.qtensor import FORMATS

MAX_RECIPE_BYTES = 1 << 20

Rules = tuple[tuple[str, str], ...]

_SMALL: Rules = tuple((f"*.{name}", "bf16") for name in EXACT)
BUILT_IN: Mapping[str, Rules] = {
    "q4": (*_SMALL, ("embedding.weight", "q8"), ("head.weight", "q8"), ("*", "q4")),
    "q8": (*_SMALL, ("*", "q8")),
    "bf16": (("*", "bf16"),),
}


@dataclass(frozen=True)
class QuantRecipe:
    """Rules (pattern, format) for the names of matrices; the first match decides.

    The first ``num_own`` rules are the user's and must match something. ``exact`` has the formats of single
    matrices, which need no rule.
    """

    name: str
    rules: Rules
    num_own: int = 0
    exact: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def find(name: str) -> QuantRecipe:
        """A built-in recipe by name, or a recipe from a TOML file.

        Raises:
            UsageError: neither, or the file is not a recipe.
        """
        if name in BUILT_IN:
            return QuantRecipe(name, BUILT_IN[name])
        path = Path(name)
        if not path.is_file():
            known = ", ".join(BUILT_IN)
            raise UsageError(f"{name}: neither a built-in recipe ({known}) nor a file; give one of them")
        return QuantRecipe.from_file(path)

    @staticmethod
    def from_file(path: Path) -> QuantRecipe:
        """Read ``base = "q4"`` and a table ``[formats]`` of ``"pattern" = "format"``, tried in order.

        Raises:
            UsageError: the file cannot be read or has another form.
        """
        try:
            if path.stat().st_size > MAX_RECIPE_BYTES:
                raise UsageError(f"{path}: larger than {MAX_RECIPE_BYTES >> 20} MiB; it cannot be a recipe")
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path}: cannot be read as TOML ({error}); fix the recipe") from None
        unknown = content.keys() - {"base", "formats"}
        if unknown:
            names = ", ".join(sorted(unknown))
            raise UsageError(f"{path}: unknown: {names}; a recipe has only base and formats")
        base, formats = content.get("base", "q4"), content.get("formats", {})
        if not isinstance(base, str) or base not in BUILT_IN:
            raise UsageError(f"{path}: base must be one of {', '.join(BUILT_IN)}, not {base!r:.40}")
        if not isinstance(formats, dict):
            raise UsageError(f"{path}: formats must be a table of patterns and formats")
        for pattern, format in formats.items():
            if not isinstance(format, str) or format not in FORMATS:
                raise UsageError(
                    f"{path}: the format of {pattern!r:.80} must be one of {', '.join(FORMATS)}, "
                    f"not {format!r:.40}"
                )
        return QuantRecipe(str(path), (*formats.items(), *BUILT_IN[base]), len(formats))

    def format_of(self, name: str) -> str:
        """The format of the matrix ``name``; experts are named ``...experts.w13`` and ``...w2``."""
        own = self.exact.get(name)
        return own or next(format for pattern, format in self.rules if fnmatchcase(name, pattern))

    def check(self, names: list[str]) -> None:
        """Check that each of the user's rules matches one of the matrices ``names``.

        Raises:
            UsageError: a rule matches none.
        """
        for pattern, _ in self.rules[: self.num_own]:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UsageError(
                    f"{self.name}: {pattern!r:.80} matches no matrix of this model; their names are like "
                    f"{', '.join(names[1:4])}"
                )


def tensor_blobs(config: ModelConfig, num_mtp: int, recipe: QuantRecipe) -> dict[str, TensorBlob]:
    """The tensors of a packed file of this model, by the names of ``CausalLM``'s parameters.

    Linear maps and embeddings become matrices, the experts of a layer one stack; everything else (norms,
    convolutions, decays, biases, the gate of a shared expert) stays float32.

    Raises:
        UsageError: a rule of the recipe matches nothing.
        CheckpointError: the config describes tensors too large to address.
    """
    listed = parameters(config, num_mtp)
    formats = {p.name: recipe.format_of(p.name) for p in listed if p.top_k or p.is_matrix}
    blobs: dict[str, TensorBlob] = {}
    for p in listed:
        if p.name not in formats:
            blobs[p.name] = Plain("F32", p.shape)
        elif not p.top_k:
            blobs[p.name] = Matrix(formats[p.name], (p.shape[0], p.shape[1]))
        elif p.name.endswith(".w13"):
            first, second = (formats[f"{p.packed_name}.{name}"] for name in ("w13", "w2"))
            blobs[p.packed_name] = ExpertStack(first, second, p.shape[0], p.shape[2], p.shape[1] // 2)
    recipe.check(list(formats))
    return blobs
