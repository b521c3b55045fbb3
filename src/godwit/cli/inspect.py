"""`godwit inspect`: a model's parts and the memory it needs, without loading weights."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from godwit.checkpoint import Checkpoint, open_checkpoint, read_raw_config
from godwit.checkpoint.choice import gguf_in
from godwit.checkpoint.gguf import GgufCheckpoint
from godwit.checkpoint.hub import hub_name
from godwit.checkpoint.layout import INDEX
from godwit.checkpoint.packed import PackedFile, is_packed
from godwit.cli import common
from godwit.cli.inspect_tables import show
from godwit.cli.packed import (
    PackedSizes,
    bytes_of_parts,
    checked_blobs,
    sizes_packed,
    stored_parts,
    weights_of,
)
from godwit.config import ModelConfig
from godwit.errors import CheckpointError, GodwitError
from godwit.measure.machine import memory
from godwit.measure.planner import Sizes, sizes_of
from godwit.models.inventory import count_mtp
from godwit.models.loader import plan
from godwit.models.names import canonical_name
from godwit.models.packing import stored_recipe
from godwit.models.recipe import tensor_blobs

USUAL_CONTEXTS = (4096, 32768)
RECIPES = ("q8", "q4")


def run(model: str | None, *, context: int | None = None, as_json: bool = False) -> None:
    """Print the report to stdout.

    Raises:
        CheckpointError: there is no model; or, after the report, its weights do not match the config.
        UnsupportedModelError: an unsupported model type.
        OfflineError: the config of a Hub repository cannot be downloaded.
    """
    report = {**examine(common.source_of(model), context), "model": model or common.BUILT_IN}
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    problem = report["weights"] and report["weights"]["problem"]
    if problem:
        raise CheckpointError(problem)


def examine(model: str | Path, context: int | None = None) -> dict[str, Any]:
    """Collect the report; sizes are in bytes unless named parameters."""
    if is_packed(model):
        return _examine_packed(PackedFile.open(model), str(model), context)
    checkpoint = _with_weights(model)
    if isinstance(checkpoint, GgufCheckpoint):
        return _examine_gguf(checkpoint, str(model), context)
    config = ModelConfig.from_dict(read_raw_config(model)) if checkpoint is None else checkpoint.config
    num_mtp = _count_mtp(config, checkpoint)
    sizes = sizes_of(config, num_mtp or 0)
    possible = _with_mtp(config) if num_mtp is None else None
    return {
        "model": str(model),
        **_shape(config, num_mtp),
        "parameters": _parameters(sizes, possible),
        "cache": _cache(sizes, possible),
        "weights": None if checkpoint is None else _weights(checkpoint),
        "resident_bfloat16": sizes.weights,
        "if_packed": {name: _if_packed(sizes, config, num_mtp or 0, name) for name in RECIPES},
        **_room(sizes, config, context),
    }


def _examine_packed(packed: PackedFile, model: str, context: int | None) -> dict[str, Any]:
    num_mtp = count_mtp(packed.names())
    sizes = sizes_of(packed.config, num_mtp)
    blobs = checked_blobs(packed, num_mtp)
    parts = bytes_of_parts(blobs, packed.config)
    sizes = PackedSizes.of(sizes, parts)
    return {
        "model": model,
        **_shape(packed.config, num_mtp),
        "parameters": _parameters(sizes, None),
        "packed": {"parts": parts, "metadata": packed.metadata, "files": sorted(packed.files())},
        "cache": _cache(sizes, None),
        "weights": weights_of(blobs),
        "resident_packed": sizes.weights,
        **_room(sizes, packed.config, context),
    }


def _examine_gguf(checkpoint: GgufCheckpoint, model: str, context: int | None) -> dict[str, Any]:
    """The report of a GGUF file; what it takes in memory is reckoned as it would be loaded."""
    config = checkpoint.config
    num_mtp = _count_mtp(config, checkpoint) or 0
    sizes = sizes_of(config, num_mtp)
    loaded = bytes_of_parts(tensor_blobs(config, num_mtp, stored_recipe(checkpoint)), config)
    loaded_sizes = PackedSizes.of(sizes, loaded)
    return {
        "model": model,
        **_shape(config, num_mtp),
        "parameters": _parameters(sizes, None),
        "stored": {"parts": stored_parts(checkpoint), "metadata": checkpoint.metadata},
        "tokenizer": _tokenizer(checkpoint),
        "cache": _cache(sizes, None),
        "weights": _weights(checkpoint),
        "resident_packed": loaded_sizes.weights,
        "if_packed": {"q4": _if_packed(sizes, config, num_mtp, "q4")},
        **_room(loaded_sizes, config, context),
    }


def _tokenizer(checkpoint: GgufCheckpoint) -> dict[str, Any]:
    """Whether a file has a tokenizer that is read, and a chat template; else why not."""
    try:
        files = checkpoint.files()
    except GodwitError as error:
        return {"present": False, "chat_template": False, "problem": str(error)}
    return {
        "present": "tokenizer.json" in files,
        "chat_template": "chat_template.jinja" in files,
        "problem": None,
    }


def _if_packed(sizes: Sizes, config: ModelConfig, num_mtp: int, recipe: str) -> dict[str, Any]:
    """The model after `godwit quantize`: its size, and the context that fits in the remaining memory."""
    packed = sizes_packed(sizes, config, num_mtp, recipe)
    room = _room(packed, config, None)
    spare = room["spare_without_context"]
    return {
        "resident": packed.weights,
        "read_per_token": packed.read_per_token(0),
        "spare_without_context": spare,
        "longest_context": room["longest_context"],
    }


def _parameters(sizes: Sizes, possible: Sizes | None) -> dict[str, Any]:
    return {
        "total": sizes.total,
        "active": sizes.active,
        "parts": {name: asdict(part) for name, part in sizes.parts.items()},
        "mtp_if_present": possible and possible.parts["mtp"].total,
    }


def _cache(sizes: Sizes, possible: Sizes | None) -> dict[str, Any]:
    return {
        "kv_per_token": sizes.kv_per_token,
        "mtp_kv_per_token": sizes.mtp_kv_per_token,
        "mtp_kv_per_token_if_present": possible and possible.mtp_kv_per_token,
        "state": sizes.state,
        "conv": sizes.conv,
    }


def _room(sizes: Sizes, config: ModelConfig, context: int | None) -> dict[str, Any]:
    """What fits in the machine's memory; memory used by other programs is only reported."""
    machine = memory()
    budget, free = machine["total"], machine["available"]
    least = _contexts(config, context)[0]
    return {
        "memory": machine,
        "fits_now": None if free is None else sizes.resident(least) <= free,
        "spare_without_context": None if budget is None else budget - sizes.resident(0),
        "contexts": [_context(sizes, tokens, budget) for tokens in _contexts(config, context)],
        "longest_context": None if budget is None else sizes.context_in(budget, config.max_position),
    }


def _with_weights(model: str | Path) -> Checkpoint | None:
    """The checkpoint, if its weights are here or one file is named; opened, but no weights are read."""
    path, name = Path(model), hub_name(model)
    if path.is_dir():
        here = (path / INDEX).exists() or any(path.glob("*.safetensors")) or gguf_in(path) is not None
    else:
        here = path.suffix != ".json" if name is None else name.is_choice
    return open_checkpoint(model) if here else None


def _count_mtp(config: ModelConfig, checkpoint: Checkpoint | None) -> int | None:
    """Number of MTP layers; None if only the weights could tell and they are missing."""
    if checkpoint is not None:
        return count_mtp(name for name in map(canonical_name, checkpoint.names()) if name is not None)
    return config.num_mtp_layers if config.family.hybrid else 0


def _with_mtp(config: ModelConfig) -> Sizes | None:
    """Sizes with an MTP module; None if the model has no attention layer, which the module copies."""
    attends = any(layer.mixer.part == "attention" for layer in config.layers)
    return sizes_of(config, 1) if attends else None


def _shape(config: ModelConfig, num_mtp: int | None) -> dict[str, Any]:
    mixers = Counter(layer.mixer.part for layer in config.layers)
    heads = {layer.mixer.part: layer.mixer.heads() for layer in config.layers}
    sparse = [layer.ffn for layer in config.layers if layer.ffn.num_experts]
    return {
        "family": config.family.title,
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_context": config.max_position,
        "tied_embeddings": config.tie_embeddings,
        "layers": {
            "total": len(config.layers),
            "delta": mixers["delta"],
            "attention": mixers["attention"],
            "sparse": len(sparse),
            "dense": len(config.layers) - len(sparse),
            "mtp": num_mtp,
        },
        "attention": heads.get("attention"),
        "delta": heads.get("delta"),
        "experts": sparse[0].num_experts if sparse else 0,
        "experts_per_token": sparse[0].top_k if sparse else 0,
    }


def _weights(checkpoint: Checkpoint) -> dict[str, Any]:
    """The files' tensors by stored dtype, and the first problem found, if any."""
    names = checkpoint.names()
    tensors, parameters, nbytes = Counter[str](), Counter[str](), Counter[str]()
    for name in names:
        info = checkpoint.info(name)
        tensors[info.stored] += 1
        parameters[info.stored] += math.prod(info.shape)
        nbytes[info.stored] += info.nbytes
    problem = None
    try:
        plan(checkpoint)
    except CheckpointError as error:
        problem = str(error)
    return {
        "tensors": len(names),
        "beside_the_text_model": sum(canonical_name(name) is None for name in names),
        "bytes": nbytes.total(),
        "dtypes": {
            kind: {"tensors": tensors[kind], "parameters": parameters[kind], "bytes": nbytes[kind]}
            for kind in sorted(tensors)
        },
        "problem": problem,
    }


def _contexts(config: ModelConfig, asked: int | None) -> list[int]:
    if asked is not None:
        return [asked]
    return [*(tokens for tokens in USUAL_CONTEXTS if tokens < config.max_position), config.max_position]


def _context(sizes: Sizes, tokens: int, budget: int | None) -> dict[str, Any]:
    """Cache, memory and traffic for one sequence of ``tokens``; ``spare`` is negative if it does not fit."""
    spare = None if budget is None else budget - sizes.resident(tokens)
    return {
        "tokens": tokens,
        "cache": sizes.cache(tokens),
        "resident": sizes.resident(tokens),
        "read_per_token": sizes.read_per_token(tokens),
        "spare": spare,
        "fits": None if spare is None else spare >= 0,
    }
