"""What clients may send to /v1/completions, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from godwit.server.fields import MAX_TOKENS, Items, Request, TokenId
from godwit.server.openai.schemas import (
    MAX_CHOICES,
    ChatMessage,
    Continuing,
    NumLogprobs,
    SharedFields,
    Tool,
)

TokenIds = Annotated[Items[TokenId], Field(min_length=1)]


def _one_kind(prompt: Any) -> str:
    return "Ids" if isinstance(prompt, list) else "Text"


def _kind(prompt: Any) -> str:
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    return "Prompts" if isinstance(first, str | list) else _one_kind(prompt)


_Text = Annotated[str, Tag("Text")]
_Ids = Annotated[TokenIds, Tag("Ids")]
#: Each form is recognised by its beginning, so that a wrong prompt is not held against all of them.
OnePrompt = Annotated[_Text | _Ids, Discriminator(_one_kind)]
Prompts = Annotated[Items[OnePrompt], Field(min_length=1, max_length=MAX_CHOICES), Tag("Prompts")]


class CompletionRequest(SharedFields):
    """A body for /v1/completions; texts hold control tokens only where ``parse_special`` says so."""

    prompt: Annotated[_Text | _Ids | Prompts, Discriminator(_kind)]
    max_tokens: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    logprobs: NumLogprobs | None = None
    echo: bool = Field(default=False, description="With logprobs, the prompt's tokens have theirs too.")
    best_of: int | None = Field(default=None, description="As much as n, if it is given at all.")
    suffix: str = Field(
        default="", description="What follows the answer, for models that were made to fill gaps."
    )
    parse_special: bool = Field(
        default=False, description="Control tokens that a text spells out are read as such: an addition."
    )
    add_special_tokens: bool = Field(
        default=True, description="A text gets what the model wants around it, such as a BOS token."
    )

    @model_validator(mode="after")
    def _can_be_done(self) -> CompletionRequest:
        if self.suffix and self.echo:
            raise ValueError("`echo` and `suffix` exclude each other")
        if self.best_of not in (None, self.n):
            raise ValueError("`best_of` cannot be other than `n`")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


class TokenizeRequest(Continuing):
    """A body for /tokenize: a text, or a conversation as the model would read it."""

    model: str | None = None
    prompt: str | None = None
    messages: Items[ChatMessage] | None = Field(default=None, min_length=1, max_length=4096)
    tools: Items[Tool] = Field(default=[], max_length=256)
    add_special_tokens: bool = True
    parse_special: bool = Field(
        default=True, description="Control tokens that `prompt` spells out are read as such."
    )
    chat_template_kwargs: dict[str, Any] = Field(default={}, max_length=16)

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either `prompt` or `messages` is needed")
        return self


class DetokenizeRequest(Request):
    """A body for /detokenize."""

    model: str | None = None
    tokens: Items[TokenId]
