"""Where PyTorch multiplies bfloat16 fast. The native kernels do not depend on it: they widen such weights."""

from __future__ import annotations

from collections.abc import Mapping

#: PyTorch accepts bfloat16 on every CPU, but only these features multiply it without widening it first.
UNITS = ("amx_bf16", "avx512_bf16", "bf16")


def bf16_units(features: Mapping[str, bool]) -> list[str]:
    """Those of a CPU's features that multiply bfloat16."""
    return [name for name in UNITS if features.get(name)]


def multiplies_bf16_fast(features: Mapping[str, bool] | None = None) -> bool:
    """Whether products of bfloat16 pay on this CPU, or on one with ``features``; without a unit they cost
    several times as much as float32."""
    import torch

    if features is None:
        from godwit import _native

        features = _native.cpu_features()
    mkldnn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return mkldnn and bool(bf16_units(features))
