"""Tool calls of Hermes 2 Pro, Qwen2.5 and Qwen3: JSON between ``<tool_call>`` tags."""

from __future__ import annotations

import re

from godwit.dialect.dialect import SPACE, Dialect
from godwit.dialect.json_calls import JsonCall, json_call
from godwit.dialect.tagged_calls import TaggedCalls
from godwit.dialect.tags import CALL, END_CALL

#: How a template writes the key of arguments; the template's own strings may escape the quotes.
_ARGUMENTS_KEY = re.compile(r"""\\?["']arguments\\?["']\s*:""")

HERMES = Dialect(
    name="hermes",
    written_in=lambda template: CALL in template and _ARGUMENTS_KEY.search(template) is not None,
    reader=lambda opener, schemas: JsonCall(),
    grammar=TaggedCalls(json_call),
    openers=(CALL,),
    closer=END_CALL,
    between=SPACE + "}",
    ends_thinking=True,
)
