"""The forms in which models call tools, as far as they are known, and which of them a chat template has."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from godwit.engine.constraint_calls import (
    ARGS,
    CALL,
    END_CALL,
    FUNCTION,
    PYTHON_TAG,
    TOOL_CALLS,
    CallForm,
)
from godwit.server.calls import CallReader
from godwit.server.json_calls import JsonCall
from godwit.server.mistral_calls import MistralCall
from godwit.server.xml_calls import XmlCall

Format = CallForm
Schemas = Mapping[str, Mapping[str, Any]]
#: How much of what may become a call is looked at while its end is not there yet.
GLANCE = 512
_SPACE = " \t\r\n"
#: How a template writes the key of arguments; its own strings may escape the quotes.
_ARGUMENTS_KEY = re.compile(r"""\\?["']arguments\\?["']\s*:""")
_PARAMETERS_KEY = re.compile(r"""\\?["']parameters\\?["']\s*:""")


@dataclass(frozen=True)
class Dialect:
    """How calls stand in an answer.

    Attributes:
        reader: makes what reads a call behind an opener, which it is told, from the parameters of the tools.
        openers: begin a call anywhere, besides in fenced code.
        line_openers: begin one at the start of a line only.
        closer: may follow a call.
        between: characters that are left out behind a call.
        chains: a brace behind a call begins the next one.
        ends_thinking: openers of a call that thinking which was not closed may end with.
    """

    reader: Callable[[str, Schemas], CallReader]
    openers: tuple[str, ...] = ()
    line_openers: tuple[str, ...] = ()
    closer: str = ""
    between: str = _SPACE + "}],;"
    chains: bool = False
    ends_thinking: tuple[str, ...] = ()

    def whole_calls(self, text: str, schemas: Schemas, final: bool) -> bool | None:
        """Whether a text begins with a call of a known tool, behind which it ends or another one follows.

        None: more text is needed to tell.
        """
        call, undecided = self.reader(CALL, schemas), not final and END_CALL not in text
        used, _ = call.push(text[len(CALL) : GLANCE if undecided else None])
        if call.failed or call.name not in (None, *schemas):
            return False
        if undecided or not (call.ended or final):
            return None
        rest = text[len(CALL) + used :].lstrip(_SPACE)
        if not call.complete or (rest and not rest.startswith(END_CALL)) or not (rest or final):
            return None if call.complete and not final and END_CALL.startswith(rest) else False
        rest = rest.removeprefix(END_CALL).lstrip(_SPACE)
        if not final and len(rest) < len(CALL) and CALL.startswith(rest):
            return None
        return not rest or rest.startswith(CALL)


def _hermes(tag: str, schemas: Schemas) -> CallReader:
    return JsonCall()


def _llama(tag: str, schemas: Schemas) -> CallReader:
    return JsonCall(schemas)


PLAIN = Dialect(_hermes)
_MISTRAL = Dialect(
    lambda tag, schemas: JsonCall() if tag == "{" else MistralCall(), openers=(TOOL_CALLS,), chains=True
)
_DIALECTS: Mapping[Format, Dialect] = {
    "hermes": Dialect(_hermes, openers=(CALL,), closer=END_CALL, between=_SPACE + "}", ends_thinking=(CALL,)),
    "xml": Dialect(
        lambda tag, schemas: XmlCall(schemas, opened=tag == FUNCTION),
        openers=(CALL,),
        line_openers=(FUNCTION,),
        closer=END_CALL,
        between=_SPACE + "}",
        ends_thinking=(CALL,),
    ),
    "llama": Dialect(_llama, openers=(PYTHON_TAG,), line_openers=("{",), chains=True),
    "mistral": _MISTRAL,
    "mistral_args": _MISTRAL,
}


def dialect_of(format: Format) -> Dialect:
    """What is known of a form."""
    return _DIALECTS[format]


def format_of(template: str) -> Format | None:
    """How a model with this chat template calls tools; None where it has no tools or an unknown form."""
    if "tools" not in template:
        return None
    if TOOL_CALLS in template:
        return "mistral_args" if ARGS in template else "mistral"
    if CALL in template:
        if FUNCTION in template:
            return "xml"
        return "hermes" if _ARGUMENTS_KEY.search(template) else None
    return "llama" if _PARAMETERS_KEY.search(template) and "name" in template else None
