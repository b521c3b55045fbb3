"""Whether PyTorch has fast bfloat16 products on a CPU. The native kernels widen bfloat16 weights instead."""

from __future__ import annotations

from collections.abc import Mapping

#: PyTorch accepts bfloat16 on every CPU, but only these features multiply it without widening it first.
UNITS = ("amx_bf16", "avx512_bf16", "bf16")


def bf16_units(features: Mapping[str, bool]) -> list[str]:
    """The CPU features that multiply bfloat16."""
    return [name for name in UNITS if features.get(name)]


def multiplies_bf16_fast(features: Mapping[str, bool] | None = None) -> bool:
    """Whether this CPU, or one with ``features``, has fast bfloat16 products; on others they are several
    times slower than float32."""
    import torch

    if features is None:
        from godwit import _native

        features = _native.cpu_features()
    mkldnn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return mkldnn and bool(bf16_units(features))
