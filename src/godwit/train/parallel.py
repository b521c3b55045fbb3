"""Data parallelism: the micro-batches of a step are divided among the processes that ``torchrun`` starts.

Without ``torchrun`` there is one process and these functions do nothing. On a CPU, one process per core with
one thread each is faster than one process with many threads: no thread waits for another inside an op.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET = 2**22  # gradient elements per all-reduce


def start() -> None:
    """Join the process group given by the environment, if any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def stop() -> None:
    """Leave the process group, so that the processes exit cleanly."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Rank of this process; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_gradients(params: Iterable[nn.Parameter]) -> None:
    """Sum gradients over all processes; a missing gradient counts as zero."""
    if world_size() == 1:
        return
    bucket: list[nn.Parameter] = []
    for param in params:
        bucket.append(param)
        if sum(p.numel() for p in bucket) >= _BUCKET:
            _sum_bucket(bucket)
            bucket = []
    _sum_bucket(bucket)


def _sum_bucket(bucket: list[nn.Parameter]) -> None:
    if not bucket:
        return
    used = torch.tensor([p.grad is not None for p in bucket], dtype=torch.int32)
    dist.all_reduce(used)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
    dist.all_reduce(flat)
    pieces = torch.split(flat, [p.numel() for p in bucket])
    for param, piece, count in zip(bucket, pieces, used.tolist(), strict=True):
        param.grad = piece.view_as(param) if count else None


def sum_scalars(values: list[float]) -> list[float]:
    """Sum each value over all processes."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return [float(value) for value in total]


def share(tensor: Tensor, owner: int) -> None:
    """Broadcast the owner's values to every process."""
    if world_size() > 1:
        dist.broadcast(tensor, owner)
