"""Schemas of text completions, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from godwit.server.fields import MAX_TOKENS, Items, RequestBody, TokenId
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
#: The form is recognized by its beginning, so that a wrong prompt gets one error and not one for each form.
OnePrompt = Annotated[_Text | _Ids, Discriminator(_one_kind)]
Prompts = Annotated[Items[OnePrompt], Field(min_length=1, max_length=MAX_CHOICES), Tag("Prompts")]


class CompletionRequest(SharedFields):
    """A body for /v1/completions. Control tokens in texts are recognized only with ``parse_special``."""

    prompt: Annotated[_Text | _Ids | Prompts, Discriminator(_kind)]
    max_tokens: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    logprobs: NumLogprobs | None = None
    echo: bool = Field(default=False, description="With logprobs, the prompt's tokens have theirs too.")
    best_of: int | None = Field(default=None, description="Must equal n.")
    suffix: str = Field(default="", description="The text after the answer, for fill-in-the-middle models.")
    parse_special: bool = Field(
        default=False, description="Recognize control tokens that a text spells out: an extension."
    )
    add_special_tokens: bool = Field(
        default=True, description="Add the special tokens that the model expects, such as BOS."
    )

    @model_validator(mode="after")
    def _can_be_done(self) -> CompletionRequest:
        if self.suffix and self.echo:
            raise ValueError("`echo` and `suffix` cannot be combined")
        if self.best_of not in (None, self.n):
            raise ValueError("`best_of` must equal `n`")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


class TokenizeRequest(Continuing):
    """A body for /tokenize: a text, or a conversation as the model reads it."""

    prompt: str | None = None
    messages: Items[ChatMessage] | None = Field(default=None, min_length=1, max_length=4096)
    tools: Items[Tool] = Field(default=[], max_length=256)
    add_special_tokens: bool = True
    parse_special: bool = Field(
        default=True, description="Recognize control tokens that `prompt` spells out."
    )
    chat_template_kwargs: dict[str, Any] = Field(default={}, max_length=16)

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either `prompt` or `messages`")
        return self


class DetokenizeRequest(RequestBody):
    """A body for /detokenize."""

    tokens: Items[TokenId]
