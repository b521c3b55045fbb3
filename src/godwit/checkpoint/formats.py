"""Recognise unsupported formats in a directory, and say what to do instead."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from godwit.errors import CheckpointError, UnsupportedModelError
from godwit.file_kinds import CONVERT, OLLAMA_BLOB, Kind, next_step, refusal, repository
from godwit.safe_files import read_beginning

INDEX = "model.safetensors.index.json"
#: Files that run code when loaded, and the indexes that point to them.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PICKLE_INDEX = "pytorch_model.bin.index.json"

_SIDE_BYTES = 1 << 20  # read at most this much of a README or a small JSON file
_BASE_MODEL = re.compile(r"^base_model:\s*(?:-\s*)?[\"']?([\w.-]+/[\w.-]+)", re.MULTILINE | re.ASCII)
#: What a directory without *.safetensors may have instead, in the order of the checks.
_INSTEAD = (
    ((".onnx", ".onnx_data", ".ort"), "holds an ONNX model"),
    (PICKLES, "its weights are pickles (.bin, .pt, .pth), which can run code and are never opened"),
    ((".h5", ".keras", ".pb"), "holds Keras or TensorFlow weights"),
    ((".msgpack",), "holds Flax weights"),
    ((".npz",), "holds NumPy arrays (old MLX weights)"),
)
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2", ".download")

_METHODS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound",
    "modelopt": "NVIDIA ModelOpt",
    "modelopt_fp4": "NVFP4 (ModelOpt)",
    "bitsandbytes": "bitsandbytes",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "hqq": "HQQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "fbgemm_fp8": "FP8 with a scale for each channel (FBGEMM)",
    "quark": "AMD Quark",
    "torchao": "torchao",
    "quanto": "Quanto",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "bitnet": "BitNet",
    "eetq": "EETQ",
}
_COMPRESSED = {
    "nvfp4": "NVFP4",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "float-quantized": "FP8 with a scale for each channel or tensor",
    "naive-quantized": "FP8 or INT8 with a scale for each channel or tensor",
    "int-quantized": "INT8",
    "pack-quantized": "INT4 or INT8",
}
#: Last part of a tensor's name -> its quantisation, for when no config names one.
_TENSORS = (
    (r"g_idx", "GPTQ"),
    (r"qweight|qzeros", "AWQ or GPTQ"),
    (r"weight_packed|weight_shape|weight_zero_point|zero_point", "compressed-tensors"),
    (r"weight_scale_2|weight_global_scale|input_global_scale", "NVFP4"),
    (r"absmax|quant_map|nested_absmax|bitsandbytes__\w+", "bitsandbytes"),
    (r"q_weight|q_scale|q_groups|q_invperm", "EXL2"),
    (r"trellis|suh|svh", "EXL3"),
    (r"W_q", "HQQ"),
    (r"gate_up_proj_(?:blocks|scales)|down_proj_(?:blocks|scales)", "MXFP4"),
    (r"scales|biases", "MLX"),
)


def is_gguf(path: str | Path) -> bool:
    """Whether ``path`` is a file that starts like a GGUF file, regardless of its name."""
    try:
        return os.path.isfile(path) and read_beginning(path, 4) == b"GGUF"
    except (OSError, CheckpointError):
        return False


def check_directory(directory: Path) -> None:
    """Reject a directory that is not a checkpoint, and say what it is.

    Raises:
        UnsupportedModelError: another format, or part of a model.
        CheckpointError: nothing usable, or an unfinished download.
        OSError: the directory cannot be read.
    """
    names = sorted(os.listdir(directory))
    _refuse_parts(directory, names)
    if INDEX in names or any(name.endswith(".safetensors") and name[0] != "." for name in names):
        return
    kind = _gguf(directory, names)
    if kind is not None:
        raise refusal(directory, kind)
    for suffixes, what in _INSTEAD:
        if any(name.endswith(suffixes) for name in names) or (suffixes is PICKLES and PICKLE_INDEX in names):
            step = CONVERT if suffixes is PICKLES else next_step(original_of(directory))
            raise UnsupportedModelError(f"{directory}: {what}; {step}")
    raise CheckpointError(f"{directory}: {_without_weights(directory, names)}")


def _refuse_parts(directory: Path, names: list[str]) -> None:
    """Reject directories that have weights but are not complete language models."""
    if "config.json" in names:
        return
    if "adapter_config.json" in names:
        base = repository(_side_json(directory / "adapter_config.json").get("base_model_name_or_path"))
        raise UnsupportedModelError(
            f"{directory}: a LoRA adapter without its base model; merge it into {base or 'that model'} "
            "(merge_and_unload of peft) and give the merged directory"
        )
    if "model_index.json" in names:
        raise UnsupportedModelError(
            f"{directory}: a diffusers pipeline, which makes images or video; give a language model"
        )
    if "params.json" in names:
        raise UnsupportedModelError(
            f"{directory}: a checkpoint in Mistral's or Meta's layout (params.json); fetch the one for "
            "transformers, with config.json and *.safetensors files"
        )


def _gguf(directory: Path, names: list[str]) -> Kind | None:
    """The kind of a directory of GGUF files none of which is a model by itself."""
    if {"blobs", "manifests"} <= set(names):
        remedy = "give the name that a model has in Ollama, or one of the files in blobs"
        return Kind("Ollama's store", remedy, foreign=False)
    if any(OLLAMA_BLOB.fullmatch(name) for name in names):
        return Kind("a directory of Ollama's blobs", "give the one that is a GGUF file", foreign=False)
    if any(name.lower().endswith(".gguf") for name in names):
        remedy = "give the GGUF file of the whole model, of a split set the first part"
        return Kind("its GGUF files are parts of a model, or go beside one", remedy, foreign=False)
    if "gguf" in str(directory).lower():
        return Kind("a repository of GGUF files, none of which is here", "fetch one of them", foreign=False)
    return None


def _without_weights(directory: Path, names: list[str]) -> str:
    if not names:
        return "an empty directory; give one with config.json and *.safetensors files, or a GGUF file"
    if any(name.endswith(_UNFINISHED) for name in names):
        return "an unfinished download; finish or repeat it"
    inside = _checkpoint_inside(directory)
    if inside is not None:
        return f"not a checkpoint, but {inside} is one; give that directory"
    if "config.json" in names:
        return "has a config.json but no weights (*.safetensors); fetch the weights too"
    return "not a checkpoint; give a directory with config.json and *.safetensors files, or a GGUF file"


def _checkpoint_inside(directory: Path) -> Path | None:
    """A checkpoint one or two levels down, as in a folder of models or the Hub's cache."""
    for pattern in ("*/config.json", "snapshots/*/config.json"):
        for config in sorted(directory.glob(pattern)):
            if any(config.parent.glob("*.safetensors")):
                return config.parent
    return None


def original_of(directory: Path, raw_config: Mapping[str, Any] | None = None) -> str | None:
    """The repository that a quantised checkpoint was made from, according to its README or config."""
    try:
        text = read_beginning(directory / "README.md", _SIDE_BYTES, folder=directory)
        found = _BASE_MODEL.search(text.decode("utf-8", "replace"))
    except (OSError, CheckpointError):
        found = None
    named = raw_config or _side_json(directory / "config.json")
    return found[1] if found else repository(named.get("_name_or_path"))


def _side_json(path: Path) -> dict[str, Any]:
    """A small JSON object; empty if it cannot be read."""
    try:
        value = json.loads(read_beginning(path, _SIDE_BYTES, folder=path.parent))
    except (OSError, CheckpointError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def name_of_quantization(section: Mapping[str, Any]) -> str:
    """The usual name of the quantisation that a section of ``config.json`` describes."""
    method = section.get("quant_method")
    if method is None and "bits" in section and "group_size" in section:
        return f"MLX of {section['bits']!r:.10} bits"
    if any(section.get(f"load_in_{bits}bit") for bits in (4, 8)):
        return f"bitsandbytes of {4 if section.get('load_in_4bit') else 8} bits"
    if method == "compressed-tensors":
        text = json.dumps([section.get("format"), section.get("config_groups")], default=str)
        named = next((name for key, name in _COMPRESSED.items() if key in text), None)
        return f"{named} (compressed-tensors)" if named else "compressed-tensors"
    if method == "modelopt" and isinstance(section.get("quant_algo"), str):
        return f"{section['quant_algo']:.20} (ModelOpt)"
    name = _METHODS.get(str(method).lower())
    if name is None:
        return f"quant_method {method!r:.60}"
    bits = section.get("bits")
    return f"{name} of {bits} bits" if isinstance(bits, int) else name


def name_of_tensors(directory: Path, names: Iterable[str]) -> str | None:
    """The quantisation indicated by tensor names, if known."""
    last = {name.rpartition(".")[2] for name in names}
    for pattern, name in _TENSORS:
        if any(re.fullmatch(pattern, part) for part in last):
            algorithm = _side_json(directory / "hf_quant_config.json").get("quantization")
            section = algorithm if isinstance(algorithm, dict) else {}
            return name_of_quantization({"quant_method": "modelopt", **section}) if section else name
    return None
