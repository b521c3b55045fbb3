"""Reading the small files around a tokenizer: JSON with limits, the chat template, the special tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from godwit.errors import CheckpointError
from godwit.file_kinds import kind_of, refusal
from godwit.safe_files import check_json, read_bounded

from .chat_template import ChatTemplate

MAX_TOKENIZER_BYTES = 64 << 20  # twice that of the largest known
MAX_SIDE_FILE_BYTES = 16 << 20
#: The files of a tokenizer, and the size limit of each.
FILES = {
    "tokenizer.json": MAX_TOKENIZER_BYTES,
    **dict.fromkeys(
        ("tokenizer_config.json", "generation_config.json", "config.json", "chat_template.jinja"),
        MAX_SIDE_FILE_BYTES,
    ),
}
#: Reads a file by its name and size limit, None if there is no such file; raises CheckpointError.
ReadText = Callable[[str, int], str | None]


def files_in(folder: Path) -> dict[str, bytes]:
    """The :data:`FILES` that a directory has. Raises CheckpointError."""
    found: dict[str, bytes] = {}
    for name, limit in FILES.items():
        path = folder / name
        try:
            found[name] = read_bounded(path, limit, folder=folder)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    return found


def in_memory(files: Mapping[str, bytes], where: str) -> ReadText:
    """Files that were read already, from what errors call ``where``."""

    def read(name: str, limit: int) -> str | None:
        if name not in files:
            return None
        check_size(len(files[name]), limit, f"{where}/{name}")
        try:
            return files[name].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{where}/{name} cannot be read: {error}") from None

    return read


def check_size(size: int, limit: int, name: object) -> None:
    """Raises CheckpointError for a file of more than ``limit`` bytes."""
    if size > limit:
        raise CheckpointError(f"{name} is refused: it is larger than {limit >> 20} MiB, more than any needs")


def read_json(
    read: ReadText, where: str, name: str, limit: int = MAX_SIDE_FILE_BYTES
) -> dict[str, Any] | None:
    """The object in a file, or None where there is no file; raises CheckpointError."""
    text = read(name, limit)
    if text is None:
        return None
    if name != "tokenizer.json":  # its merges are many small lists; the limits of the trial hold for it
        check_json(text.encode("utf-8", "replace"), f"{where}/{name}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        kind = kind_of(text.encode("utf-8", "replace"), len(text))
        if kind is not None:
            raise refusal(f"{where}/{name}", kind) from None
        raise CheckpointError(f"{where}/{name} is not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}/{name} does not hold a JSON object; download it again")
    return value


def read_template(
    read: ReadText, settings: Mapping[str, Any], special: Mapping[str, str]
) -> ChatTemplate | None:
    """The template of a checkpoint: `chat_template.jinja`, else the one or two in `tokenizer_config.json`."""
    text = read("chat_template.jinja", MAX_SIDE_FILE_BYTES)
    if text is not None:
        return ChatTemplate(text, special)
    found = settings.get("chat_template")
    named = {"default": found} if isinstance(found, str) else {}
    for entry in found if isinstance(found, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("template"), str):
            named[str(entry.get("name"))] = entry["template"]
    if not named:
        return None
    default = named.get("default", next(iter(named.values())))
    return ChatTemplate(default, special, tool_source=named.get("tool_use"))


def token_text(value: Any) -> str | None:
    """The text of a special token, which files give as a string or as an object with `content`."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def eos_ids(value: Any) -> list[int]:
    """The ids in an `eos_token_id`, which files give as a number, a list or null."""
    values = value if isinstance(value, list) else [value]
    return [id for id in values if isinstance(id, int) and not isinstance(id, bool)]
