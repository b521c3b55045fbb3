"""The native kernels' layout of keys and values inside a block of paged KV.

Every cache has the shape ``[blocks, 16, kv_heads, D]``. Inside a native block the heads are stored one after
another; the keys of a head are ``[D / 2][16 tokens][2 dims]`` and its values
``[8 token pairs][D][2 tokens]``, so that both products of attention load 64 bytes of bf16 pairs without
shuffling.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TOKENS = 16  # per block


def keys_to_native(keys: Tensor) -> Tensor:
    """Plain keys ``[blocks, 16, kv_heads, D]`` as the bytes of native blocks, in the same shape."""
    return torch.unflatten(keys, 3, (-1, 2)).permute(0, 2, 3, 1, 4).reshape(keys.shape)


def keys_from_native(keys: Tensor) -> Tensor:
    """The inverse of :func:`keys_to_native`."""
    blocks, _, heads, dim = keys.shape
    return keys.reshape(blocks, heads, dim // 2, _TOKENS, 2).permute(0, 3, 1, 2, 4).reshape(keys.shape)


def values_to_native(values: Tensor) -> Tensor:
    """Plain values ``[blocks, 16, kv_heads, D]`` as the bytes of native blocks, in the same shape."""
    return torch.unflatten(values, 1, (-1, 2)).permute(0, 3, 1, 4, 2).reshape(values.shape)


def values_from_native(values: Tensor) -> Tensor:
    """The inverse of :func:`values_to_native`."""
    blocks, _, heads, dim = values.shape
    return values.reshape(blocks, heads, _TOKENS // 2, dim, 2).permute(0, 2, 4, 1, 3).reshape(values.shape)
