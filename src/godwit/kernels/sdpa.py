"""Attention through PyTorch's fused scaled-dot-product kernel, sequence by sequence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from godwit.kernels import reference


def attention(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int], scale: float
) -> Tensor:
    """Same contract as :func:`godwit.kernels.reference.attention`."""
    outputs = [
        _attend(query, key, value, scale)
        for query, key, value in zip(torch.split(q, list(lengths)), keys, values, strict=True)
    ]
    return torch.cat(outputs) if outputs else q


#: Same contract as :func:`godwit.kernels.reference.paged_attention`.
paged_attention = partial(reference.paged_attention, attend=attention)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    num_queries, num_keys = query.shape[0], key.shape[0]
    mask = None
    if 1 < num_queries < num_keys:  # the kernel's causal mask is aligned to the first key, not the last
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(num_keys - num_queries)
    mixed = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.to(query.dtype).transpose(0, 1)[None],
        value.to(query.dtype).transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None and num_queries > 1,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return mixed[0].transpose(0, 1)
