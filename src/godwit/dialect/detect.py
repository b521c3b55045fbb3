"""The dialects that are known, and which of them a chat template writes."""

from __future__ import annotations

from godwit.dialect.dialect import Dialect
from godwit.dialect.hermes_calls import HERMES
from godwit.dialect.llama_calls import LLAMA
from godwit.dialect.mistral_calls import MISTRAL, MISTRAL_ARGS
from godwit.dialect.xml_calls import XML

#: In the order in which they are looked for: what is more specific comes first.
DIALECTS = (MISTRAL_ARGS, MISTRAL, XML, HERMES, LLAMA)


def detect(template: str) -> Dialect | None:
    """How a model with this chat template calls tools; None if it has no tools or an unknown way."""
    if "tools" not in template:
        return None
    return next((dialect for dialect in DIALECTS if dialect.written_in(template)), None)
