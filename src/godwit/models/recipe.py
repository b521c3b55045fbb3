"""Which weights are stored in which format: built-in recipes, and files that change them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from godwit.checkpoint.packed_layout import ExpertStack, Matrix, Plain, TensorBlob
from godwit.config import ModelConfig
from godwit.errors import CheckpointError, UsageError
from godwit.models.causal_lm import CausalLM
from godwit.models.native import EXACT
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
    """Rules (pattern, format) for the names of matrices: the first that matches decides.

    The first ``num_own`` rules are a user's own and have to match something.
    """

    name: str
    rules: Rules
    num_own: int = 0

    @staticmethod
    def find(name: str) -> QuantRecipe:
        """A built-in recipe by its name, or the recipe in a TOML file.

        Raises:
            UsageError: neither of them, or a file that is no recipe.
        """
        if name in BUILT_IN:
            return QuantRecipe(name, BUILT_IN[name])
        path = Path(name)
        if not path.is_file():
            known = ", ".join(BUILT_IN)
            raise UsageError(f"{name}: neither a recipe of Godwit ({known}) nor a file; name one of them")
        return QuantRecipe.from_file(path)

    @staticmethod
    def from_file(path: Path) -> QuantRecipe:
        """Read ``base = "q4"`` and a table ``[formats]`` of ``"pattern" = "format"``, tried in order.

        Raises:
            UsageError: unreadable, or not of this form.
        """
        try:
            if path.stat().st_size > MAX_RECIPE_BYTES:
                raise UsageError(f"{path}: larger than {MAX_RECIPE_BYTES >> 20} MiB, so it is no recipe")
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path}: cannot be read as TOML ({error}); mend the recipe") from None
        unknown = content.keys() - {"base", "formats"}
        if unknown:
            raise UsageError(f"{path}: a recipe has base and formats, and not {', '.join(sorted(unknown))}")
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
        """The format of the matrix ``name``; experts are asked for as ``...experts.w13`` and ``...w2``."""
        return next(format for pattern, format in self.rules if fnmatchcase(name, pattern))

    def check(self, names: list[str]) -> None:
        """Refuse rules of the user's own that none of the matrices ``names`` comes under.

        Raises:
            UsageError: naming the first such rule.
        """
        for pattern, _ in self.rules[: self.num_own]:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UsageError(
                    f"{self.name}: no matrix of this model is called {pattern!r:.80}; it has names such as "
                    f"{', '.join(names[1:4])}"
                )


def tensor_blobs(config: ModelConfig, num_mtp: int, recipe: QuantRecipe) -> dict[str, TensorBlob]:
    """What a packed file of this model holds, under the names of ``CausalLM``'s parameters.

    Linear maps and embeddings become matrices, the experts of a layer one stack; all else (norms,
    convolutions, decays, biases, the gate of a shared expert) stays plain float32.

    Raises:
        UsageError: a rule of the recipe that matches nothing.
        CheckpointError: the config describes tensors that no machine can address.
    """
    try:
        with torch.device("meta"):
            model = CausalLM(config, num_mtp)
    except (RuntimeError, OverflowError):
        raise CheckpointError(
            "the config describes tensors too large for any machine; fetch it again"
        ) from None
    blobs: dict[str, TensorBlob] = {}
    matrices: list[str] = []
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        stack, _, last = name.rpartition(".")
        if len(shape) == 3:
            matrices.append(name)
            if last == "w13":
                first, second = (recipe.format_of(f"{stack}.{part}") for part in ("w13", "w2"))
                blobs[stack] = ExpertStack(first, second, shape[0], shape[2], shape[1] // 2)
        elif len(shape) == 2 and last == "weight" and not name.endswith(".shared_gate.weight"):
            matrices.append(name)
            blobs[name] = Matrix(recipe.format_of(name), (shape[0], shape[1]))
        else:
            blobs[name] = Plain("F32", shape)
    recipe.check(matrices)
    return blobs
