"""Quantised tensors: packed matrices of 4, 8 or 16 bits a weight, and how floats become them.

The layouts are those of ``csrc/kernels.h``, byte for byte: tiles of 16 rows, in which the 32 columns of a
group share a scale. Everything here is plain torch; the native kernels read the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from godwit.errors import UsageError

TILE_ROWS = 16  # output rows side by side in a tile
GROUP = 32  # inputs that share a scale
ALIGNMENT = 64  # of every packed matrix
EXPERT_ALIGNMENT = 4096  # of every expert: what a disk reads on its own

#: format -> bytes of codes in a group of a tile
CODE_BYTES = {"bf16": 1024, "q8": 512, "q4": 256}
FORMATS = tuple(CODE_BYTES)
#: format -> the code that stands for zero, and the least and the greatest value of a code
_CODES = {"q8": (128, -127, 127), "q4": (8, -8, 7)}
_MAX_SCALE = 65504.0  # the largest number in half precision
_MAX_BF16 = 3.3895e38
_BLOCK = 1 << 16  # weights quantised at a time: the temporaries stay in a core's cache

# Scales tried for a group, relative to the one that maps its extreme weight to the low end of the codes:
# chosen greedily from a fine grid, which takes just 0.2 % off the error that these leave on normal weights.
_TRIED = {"q4": (0.98, 0.92, 1.12, 1.02, 0.96, 1.18), "q8": (1.0,)}
_TINY = 1e-30  # what is smaller has no inverse in float32 and no scale in half precision


def groups(cols: int) -> int:
    """Groups of a row, the padding to an even number included."""
    return -(-cols // (2 * GROUP)) * 2


def _num_tiles(rows: int) -> int:
    return -(-rows // TILE_ROWS)


def weight_bytes(format: str, rows: int, cols: int) -> int:
    """Bytes of a packed matrix ``[rows, cols]``.

    Raises:
        UsageError: an unknown format.
    """
    _check_format(format)
    scales = 0 if format == "bf16" else 2 * TILE_ROWS
    return _num_tiles(rows) * groups(cols) * (CODE_BYTES[format] + scales)


def expert_layout(format13: str, format2: str, hidden: int, intermediate: int) -> tuple[int, int]:
    """Where an expert's ``w2`` begins and the distance between experts.

    ``w13 [2 I, H]`` comes first, ``w2 [H, I]`` at the next multiple of 64, the next expert at one of 4096.
    """
    offset2 = _round_up(weight_bytes(format13, 2 * intermediate, hidden), ALIGNMENT)
    return offset2, expert_stride(format13, format2, hidden, intermediate)


def expert_stride(format13: str, format2: str, hidden: int, intermediate: int) -> int:
    """Bytes from one expert to the next."""
    first = _round_up(weight_bytes(format13, 2 * intermediate, hidden), ALIGNMENT)
    return _round_up(first + weight_bytes(format2, hidden, intermediate), EXPERT_ALIGNMENT)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _check_format(format: str) -> None:
    if format not in CODE_BYTES:
        raise UsageError(f"{format!r:.40} is not a format of weights; there are {', '.join(FORMATS)}")


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A matrix ``[rows, cols]`` in one of :data:`FORMATS`; ``data`` are its bytes, uint8 and flat."""

    format: str
    shape: tuple[int, int]
    data: Tensor

    def __post_init__(self) -> None:
        """Refuse bytes that are not those of such a matrix."""
        _check_bytes(self.data, weight_bytes(self.format, *self.shape), f"a {self.format} matrix")

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and padding."""
        return self.data.numel()

    def dequantize(self) -> Tensor:
        """The weights as float32 ``[rows, cols]``."""
        rows, cols = self.shape
        if self.format == "bf16":
            tiles = self.data.view(torch.bfloat16).view(
                _num_tiles(rows), groups(cols), GROUP // 2, TILE_ROWS, 2
            )
            full = tiles.permute(0, 3, 1, 2, 4).float()
        else:
            codes, scales = unpack(self)
            full = (codes.to(torch.int16) - _CODES[self.format][0]).float() * scales.float().unsqueeze(-1)
        return full.reshape(_num_tiles(rows) * TILE_ROWS, groups(cols) * GROUP)[:rows, :cols].contiguous()


@dataclass(frozen=True, eq=False)
class QuantExperts:
    """The experts of a layer: ``w13 [2 I, H]`` and ``w2 [H, I]`` of expert e from byte ``e * stride`` on."""

    format13: str
    format2: str
    num_experts: int
    hidden: int
    intermediate: int
    stride: int
    offset2: int
    data: Tensor

    def __post_init__(self) -> None:
        """Refuse sizes and bytes that do not belong together."""
        layout = expert_layout(self.format13, self.format2, self.hidden, self.intermediate)
        if (self.offset2, self.stride) != layout:
            raise UsageError(
                f"experts with w2 at byte {self.offset2} of {self.stride} are not laid out for their formats"
            )
        _check_bytes(self.data, self.num_experts * self.stride, f"{self.num_experts} experts")

    @property
    def nbytes(self) -> int:
        """Bytes of all experts, padding included."""
        return self.data.numel()

    def expert(self, index: int) -> tuple[QuantTensor, QuantTensor]:
        """Views of ``w13`` and ``w2`` of one expert."""
        begin = index * self.stride
        shape13, shape2 = (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)
        second = begin + self.offset2
        return (
            QuantTensor(
                self.format13, shape13, self.data[begin : begin + weight_bytes(self.format13, *shape13)]
            ),
            QuantTensor(
                self.format2, shape2, self.data[second : second + weight_bytes(self.format2, *shape2)]
            ),
        )


def join_expert(w13: QuantTensor, w2: QuantTensor) -> Tensor:
    """The bytes of one expert in a :class:`QuantExperts`, with zeros between its parts and after them."""
    rows, hidden = w13.shape
    if w2.shape != (hidden, rows // 2) or rows % 2:
        raise UsageError(f"w13 {list(w13.shape)} and w2 {list(w2.shape)} are not of one expert")
    offset2, stride = expert_layout(w13.format, w2.format, hidden, rows // 2)
    joined = torch.zeros(stride, dtype=torch.uint8)
    joined[: w13.nbytes] = w13.data
    joined[offset2 : offset2 + w2.nbytes] = w2.data
    return joined


def _check_bytes(data: Tensor, wanted: int, what: str) -> None:
    if data.dtype != torch.uint8 or data.dim() != 1 or data.numel() != wanted or not data.is_contiguous():
        raise UsageError(
            f"{what} takes {wanted} contiguous bytes, not {data.dtype} of shape {list(data.shape)}"
        )


def pack(codes: Tensor, scales: Tensor, format: str, shape: tuple[int, int]) -> QuantTensor:
    """Lay out codes ``[tiles * 16, groups, 32]`` (uint8) and scales ``[tiles * 16, groups]`` (half)."""
    tiles, size = _num_tiles(shape[0]), groups(shape[1])
    if format == "q4":
        halves = codes.view(tiles, TILE_ROWS, size, 2, 4, 4).permute(3, 0, 2, 4, 1, 5)
        body = (halves[0] | (halves[1] << 4)).reshape(tiles, -1)
    else:
        body = codes.view(tiles, TILE_ROWS, size, 8, 4).permute(0, 2, 3, 1, 4).reshape(tiles, -1)
    tail = scales.view(tiles, TILE_ROWS, size).transpose(1, 2).contiguous().view(torch.uint8).view(tiles, -1)
    return QuantTensor(format, shape, torch.cat((body, tail), 1).flatten())


def unpack(weight: QuantTensor) -> tuple[Tensor, Tensor]:
    """Codes ``[tiles, 16, groups, 32]`` uint8 and scales ``[tiles, 16, groups]`` half, padding included."""
    tiles, size = _num_tiles(weight.shape[0]), groups(weight.shape[1])
    parts = weight.data.view(tiles, -1)
    body = parts[:, : size * CODE_BYTES[weight.format]]
    scales = (
        parts[:, body.shape[1] :]
        .contiguous()
        .view(torch.float16)
        .view(tiles, size, TILE_ROWS)
        .transpose(1, 2)
    )
    if weight.format == "q8":
        return body.reshape(tiles, size, 8, TILE_ROWS, 4).permute(0, 3, 1, 2, 4).flatten(3), scales
    packed = body.reshape(tiles, size, 4, TILE_ROWS, 4)
    halves = torch.stack((packed & 15, packed >> 4), 2)  # [tiles, groups, half, 4, 16, 4]
    return halves.permute(0, 4, 1, 2, 3, 5).flatten(3), scales


def quantize(weight: Tensor, format: str, importance: Tensor | None = None) -> QuantTensor:
    """Pack floats ``[rows, cols]``; scales minimise the squared error, weighted by ``importance [cols]``.

    ``importance`` is how much the square of an error in a column matters, such as the mean square of its
    input; None takes all columns as equal. Memory beyond the result is small, whatever the size.

    Raises:
        UsageError: an unknown format, no matrix, or weights or importances that cannot be represented.
    """
    _check_format(format)
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise UsageError(f"only matrices of floats can be packed, not {weight.dtype} of {list(weight.shape)}")
    rows, cols = weight.shape
    out = torch.empty(weight_bytes(format, rows, cols), dtype=torch.uint8)
    spread = None if importance is None else _spread(importance, cols)
    step = max(1, _BLOCK // (groups(cols) * GROUP * TILE_ROWS)) * TILE_ROWS
    at = 0
    for begin in range(0, rows, step):
        block = weight[begin : begin + step].detach().to("cpu", torch.float32)
        packed = _pack_block(block, format, spread)
        out[at : at + packed.nbytes] = packed.data
        at += packed.nbytes
    return QuantTensor(format, (rows, cols), out)


def _spread(importance: Tensor, cols: int) -> Tensor:
    """Importances as ``[32, 1, groups]`` around 1, and 0 for missing columns."""
    found = importance.detach().to("cpu", torch.float32)
    if found.shape != (cols,) or not bool(torch.isfinite(found).all()) or bool((found < 0).any()):
        raise UsageError(f"importance must be {cols} finite numbers from 0 up, one a column")
    mean = float(found.double().mean())
    # A floor keeps columns that the calibration never saw from being rounded at will.
    scaled = found / mean + 1e-3 if mean > 0 else torch.ones(cols)
    return _by_group(_padded(scaled[None], 1))


def _padded(block: Tensor, rows: int) -> Tensor:
    """Zeros around ``block``, up to ``rows`` rows and whole groups."""
    full = torch.zeros(rows, groups(block.shape[1]) * GROUP)
    full[: block.shape[0], : block.shape[1]] = block
    return full


def _by_group(full: Tensor) -> Tensor:
    """``[rows, cols]`` as ``[32, rows, groups]``: sums over a group then run over whole vectors."""
    return full.view(full.shape[0], -1, GROUP).permute(2, 0, 1).contiguous()


def _pack_block(block: Tensor, format: str, spread: Tensor | None) -> QuantTensor:
    _check_range(block, format)
    shape = (block.shape[0], block.shape[1])
    full = _padded(block, _num_tiles(shape[0]) * TILE_ROWS)
    if format == "bf16":
        tiles = full.bfloat16().view(-1, TILE_ROWS, groups(shape[1]), GROUP // 2, 2)
        laid = tiles.permute(0, 2, 3, 1, 4).contiguous()
        return QuantTensor(format, shape, laid.view(torch.uint8).flatten())
    x = _by_group(full)
    scales = _search(x, format, spread)
    return pack(_codes(x, scales, format).permute(1, 2, 0).contiguous(), scales, format, shape)


def _check_range(block: Tensor, format: str) -> None:
    limit = _MAX_BF16 if format == "bf16" else _MAX_SCALE * _CODES[format][2]
    extreme = float(block.abs().max())
    if not extreme <= limit:  # also where it is NaN
        raise UsageError(f"{format} takes finite weights of at most {limit:g}, and one is {extreme:g}")


def _codes(x: Tensor, scales: Tensor, format: str) -> Tensor:
    """The nearest codes of ``x [32, rows, groups]`` for half-precision scales."""
    zero, low, high = _CODES[format]
    return ((x * _inverse(scales.float())).round_().clamp_(low, high) + zero).to(torch.uint8)


def _inverse(scales: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0 or next to it."""
    return torch.where(scales.abs() < _TINY, 0.0, scales.reciprocal())


def _search(x: Tensor, format: str, spread: Tensor | None) -> Tensor:
    """Half-precision scales ``[rows, groups]`` with a small (weighted) squared error.

    For given codes q the best scale is <q, x> / <q, q>, and it takes <q, x>^2 / <q, q> off the error: the
    candidate with the largest such gain wins.
    """
    _, low, high = _CODES[format]
    extreme = x.gather(0, x.abs().argmax(0, keepdim=True)).squeeze(0)
    unit = _inverse(extreme) * low
    weighted = x if spread is None else x * spread
    q, product = torch.empty_like(x), torch.empty_like(x)
    best_gain, best = torch.full_like(extreme, -1.0), torch.zeros_like(extreme)
    for factor in _TRIED[format]:
        torch.mul(x, unit / factor, out=q).round_().clamp_(low, high)
        along = torch.mul(q, weighted, out=product).sum(0)
        q.mul_(q) if spread is None else torch.mul(q, q, out=q).mul_(spread)
        square = q.sum(0)
        scale = along * _inverse(square)
        gain = along * scale
        better = gain > best_gain
        best_gain, best = torch.where(better, gain, best_gain), torch.where(better, scale, best)
    return best.clamp_(-_MAX_SCALE, _MAX_SCALE).half()
