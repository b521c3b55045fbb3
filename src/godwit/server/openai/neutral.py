"""Fields of other servers, accepted only with values that change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from godwit.server.fields import Ignored, RequestBody


def _equals(wanted: float) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if isinstance(value, bool) or value != wanted:
            raise ValueError(f"this server supports only {wanted:g}")
        return value

    return check


Zero = Annotated[Any, BeforeValidator(_equals(0)), WithJsonSchema({"enum": [0]})]
One = Annotated[Any, BeforeValidator(_equals(1)), WithJsonSchema({"enum": [1]})]
MinusOne = Annotated[Any, BeforeValidator(_equals(-1)), WithJsonSchema({"enum": [-1]})]


class NeutralFields(RequestBody):
    """Fields that clients of llama.cpp and vLLM send. Values that would change the answer are refused."""

    cache_prompt: bool | None = Field(
        default=None, description="Accepted and ignored: prompts are always cached."
    )
    skip_special_tokens: Literal[True] | None = None
    spaces_between_special_tokens: bool | None = Field(
        default=None, description="Accepted and ignored: special tokens are never in an answer."
    )
    include_stop_str_in_output: Literal[False] | None = None
    use_beam_search: Literal[False] | None = None
    length_penalty: One = None
    early_stopping: Literal[False] | None = None
    typical_p: One = None
    tfs_z: One = None
    mirostat: Zero = None
    xtc_probability: Zero = None
    dry_multiplier: Zero = None
    dynatemp_range: Zero = None
    priority: Zero = None
    id_slot: MinusOne = None
    user: Ignored = None
