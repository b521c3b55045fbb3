"""Checkpoints: the protocol used by the loader, and directories of safetensors files, plain or FP8."""

from godwit.checkpoint.fp8 import dequantize_fp8, quantize_fp8
from godwit.checkpoint.protocol import Checkpoint, TensorInfo
from godwit.checkpoint.reader import SafetensorsCheckpoint, open_checkpoint, read_raw_config
from godwit.checkpoint.writer import TensorSource, save_checkpoint

__all__ = [
    "Checkpoint",
    "SafetensorsCheckpoint",
    "TensorInfo",
    "TensorSource",
    "dequantize_fp8",
    "open_checkpoint",
    "quantize_fp8",
    "read_raw_config",
    "save_checkpoint",
]
