"""The tags between which models think and call tools: one table for readers, grammars and prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
TOOL_CALLS, CALL_ID, ARGS, PYTHON_TAG = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|python_tag|>"
#: Special tokens that belong to calls, and so to the text of an answer.
MARKS = (TOOL_CALLS, CALL_ID, ARGS, PYTHON_TAG)
#: Names of the arguments in calls that are JSON, and the keys with which an untagged call may begin.
ARGUMENTS = ("arguments", "parameters", "args")
FIRST_KEYS = ("name", "type", "id", *ARGUMENTS)
#: Names of functions and parameters that can stand in a tag.
TAG_NAME = re.compile(r"[^\s<>](?:[^\n<>]{0,254}[^\s<>])?")


def open_end(text: str, tags: Sequence[str]) -> int:
    """Length of the longest end of ``text`` with which one of the tags begins."""
    sizes = [size for tag in tags for size in range(1, len(tag)) if text.endswith(tag[:size])]
    return max(sizes, default=0)
