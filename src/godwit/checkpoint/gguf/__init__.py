"""GGUF, the file format of llama.cpp: container, block types, config, tensors and tokenizer."""

from godwit.checkpoint.gguf.reader import GgufCheckpoint as GgufCheckpoint
