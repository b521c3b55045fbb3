"""Answers of a given form: JSON that fits a schema, regular expressions, grammars, choices, tool calls.

The work is llguidance's and not xgrammar's, since with a large vocabulary it compiles a schema in a
thousandth of the time, its masks cost no more, and it has limits for both.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from godwit.engine.constraint_calls import CALL, END_CALL, CallForm, call_grammar
from godwit.engine.constraint_grammar import (
    END_THINK,
    MAX_GRAMMAR_CHARS,
    MAX_REGEX_CHARS,
    THINK,
    Rule,
    Thinking,
    choice_rule,
    json_rule,
    quoted,
    whole,
)
from godwit.engine.constraint_trial import Trials
from godwit.errors import GodwitError, UsageError
from godwit.tokenizer import Tokenizer

COMPILE_SECONDS = 5.0
COMPILE_BYTES = 2 << 30
NUM_WORKERS = 2
#: Of the texts of grammars that are kept; compiled, one takes up to some 30 times as much.
MAX_CACHED_CHARS = 4 << 20
#: The library's, of compiling, of one step of one answer, and of what its grammar may come to hold.
LIMITS = {
    "step_lexer_fuel": 100_000,
    "step_max_items": 25_000,
    "max_items_in_row": 2000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "initial_lexer_fuel": 1_000_000,
    "verbose_errors": False,
}
_TAGS = (CALL, END_CALL, THINK, END_THINK)
_PLACE = re.compile(r"^at \d+\(\d+\): ")
_ANY_OBJECT = {"type": "object"}
Kind = Literal["object", "schema", "regex", "grammar", "choice"]


@dataclass(frozen=True)
class Tags:
    """The tokens that stand for tags in a vocabulary; those that are not single tokens are absent.

    Attributes:
        ids: the id of each tag.
        letter: the id of an ordinary letter, allowed wherever any text is.
    """

    ids: Mapping[str, int]
    letter: int | None

    @staticmethod
    def of(tokenizer: Tokenizer, vocab_size: int) -> Tags:
        known = {
            tag: id for tag in _TAGS if (id := tokenizer.token_to_id(tag)) is not None and id < vocab_size
        }
        letter = tokenizer.encode("~", add_special_tokens=False)[-1:]
        return Tags(known, letter[0] if letter else None)


class GrammarConstraint:
    """Holds one answer to a grammar; see :class:`~godwit.engine.stream.Constraint`.

    Behind the thinking, tokens that stand for tags are no way to write a text, such as a string of JSON.

    Args:
        matcher: llguidance's, at its start; used up.
        vocab_size: tokens of the mask.
        tags: those of the vocabulary.
        thinking: what may come before the form.
        calls_in_text: a call may begin anywhere in a text.
    """

    def __init__(
        self,
        matcher: Any,
        vocab_size: int,
        tags: Tags,
        thinking: Thinking = "none",
        *,
        calls_in_text: bool = False,
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._tags = tags
        self._thinking = thinking == "opened"
        # the tags that are more than text where any text is allowed
        self._meant = {THINK} if thinking == "optional" else set[str]()
        if calls_in_text:
            self._meant.add(CALL)
        self._calls_in_text = calls_in_text

    def allowed(self) -> Tensor | None:
        """Bool ``[vocab_size]``: which tokens may come next, stop tokens included.

        Raises:
            GodwitError: the form is too costly to follow.
        """
        bits = np.frombuffer(_guarded(self._matcher.compute_bitmask), dtype=np.uint8)
        self._check()
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        mask[self._banned(mask)] = 0
        return torch.from_numpy(mask.view(np.bool_))

    def accept(self, token: int) -> None:
        """Go on by a token that was chosen.

        Raises:
            GodwitError: it does not fit the form, or the form is too costly to follow.
        """
        _guarded(lambda: self._matcher.consume_token(token))
        self._check()
        tag = next((tag for tag, id in self._tags.ids.items() if id == token), None)
        if tag == THINK and THINK in self._meant:
            self._thinking = True
        elif self._thinking:
            self._thinking = tag != END_THINK
        elif self._calls_in_text and tag in (CALL, END_CALL):
            self._meant = {CALL} if tag == END_CALL else set()
        self._meant.discard(THINK)

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    def _banned(self, mask: NDArray[np.uint8]) -> list[int]:
        """Tags that would be mere text here: those allowed where an ordinary letter is, too."""
        ids, letter = self._tags.ids, self._tags.letter
        allowed = [id for tag, id in ids.items() if mask[id] and tag not in self._meant]
        if self._thinking or not allowed or letter is None or not mask[letter]:
            return []
        return allowed

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = explained(self._matcher.get_error())
            raise GodwitError(f"the answer cannot be held to its form any longer ({reason}); simplify it")


class Constraints:
    """Makes constraints for the answers of one model. For several threads.

    Each method blocks while a form that is not known yet is compiled, first of all on trial in a process of
    its own that gets at most ``seconds``: they are for the thread of whoever asks, never for the engine's.

    Args:
        tokenizer: the model's.
        vocab_size: tokens that can be chosen, where not all of the tokenizer's.
        seconds: to compile one form.

    Raises:
        UsageError: llguidance is not installed, or the model has no token to end an answer with.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int | None = None, *, seconds: float = COMPILE_SECONDS
    ) -> None:
        self.vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        stops = sorted(id for id in tokenizer.stop_ids if id < self.vocab_size)
        if not stops:
            raise UsageError("this model has no stop token, so its answers cannot be held to a form")
        vocabulary = _Vocabulary(tokenizer, self.vocab_size, stops[0])
        self._special = {tokenizer.id_to_token(id): id for id in vocabulary.special_token_ids}
        self._tags = Tags.of(tokenizer, self.vocab_size)
        try:
            import llguidance
        except ModuleNotFoundError:
            raise UsageError(
                "holding answers to a form needs the package llguidance; install it with "
                "pip install 'godwit-llm[serve]'"
            ) from None
        self._library: Any = llguidance
        self._limits = llguidance.LLParserLimits(**LIMITS)  # type: ignore[arg-type]
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(vocabulary), n_vocab=self.vocab_size, eos_token=stops
        )
        setup = {
            "tokens": [token.hex() for token in vocabulary.tokens],
            "special_ids": vocabulary.special_token_ids,
            "stop_ids": stops,
            "limits": LIMITS,
            "memory_bytes": COMPILE_BYTES,
        }
        self._trials = Trials(setup, seconds, NUM_WORKERS)
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Any] = OrderedDict()  # a matcher at its start, or why there is none

    def rule(self, kind: Kind, value: Any = None) -> Rule:
        """The form of an answer.

        Args:
            kind: "object": any JSON object. "schema": JSON that fits a schema of JSON Schema 2020-12, without
                what a grammar cannot check; properties come in its order. "regex": a text that matches an
                expression as a whole, in the syntax of Rust's ``regex``. "grammar": a text of a context-free
                grammar, in llguidance's dialect of Lark or llama.cpp's GBNF. "choice": one of some texts.
            value: the schema, the expression, the grammar or the texts. Objects of a schema that list
                ``properties`` take no others unless it says so; formats that are not checked are dropped.

        Raises:
            UsageError: it cannot be used, or costs too much.
        """
        if kind == "regex":
            if len(value) > MAX_REGEX_CHARS:
                raise UsageError(f"a regular expression may have {MAX_REGEX_CHARS} characters")
            pattern = self._library.regex_to_lark(value.replace("\n", "\\n"))
            return Rule(f"/{pattern}/", "the regular expression")
        if kind == "grammar":
            return Rule("@inner", "the grammar", self._converted(value))
        if kind == "choice":
            return Rule(choice_rule(value), "the choice")
        return Rule(json_rule(_ANY_OBJECT if kind == "object" else value), "the schema")

    def held_to(self, rule: Rule, thinking: Thinking = "none") -> GrammarConstraint:
        """Holds an answer to a form.

        Args:
            rule: the form.
            thinking: what may come before: nothing, ``<think>...</think>``, or, where the prompt has opened
                it already, the rest of that.

        Raises:
            UsageError: it cannot be used, or costs too much.
        """
        return self._make(whole(rule, thinking=thinking), rule.what, thinking)

    def tool_calls(
        self,
        tools: Sequence[Mapping[str, Any]],
        choice: str = "required",
        *,
        parallel: bool = True,
        form: CallForm = "hermes",
        thinking: Thinking = "none",
        otherwise: Rule | None = None,
    ) -> GrammarConstraint:
        """Calls of tools whose arguments fit their schemas, as far as a grammar can check.

        Args:
            tools: in OpenAI's shape, or only the inner objects.
            choice: "auto" allows text, with or without calls; "required" nothing but calls; else the name of
                the one tool to be called.
            parallel: an answer may have several calls.
            form: how the model writes calls.
            thinking: as for :meth:`held_to`.
            otherwise: with "auto", what an answer that calls no tool has to be; one that does is nothing but
                calls then.

        Raises: as :meth:`rule`.
        """
        grammar = call_grammar(
            tools,
            choice,
            parallel=parallel,
            form=form,
            thinking=thinking,
            otherwise=otherwise,
            mark=self._mark,
        )
        what = "a tool's schema" if otherwise is None else f"{otherwise.what} or a tool's"
        calls_in_text = choice == "auto" and otherwise is None
        return self._make(grammar, what, thinking, calls_in_text=calls_in_text)

    def _mark(self, text: str) -> str:
        """A mark of calls in a grammar: as a token where it is one that no text can be, else as a text."""
        return f"<[{self._special[text]}]>" if text in self._special else quoted(text)

    def _converted(self, grammar: str) -> str:
        if len(grammar) > MAX_GRAMMAR_CHARS:
            raise UsageError(f"a grammar may have {MAX_GRAMMAR_CHARS} characters")
        answer = self._trials.ask({"convert": grammar})
        if "lark" not in answer:
            raise UsageError(f"the grammar cannot be used: {explained(answer['error'])}")
        return answer["lark"]

    def _make(
        self, grammar: str, what: str, thinking: Thinking, *, calls_in_text: bool = False
    ) -> GrammarConstraint:
        with self._lock:
            known = self._known.get(grammar)
            if known is not None:
                self._known.move_to_end(grammar)
        if known is None:
            known = self._compile(grammar)
            self._keep(grammar, known)
        if isinstance(known, str):
            raise UsageError(f"{what} cannot be used: {known}")
        with self._lock:
            matcher = known.deep_copy()
        return GrammarConstraint(matcher, self.vocab_size, self._tags, thinking, calls_in_text=calls_in_text)

    def _keep(self, grammar: str, known: Any) -> None:
        with self._lock:
            self._known[grammar] = known
            while sum(map(len, self._known)) > MAX_CACHED_CHARS:
                self._known.popitem(last=False)

    def _compile(self, grammar: str) -> Any:
        """A matcher, or why there is none; what takes too long raises, and may be tried again."""
        if error := self._trials.ask({"grammar": grammar}).get("error"):
            return explained(error)
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        return explained(matcher.get_error()) if matcher.is_error() else matcher


class _Vocabulary:
    """A tokenizer as the library wants to have it: control tokens are never a way to write a text."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop: int) -> None:
        self.eos_token_id = stop
        self.tokens = [tokenizer.token_bytes(id) or b"" for id in range(vocab_size)]
        self.special_token_ids = sorted(
            id for id in tokenizer.special_ids | tokenizer.stop_ids if id < vocab_size
        )
        self._tokenizer = tokenizer
        tags = [tag for tag in _TAGS if tokenizer.token_to_id(tag) not in (None, *self.special_token_ids)]
        self._tags = re.compile(f"({'|'.join(map(re.escape, tags))})") if tags else None

    def __call__(self, text: bytes | str) -> list[int]:
        """How the model would write a text that a grammar forces."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        parts = [text] if self._tags is None else self._tags.split(text)
        return [id for part in parts for id in self._part(part)]

    def _part(self, part: str) -> list[int]:
        tag = self._tokenizer.token_to_id(part) if part in _TAGS else None
        return self._tokenizer.encode(part, add_special_tokens=False) if tag is None else [tag]


def explained(error: str) -> str:
    """The point of a message of the library, in one line."""
    lines = [line.strip() for line in error.splitlines()] or [""]
    point = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    point = _PLACE.sub("", point).removeprefix("failed to compile JSON schema: ")
    if point.startswith("NoExtension"):
        return "nothing can fit it"
    if point.startswith("Resource "):
        return "it refers to another document, and such references are not followed"
    return point.rstrip(".:")[:300] or "it is not valid"


def _guarded(work: Any) -> Any:
    """Rust code that panics raises what is no Exception, which would end the engine."""
    try:
        return work()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise GodwitError(f"the answer cannot be held to its form ({explained(str(error))})") from None
