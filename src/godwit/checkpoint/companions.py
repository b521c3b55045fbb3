"""A model's files other than its tensors and config."""

from __future__ import annotations

from pathlib import Path

from godwit.checkpoint.packed_layout import MAX_FILE_BYTES
from godwit.errors import CheckpointError
from godwit.safe_files import read_bounded

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)


def read_companions(directory: Path) -> dict[str, bytes]:
    """Read the :data:`COMPANIONS` in a directory.

    Raises:
        CheckpointError: one of them is not a regular file, is too large, is a link out of the directory or
            cannot be read.
    """
    found: dict[str, bytes] = {}
    for name in COMPANIONS:
        path = directory / name
        try:
            found[name] = read_bounded(path, MAX_FILE_BYTES, folder=directory)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    return found
