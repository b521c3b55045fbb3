"""The native CPU kernels for packed weights, called through :mod:`godwit.kernels.ops`.

Importing this module registers them for the formats of :mod:`godwit.qtensor`. They take float32 activations
and run on their own threads; the result of a row depends only on that row (see ``csrc/kernels.h``).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from godwit import _native
from godwit.kernels import ops
from godwit.qtensor import FORMATS, QuantTensor


def weight(w: QuantTensor) -> _native.Weight:
    """The native view of packed bytes; created once and cached on the tensor."""
    view = vars(w).get("_native")
    if not isinstance(view, _native.Weight):
        view = _native.Weight(w.format, *w.shape, w.data)
        vars(w)["_native"] = view
    return view


def linear(x: Tensor, w: QuantTensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., in]`` times ``w [out, in]`` transposed, plus ``bias [out]``; float32."""
    rows = x.float().contiguous().view(-1, w.shape[1])
    out = torch.empty(rows.shape[0], w.shape[0])
    _native.linear(rows, weight(w), None if bias is None else bias.float().contiguous(), out)
    return out.view(*x.shape[:-1], w.shape[0])


def embed(ids: Tensor, w: QuantTensor) -> Tensor:
    """Rows ``ids [T]`` of ``w``, float32."""
    out = torch.empty(ids.shape[0], w.shape[1])
    _native.embed(weight(w), ids.contiguous(), out)
    return out


def top_k(values: NDArray[np.float32], k: int) -> tuple[list[float], list[int]]:
    """The k largest of ``values [C]`` in descending order, and their indices; ties go to the first."""
    top, places = _native.top_k(np.ascontiguousarray(values), k)
    return top, places


for _format in FORMATS:
    ops.register("linear", _format, "cpu", linear)
    ops.register("embed", _format, "cpu", embed)
