"""Checkpoints: directories of safetensors (plain or FP8), local or from the Hub, read and written."""

from godwit.checkpoint.fp8 import dequantize_fp8, quantize_fp8
from godwit.checkpoint.reader import Checkpoint, TensorInfo, open_checkpoint, read_raw_config
from godwit.checkpoint.writer import TensorSource, save_checkpoint

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "TensorSource",
    "dequantize_fp8",
    "open_checkpoint",
    "quantize_fp8",
    "read_raw_config",
    "save_checkpoint",
]
