"""A packed file as an ordinary model: what the packed weights stand for, in float32."""

from __future__ import annotations

from pathlib import Path

import torch

from godwit.checkpoint.packed import PackedFile
from godwit.models.causal_lm import CausalLM
from godwit.qtensor import QuantExperts, QuantTensor


def load_dequantized(path: Path) -> CausalLM:
    packed = PackedFile.open(path)
    model = CausalLM(packed.config, int(any(name.startswith("mtp.") for name in packed.blobs)))
    parameters = dict(model.requires_grad_(False).named_parameters())
    for name in packed.blobs:
        value = packed.packed(name)
        if isinstance(value, QuantExperts):
            w13, w2 = parameters.pop(f"{name}.w13"), parameters.pop(f"{name}.w2")
            for index in range(value.num_experts):
                for target, source in zip((w13, w2), value.expert(index), strict=True):
                    target[index] = source.dequantize()
        else:
            target = parameters.pop(name)
            target.copy_(value.dequantize() if isinstance(value, QuantTensor) else value)
    assert not parameters
    return model.eval()


def same_weights(first: CausalLM, second: CausalLM) -> bool:
    others = dict(second.named_parameters())
    return all(torch.equal(p, others.pop(name)) for name, p in first.named_parameters()) and not others
