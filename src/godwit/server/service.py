"""The service behind all routes: turns checked requests into answers of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from time import time
from typing import Any

from starlette.requests import Request

import godwit
from godwit.dialect.detect import detect
from godwit.dialect.lark import ThinkingBefore
from godwit.dialect.parser import AnswerParser
from godwit.dialect.tags import MARKS, THINK
from godwit.engine import GenerationRequest, SamplingParams, Stream
from godwit.engine.chat_prompt import Prompt, takes_one_call
from godwit.errors import GodwitError, UsageError
from godwit.server.answers import Answers
from godwit.server.body import BodyReader
from godwit.server.errors import ApiError, bad_request, from_engine, overloaded, too_long
from godwit.server.fields import ToolChoice
from godwit.server.host import EngineHost
from godwit.server.log import Record
from godwit.server.metrics import Metrics
from godwit.server.openai.fim import Fim
from godwit.server.openai.items import ItemStore
from godwit.server.prompts import Conversation, PromptMaker, PromptQueue
from godwit.server.settings import Settings
from godwit.server.structured import NO_TOOLS, Calls, Form, FormMaker
from godwit.server.thinking import ThinkingMaker, ThinkingWish


@dataclass(frozen=True, kw_only=True)
class ChatJob:
    """A request for answers to a conversation, whatever the API.

    Attributes:
        conversation: with the tools that may be called.
        n: number of answers.
        choice: whether a tool must be called.
        parallel: an answer may have several calls.
        strict: the arguments of calls must be valid for the tools' schemas.
        form: the form of answers without calls.
        salt: caches are shared by requests with the same key and salt.
        thinking: how much to think.
    """

    conversation: Conversation
    params: SamplingParams
    n: int = 1
    choice: ToolChoice = field(default_factory=ToolChoice)
    parallel: bool = True
    strict: bool = False
    form: Form | None = None
    salt: str = ""
    thinking: ThinkingWish = field(default_factory=ThinkingWish)

    def constrained(self, tools: Sequence[Mapping[str, Any]]) -> Form | Calls | None:
        """The form of the answers if they may call ``tools``.

        Raises:
            ApiError: the request demands a call of a tool that does not exist.
        """
        if self.choice.mode == "required":
            name = self.choice.tool
            if not tools or name not in (None, *(tool["function"]["name"] for tool in tools)):
                raise bad_request("`tool_choice` demands a tool that is not in `tools`", "tool_choice")
            return Calls(name or "required", tools, self.parallel)
        if tools and (self.strict or self.form is not None):
            return Calls("auto", tools, self.parallel, self.form)
        return self.form


class Service:
    """Answers requests whose fields were checked.

    Args:
        host: of the engine.
        settings: names, limits, defaults.

    Raises:
        GodwitError: the model's default sampling parameters are invalid.
    """

    def __init__(self, host: EngineHost, settings: Settings) -> None:
        engine = host.engine
        if engine is None:
            raise UsageError("there is no engine to serve")
        template = engine.tokenizer.chat_template
        source = "" if template is None else template.tool_source or template.source
        self.host = host
        self.settings = settings
        self.tokenizer = engine.tokenizer
        self.context = engine.capacity
        self.dialect = detect(source)
        self.bodies = BodyReader(settings)
        self.prompts = PromptQueue(
            PromptMaker(engine.tokenizer, engine.max_context), settings.limits, self.dialect
        )
        self.forms = FormMaker(engine.tokenizer, engine.vocab_size, self.dialect)
        self.thinking = ThinkingMaker(template, settings.thinking)
        self.metrics = Metrics(host.stats)
        self.items = ItemStore()
        self.fim = Fim.of(engine.tokenizer)
        self.started = int(time())
        self.fingerprint = fingerprint(engine.model.config)
        self.draining = False
        self._one_call = takes_one_call(source)
        marks = map(engine.tokenizer.token_to_id, MARKS)
        self._marks = frozenset(id for id in marks if id is not None)
        self._knows_thinking = template is not None and THINK in template.source
        SamplingParams(**settings.sampling)

    def sampling(self, **asked: Any) -> SamplingParams:
        """The requested parameters, with the server's defaults in place of None.

        Raises:
            ApiError: a value is invalid.
        """
        given = {
            **self.settings.sampling,
            **{key: value for key, value in asked.items() if value is not None},
        }
        if given.get("max_tokens") == -1:
            given["max_tokens"] = None
        try:
            return SamplingParams(**given)
        except UsageError as error:
            raise from_engine(error) from None

    async def chat(self, request: Request, job: ChatJob) -> Answers:
        """Start the answers to a conversation.

        Raises:
            ApiError: the request cannot be served.
        """
        self.check_load(job.n)
        if job.conversation.begun and (job.form is not None or job.choice.mode == "required"):
            raise bad_request("an answer that continues a message can have no form and no required tool call")
        tools = [] if job.choice.mode == "none" else list(job.conversation.tools)
        if tools and self.dialect is None:
            raise bad_request(NO_TOOLS, "tools")
        job = replace(job, parallel=job.parallel and not self._one_call)
        form = job.constrained(tools)
        prompt = await self.prompts.make_prompt(request, replace(job.conversation, tools=tools))
        constraints = await self.forms.constrain(request, form, self._thinking(job, prompt), job.n)
        dialect = self.dialect if tools else None
        schemas = {t["function"]["name"]: t["function"].get("parameters") or {} for t in tools}
        rules = self.thinking.rules(
            job.thinking,
            opened=prompt.thinking,
            max_tokens=job.params.max_tokens,
            held=form is not None,
            dialect=dialect,
            schemas=schemas,
        )
        generation = GenerationRequest(
            prompt.ids,
            job.params,
            prompt.boundaries,
            job.salt,
            shown_ids=self._marks if tools else frozenset(),
            thinking=rules,
        )
        return self.submit(
            request,
            [replace(generation, constraint=constraint) for constraint in constraints],
            parser=lambda: AnswerParser(
                dialect, schemas, thinking=prompt.thinking, only_calls=job.form is not None
            ),
            parallel=job.parallel,
        )

    def _thinking(self, job: ChatJob, prompt: Prompt) -> ThinkingBefore:
        if prompt.thinking:
            return "opened"
        may_think = self._knows_thinking and job.conversation.variables.get("enable_thinking", True)
        return "optional" if may_think else "none"

    def submit(
        self,
        request: Request,
        generations: Sequence[GenerationRequest],
        parser: Callable[[], AnswerParser] | None = None,
        *,
        parallel: bool = True,
    ) -> Answers:
        """Submit generations to the engine, with caches for this client only and a seed for each answer.

        Raises:
            ApiError: they are too long, or the server is overloaded.
        """
        self.check_load(len(generations))
        longest = max(len(one.prompt_ids) for one in generations)
        if longest >= self.context:
            answer = max(1, generations[0].params.max_tokens or 1)
            raise too_long(self.context, longest, answer, part="messages" if parser else "prompt")
        streams: list[Stream] = []
        try:
            for index, one in enumerate(generations):
                seed = one.params.seed
                params = one.params if seed is None else replace(one.params, seed=seed + index)
                salt = f"{request.state.salt}\0{one.salt}"
                streams.append(self.host.submit(replace(one, params=params, salt=salt)))
        except (GodwitError, ApiError) as error:
            for stream in streams:
                stream.cancel()
            raise from_engine(error) from error
        record: Record = request.state.record
        record.note_prompts(sum({id(one.prompt_ids): len(one.prompt_ids) for one in generations}.values()))
        return Answers(
            streams,
            record=record,
            mailbox=self.host.mailbox,
            num_prompt=len(generations[0].prompt_ids),
            parser=parser,
            parallel=parallel,
            keep_alive=self.settings.keep_alive,
        )

    def check_load(self, num_answers: int) -> None:
        """Refuse requests that the server cannot take now.

        Raises:
            ApiError: it is overloaded or shutting down, or the request asks for too many answers.
        """
        limits, stats = self.settings.limits, self.host.stats()
        if num_answers > limits.choices:
            raise bad_request(
                f"a request may ask for {limits.choices} answers in all; this one asks for {num_answers}", "n"
            )
        if self.draining:
            raise overloaded("the server is shutting down")
        if stats is not None and stats.num_waiting + stats.num_running + num_answers > limits.active:
            raise overloaded("too many answers are in progress; try again later")


def fingerprint(config: object) -> str:
    """Changes when the same seed may give another answer: with the version of the program, or the model."""
    return "fp_" + sha256(f"{godwit.__version__}\0{config!r}".encode()).hexdigest()[:10]
