"""Structured output: JSON that fits a schema, regular expressions, grammars, choices, tool calls.

It uses llguidance rather than xgrammar: with a large vocabulary llguidance compiles a schema in a thousandth
of the time, its masks cost no more, and it has limits for both.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from time import thread_time
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from godwit.dialect.dialect import Dialect
from godwit.dialect.grammar import call_grammar
from godwit.dialect.hermes_calls import HERMES
from godwit.dialect.lark import (
    MAX_GRAMMAR_CHARS,
    MAX_REGEX_CHARS,
    GrammarRule,
    ThinkingBefore,
    choice_rule,
    json_rule,
    quoted,
    whole,
)
from godwit.dialect.tags import CALL, END_CALL, END_THINK, THINK
from godwit.engine.constraint.text_cache import TextCache
from godwit.engine.constraint.trials import Abandon, Trials
from godwit.engine.constraint.vocabulary import GrammarVocabulary, Tags
from godwit.errors import GodwitError, UsageError
from godwit.text.tokenizer import Tokenizer

COMPILE_SECONDS = 5.0
COMPILE_BYTES = 2 << 30
NUM_WORKERS = 2
#: Limits of the library on compiling, on one mask, and on the memory of a grammar. They keep a mask to about
#: 50 ms, and count steps of work, so what is refused does not depend on the machine.
LIMITS = {
    "step_lexer_fuel": 50_000,
    "step_max_items": 25_000,
    "max_items_in_row": 10_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "initial_lexer_fuel": 1_000_000,
    "verbose_errors": False,
}
#: Grammars from clients may be ambiguous, which makes each item much slower.
GRAMMAR_LIMITS = {**LIMITS, "step_max_items": 6000}
#: Seconds of CPU time per token that are not counted, and the limit on an answer's seconds beyond these.
FREE_SECONDS = 0.005
ANSWER_SECONDS = 1.0
#: Seconds of CPU time for following a grammar on trial.
WALK_SECONDS = 2.0
_PLACE = re.compile(r"^at \d+\(\d+\): ")
_ANY_OBJECT = {"type": "object"}
_EXCEEDED = re.compile(r"too many|limit|fuel|max is|too (large|complex|big)", re.IGNORECASE)
GrammarLimits = Mapping[str, Any]
FormKind = Literal["object", "schema", "regex", "grammar", "choice"]


class GrammarConstraint:
    """Holds one answer to a grammar; see :class:`~godwit.engine.stream.Constraint`.

    After thinking, tokens of tags are not allowed as mere text, such as in a JSON string. The matcher is made
    when it is first needed, and not copied for other answers: copies share the states of their lexer, and so
    its limits.

    Args:
        make: makes llguidance's matcher.
        vocab_size: tokens of the mask.
        tags: tokens of tags.
        thinking: what may come before the answer.
        calls_in_text: a call may begin anywhere in text.
        clock: returns CPU seconds of the thread.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        vocab_size: int,
        tags: Tags,
        thinking: ThinkingBefore = "none",
        *,
        calls_in_text: bool = False,
        clock: Callable[[], float] = thread_time,
    ) -> None:
        self._make = make
        self._clock = clock
        self._slow_seconds = 0.0
        self._again = partial(
            GrammarConstraint, make, vocab_size, tags, thinking, calls_in_text=calls_in_text, clock=clock
        )
        self._vocab_size = vocab_size
        self._tags = tags
        self._thinking = thinking == "opened"
        # the tags that may come where any text is allowed
        self._meant = {THINK} if thinking == "optional" else set[str]()
        if calls_in_text:
            self._meant.add(CALL)
        self._calls_in_text = calls_in_text
        self._after_opener = False

    def again(self) -> GrammarConstraint:
        """A new constraint of the same grammar, at its start."""
        return self._again()

    def allowed(self) -> Tensor | None:
        """Bool ``[vocab_size]``: which tokens may come next, stop tokens included.

        Raises:
            UsageError: the grammar is too costly to follow.
            GodwitError: the answer does not fit the grammar.
        """
        bits = np.frombuffer(self._guarded(self._matcher.compute_bitmask), dtype=np.uint8)
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        if self._after_opener:  # if any text may follow, the tag is text in fenced code
            letter, self._after_opener = self._tags.letter, False
            self._meant = {CALL, END_CALL} if letter is not None and mask[letter] else set()
        mask[self._banned(mask)] = 0
        return torch.from_numpy(mask.view(np.bool_))

    def accept(self, token: int) -> None:
        """Advance by a token that was chosen.

        Raises: as :meth:`allowed`.
        """
        self._guarded(lambda: self._matcher.consume_token(token))
        tag = next((tag for tag, id in self._tags.ids.items() if id == token), None)
        if tag == THINK and THINK in self._meant:
            self._thinking = True
        elif self._thinking:
            self._thinking = tag != END_THINK
        elif self._calls_in_text and tag == CALL:
            self._after_opener = True
        elif self._calls_in_text and tag == END_CALL:
            self._meant = {CALL}
        self._meant.discard(THINK)

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    def _banned(self, mask: NDArray[np.uint8]) -> list[int]:
        """Tags that would be mere text here: allowed where an ordinary letter is allowed, too."""
        ids, letter = self._tags.ids, self._tags.letter
        allowed = [id for tag, id in ids.items() if mask[id] and tag not in self._meant]
        if self._thinking or not allowed or letter is None or not mask[letter]:
            return []
        return allowed

    @cached_property
    def _matcher(self) -> Any:
        matcher = _without_panic(self._make)
        self._check(matcher)
        return matcher

    def _guarded(self, work: Callable[[], Any]) -> Any:
        """The result of ``work``, unless it fails or takes too much time."""
        matcher, began = self._matcher, self._clock()
        result = _without_panic(work)
        self._slow_seconds += max(0.0, self._clock() - began - FREE_SECONDS)
        self._check(matcher)
        if self._slow_seconds > ANSWER_SECONDS:
            raise UsageError("the grammar of this answer takes too much time to follow; simplify it")
        return result

    def _check(self, matcher: Any) -> None:
        if matcher.is_error():
            reason = explained(matcher.get_error())
            if _EXCEEDED.search(reason):
                raise UsageError(
                    f"the grammar of this answer is too costly to follow ({reason}); simplify it"
                )
            raise GodwitError(f"the answer no longer fits its grammar ({reason}); simplify it")


class UntriedGrammar(GodwitError):
    """A grammar was not tried yet, and the caller does not want to wait for its trial."""


class Constraints:
    """Makes constraints for the answers of one model. Thread-safe.

    A new grammar is tried in a process of its own, which compiles it and follows it for some tokens, within
    ``seconds``. Methods block during that, so call them from a thread of your own. Only the verdict is kept;
    the grammar is compiled again when an answer begins.

    Args:
        tokenizer: the model's.
        vocab_size: number of tokens that can be chosen; None: the tokenizer's.
        seconds: limit for one trial.

    Raises:
        UsageError: llguidance is not installed, or the model has no token to end an answer with.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int | None = None, *, seconds: float = COMPILE_SECONDS
    ) -> None:
        self.vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        stops = sorted(id for id in tokenizer.stop_ids if id < self.vocab_size)
        if not stops:
            raise UsageError("this model has no stop token, so structured output is not possible")
        vocabulary = GrammarVocabulary(tokenizer, self.vocab_size, stops[0])
        self._special = {tokenizer.id_to_token(id): id for id in vocabulary.special_token_ids}
        self._tags = Tags.of(tokenizer, self.vocab_size)
        try:
            import llguidance
        except ModuleNotFoundError:
            raise UsageError(
                "structured output needs the package llguidance; install it with "
                "pip install 'godwit-llm[serve]'"
            ) from None
        self._library: Any = llguidance
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(vocabulary), n_vocab=self.vocab_size, eos_token=stops
        )
        setup = {
            "tokens": [token.hex() for token in vocabulary.tokens],
            "special_ids": vocabulary.special_token_ids,
            "stop_ids": stops,
            "walk_seconds": WALK_SECONDS,
        }
        self._trials = Trials(setup, COMPILE_BYTES, seconds, NUM_WORKERS)
        self._ask: Callable[[Mapping[str, Any]], dict[str, str]] = self._trials.ask
        self._verdicts = TextCache()  # by grammar: why it cannot be used, or ""
        self._conversions = TextCache()

    def only_known(self) -> Constraints:
        """The same, but a new grammar raises :class:`UntriedGrammar` instead of blocking."""

        def refuse(request: Mapping[str, Any]) -> dict[str, str]:
            raise UntriedGrammar("the grammar was not tried yet")

        return self._asking(refuse)

    def until(self, abandon: Abandon) -> Constraints:
        """The same, but ``abandon`` ends a trial under way."""
        return self._asking(partial(self._trials.ask, abandon=abandon))

    def _asking(self, ask: Callable[[Mapping[str, Any]], dict[str, str]]) -> Constraints:
        same = copy.copy(self)
        same._ask = ask
        return same

    def rule(self, kind: FormKind, value: Any = None) -> GrammarRule:
        """The grammar rule for an answer.

        Args:
            kind: "object": any JSON object. "schema": JSON that fits a schema of JSON Schema 2020-12, as far
                as a grammar can check it; properties come in the schema's order. "regex": a text that matches
                an expression as a whole, in the syntax of Rust's ``regex``. "grammar": a text of a
                context-free grammar, in llguidance's variant of Lark or llama.cpp's GBNF. "choice": one of
                some texts.
            value: the schema, expression, grammar or texts. Objects of a schema that list ``properties``
                allow no others unless it says so; formats that are not enforced are ignored.

        Raises:
            UsageError: it cannot be used, or costs too much.
        """
        if kind == "regex":
            if len(value) > MAX_REGEX_CHARS:
                raise UsageError(f"a regular expression may have {MAX_REGEX_CHARS} characters")
            pattern = self._library.regex_to_lark(value.replace("\n", "\\n"))
            return GrammarRule(f"/{pattern}/", "the regular expression")
        if kind == "grammar":
            return GrammarRule("@inner", "the grammar", self._converted(value))
        if kind == "choice":
            return GrammarRule(choice_rule(value), "the choice")
        return GrammarRule(json_rule(_ANY_OBJECT if kind == "object" else value), "the schema")

    def held_to(self, rule: GrammarRule, thinking: ThinkingBefore = "none") -> GrammarConstraint:
        """A constraint for an answer.

        Args:
            rule: what the answer has to be.
            thinking: what may come before it: nothing, ``<think>...</think>``, or the rest of a thought that
                the prompt has opened.

        Raises:
            UsageError: it cannot be used, or costs too much.
        """
        return self._make(whole(rule, thinking=thinking), rule.what, _limits(rule), thinking)

    def tool_calls(
        self,
        tools: Sequence[Mapping[str, Any]],
        choice: str = "required",
        *,
        parallel: bool = True,
        dialect: Dialect = HERMES,
        thinking: ThinkingBefore = "none",
        otherwise: GrammarRule | None = None,
    ) -> GrammarConstraint:
        """A constraint for calls of tools whose arguments fit their schemas, as far as a grammar can check.

        Args:
            tools: in OpenAI's format, or only the inner objects.
            choice: "auto" allows text, with or without calls; "required" only calls; otherwise the name of
                the one tool to call.
            parallel: an answer may have several calls.
            dialect: how the model writes calls.
            thinking: as for :meth:`held_to`.
            otherwise: with "auto", what an answer without calls has to be; an answer is then either that or
                only calls.

        Raises: as :meth:`rule`.
        """
        grammar = call_grammar(
            tools,
            choice,
            parallel=parallel,
            grammar=dialect.grammar,
            thinking=thinking,
            otherwise=otherwise,
            mark=self._mark,
        )
        what = "a tool's schema" if otherwise is None else f"{otherwise.what} or a tool's"
        calls_in_text = choice == "auto" and otherwise is None
        return self._make(grammar, what, _limits(otherwise), thinking, calls_in_text=calls_in_text)

    def _mark(self, text: str) -> str:
        """A tag in a grammar: as a token if it is a special one, otherwise as text."""
        return f"<[{self._special[text]}]>" if text in self._special else quoted(text)

    def _converted(self, grammar: str) -> str:
        if len(grammar) > MAX_GRAMMAR_CHARS:
            raise UsageError(f"a grammar may have {MAX_GRAMMAR_CHARS} characters")
        if (known := self._conversions.get(grammar)) is not None:
            return known
        answer = self._ask({"convert": grammar})
        if "lark" not in answer:
            raise UsageError(f"the grammar cannot be used: {explained(answer['error'])}")
        self._conversions.put(grammar, answer["lark"])
        return answer["lark"]

    def _make(
        self,
        grammar: str,
        what: str,
        limits: GrammarLimits,
        thinking: ThinkingBefore,
        *,
        calls_in_text: bool = False,
    ) -> GrammarConstraint:
        verdict = self._verdicts.get(grammar)
        if verdict is None:
            error = self._ask({"grammar": grammar, "limits": limits})["error"]
            verdict = explained(error) if error else ""
            self._verdicts.put(grammar, verdict)
        if verdict:
            raise UsageError(f"{what} cannot be used: {verdict}")
        return GrammarConstraint(
            partial(self._compile, grammar, limits),
            self.vocab_size,
            self._tags,
            thinking,
            calls_in_text=calls_in_text,
        )

    def _compile(self, grammar: str, limits: GrammarLimits) -> Any:
        library = self._library
        return library.LLMatcher(
            self._tokenizer, grammar, log_level=0, limits=library.LLParserLimits(**limits)
        )


def explained(error: str) -> str:
    """The gist of an error message of the library, in one line."""
    lines = [line.strip() for line in error.splitlines()] or [""]
    point = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    point = _PLACE.sub("", point).removeprefix("failed to compile JSON schema: ")
    if point.startswith("NoExtension"):
        return "nothing can fit it"
    if point.startswith("Resource "):
        return "it refers to another document, and such references are not followed"
    return point.rstrip(".:")[:300] or "it is not valid"


def _limits(rule: GrammarRule | None) -> GrammarLimits:
    return GRAMMAR_LIMITS if rule is not None and rule.inner else LIMITS


def _without_panic(work: Callable[[], Any]) -> Any:
    """The result of ``work``. A panic in Rust code is not an Exception; unhandled it would end the engine."""
    try:
        return work()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise GodwitError(f"the grammar library failed ({explained(str(error))})") from None
