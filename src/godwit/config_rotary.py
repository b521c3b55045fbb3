"""Rotary position embedding, read from the old and the new fields of a ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from godwit.config_fields import Fields, checked_number
from godwit.errors import CheckpointError, UnsupportedModelError

ScalingKind = Literal["linear", "yarn", "llama3"]
MAX_CONTEXT = 2**31 - 1


@dataclass(frozen=True)
class RotarySpec:
    """Rotary position embedding: ``dim`` rotated dimensions of each head, half-split pairing."""

    dim: int
    theta: float
    kind: Literal["default"] | ScalingKind = "default"
    factor: float = 1.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def context(self, stated: int) -> int:
        """The model's context length in tokens, given the file's ``max_position_embeddings``.

        YaRN and linear scaling stretch the original length by their factor, whatever the file states beside
        them; Llama 3's files state the stretched length.
        """
        stretched = self.kind in ("yarn", "linear")
        return int(self.factor * self.original_max_position) if stretched else stated


def read_rotary(fields: Fields, head_dim: int, *, partial: bool) -> RotarySpec:
    """The rotary embedding of heads of ``head_dim``; ``partial`` families may rotate a part of each head.

    As in ``transformers``, ``rope_scaling`` replaces ``rope_parameters`` as a whole; fields missing there are
    taken from the top level, then from the defaults.

    Raises:
        UnsupportedModelError: a kind of scaling that is not supported.
        CheckpointError: a field is missing or makes no sense.
    """
    params = _parameters(fields)
    kind = params.get("rope_type", params.get("type", "default"))
    if kind == "mrope":  # for text, all M-RoPE axes have equal positions: plain rotary
        kind = "default"
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise UnsupportedModelError(f"rope type {kind!r:.60} is not default, linear, yarn or llama3")
    theta = checked_number("rope_theta", params.get("rope_theta", fields.get("rope_theta")), low=1.001)
    dim = _rotated(fields, params, head_dim, partial, kind)
    return (
        RotarySpec(dim, theta)
        if kind == "default"
        else _scaled(fields, params, dim, theta, cast(ScalingKind, kind))
    )


def _parameters(fields: Fields) -> Mapping[str, Any]:
    params, scaling = fields.text.get("rope_parameters") or {}, fields.text.get("rope_scaling") or {}
    if not isinstance(params, Mapping) or not isinstance(scaling, Mapping):
        raise CheckpointError("config fields rope_parameters and rope_scaling must be objects or null")
    chosen = scaling or params
    nested = [name for name, value in chosen.items() if isinstance(value, Mapping)]
    if nested:
        raise UnsupportedModelError(
            f"rotary embeddings that differ by layer ({nested[0]:.40}) are not supported"
        )
    return chosen


def _rotated(fields: Fields, params: Mapping[str, Any], head_dim: int, partial: bool, kind: str) -> int:
    """How many dimensions of a head are rotated."""
    name = "partial_rotary_factor"
    top = fields.text.get(name, 0.25 if partial else None)  # an explicit null rotates whole heads
    value = params.get(name, top)
    factor = 1.0 if value is None else checked_number(name, value)
    if not partial:
        if factor != 1.0 and kind != "default":
            raise UnsupportedModelError(f"{name} {factor:g} is not supported for this model type")
        return head_dim
    dim = int(head_dim * factor)
    if not 0 < dim <= head_dim or dim % 2:
        raise CheckpointError(f"{name} cannot rotate {dim} dimensions of {head_dim}")
    return dim


def _scaled(
    fields: Fields, params: Mapping[str, Any], dim: int, theta: float, kind: ScalingKind
) -> RotarySpec:
    def number(name: str, default: float | None = None, low: float = 0.0) -> float:
        value = params.get(name)
        return checked_number(name, default if value is None else value, low)

    length = fields.integer("max_position_embeddings")
    original_field = "original_max_position_embeddings"
    stated = fields.text.get(original_field)  # at the top level it counts before the one inside
    stated = params.get(original_field) if stated is None else stated
    original = int(checked_number(original_field, length if stated is None else stated, 1.0))
    # As in transformers, a YaRN section without a factor stretches the original length to the one stated.
    ratio = max(1.0, length / original) if kind == "yarn" and stated is not None else None
    factor = number("factor", ratio, low=1.0)
    if factor * original > MAX_CONTEXT:
        raise CheckpointError(
            f"config field factor {factor:g} stretches the context of {original} tokens beyond {MAX_CONTEXT}"
        )
    if kind == "yarn" and any(params.get(name) for name in ("mscale", "mscale_all_dim")):
        raise UnsupportedModelError("YaRN with mscale is not used by any supported family")
    low_frequency = number("low_freq_factor", 1.0)
    default_attention = 0.1 * math.log(factor) + 1.0 if kind == "yarn" and factor > 1 else 1.0
    return RotarySpec(
        dim,
        theta,
        kind,
        factor,
        original,
        beta_fast=number("beta_fast", 32.0, low=0.001),
        beta_slow=number("beta_slow", 1.0, low=0.001),
        attention_factor=number("attention_factor", default_attention),
        truncate=bool(params.get("truncate", True)),
        low_freq_factor=low_frequency,
        high_freq_factor=number("high_freq_factor", 4.0, low=low_frequency + 0.001),
    )
