"""What all routes stand on: the engine, the model's tokenizer and template, limits and counts."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from time import time
from typing import Any, TypeVar

from anyio.to_thread import run_sync
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

import godwit
from godwit.engine import Constraint, GenerationRequest, SamplingParams, Stream, ThinkingRules
from godwit.engine.chat_prompt import Prompt, takes_one_call
from godwit.engine.constraint_grammar import THINK, Thinking
from godwit.engine.constraint_trial import Abandon
from godwit.errors import GodwitError, UsageError
from godwit.server.answers import Answers, check_choices
from godwit.server.body import LONG, parse_object, read_body
from godwit.server.clients import client_of, while_there
from godwit.server.errors import ApiError, bad_request, from_engine, overloaded, too_long
from godwit.server.fair_queue import FairQueue
from godwit.server.fields import Choice, FunctionSpec, Mode, Reading
from godwit.server.fim import Fim
from godwit.server.forms import NO_TOOLS, Calls, Form, FormMaker
from godwit.server.host import EngineHost
from godwit.server.items import ItemStore
from godwit.server.journal import Metrics, Record
from godwit.server.mistral_calls import with_short_ids
from godwit.server.prompts import Conversation, PromptMaker, check_variables
from godwit.server.settings import Limits, Settings
from godwit.server.thinking import ThinkingMaker, ThinkingWish
from godwit.server.tools import MARKS, AnswerParser, format_of

#: Long bodies, prompts and forms that are worked on at a time, more of which would only wait for each other,
#: and those that may wait.
BODY_WORKERS, BODIES_WAITING = 1, 128
PROMPT_WORKERS, PROMPTS_WAITING = 2, 256
FORM_WORKERS, FORMS_WAITING = 2, 64
_log = logging.getLogger("godwit.server")
#: What pydantic puts into the place of an error besides names and numbers.
_TAG = re.compile(r"str|int|.*\[.*|constrained-.*|function-.*|[A-Z].*")
_Result = TypeVar("_Result")
_Function = TypeVar("_Function", bound=FunctionSpec)
_Body = TypeVar("_Body", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A request for answers to a conversation, whatever the API.

    Attributes:
        mode: "none": the model is not told of the tools; "required": it has to call one, the one called
            ``tool`` if that is not None.
        parallel: an answer may call several.
        strict: the arguments of calls have to fit the tools' schemas.
        form: what answers have to look like otherwise.
        salt: caches are shared with requests of the same key and salt.
        thinking: how much to think.
    """

    conversation: Conversation
    params: SamplingParams
    n: int = 1
    mode: Mode = "auto"
    tool: str | None = None
    parallel: bool = True
    strict: bool = False
    form: Form | None = None
    salt: str = ""
    thinking: ThinkingWish = field(default_factory=ThinkingWish)


class Service:
    """Answers requests whose fields are checked.

    Args:
        host: of the engine.
        tokenizer: read from the engine's model.
        settings: names, limits, defaults.

    Raises:
        GodwitError: the model's own sampling settings make no sense.
    """

    def __init__(self, host: EngineHost, settings: Settings) -> None:
        engine = host.engine
        if engine is None:
            raise UsageError("there is no engine to serve")
        self.host = host
        self.settings = settings
        self.tokenizer = engine.tokenizer
        self.context = engine.capacity
        self.prompts = PromptMaker(engine.tokenizer, engine.max_context)
        self.metrics = Metrics(host.stats)
        self.started = int(time())
        self.fingerprint = fingerprint(engine.model.config)
        self.items = ItemStore()
        self.fim = Fim.of(engine.tokenizer)
        template = engine.tokenizer.chat_template
        source = "" if template is None else template.tool_source or template.source
        self.format = format_of(source)
        self._one_call = takes_one_call(source)
        marks = map(engine.tokenizer.token_to_id, MARKS)
        self._marks = frozenset(id for id in marks if id is not None)
        self.draining = False
        self.thinking = ThinkingMaker(template, settings.thinking)
        self._knows_thinking = template is not None and THINK in template.source
        self._forms = FormMaker(engine.tokenizer, engine.vocab_size, self.format)
        self._body_queue = FairQueue(BODY_WORKERS, BODIES_WAITING)
        self._prompt_queue = FairQueue(PROMPT_WORKERS, PROMPTS_WAITING)
        self._form_queue = FairQueue(FORM_WORKERS, FORMS_WAITING)
        # Looking up a form takes milliseconds of the interpreter: one at a time, so that streams go on.
        self._known_queue = FairQueue(1, FORMS_WAITING)
        SamplingParams(**settings.sampling)

    # requests

    async def read(self, request: Request, kind: type[_Body]) -> _Body:
        """The body of a request, checked.

        Raises:
            ApiError: it is not what it has to be.
        """
        body = await read_body(request, self.settings.limits)
        reading = Reading(refuse_media=self.settings.refuse_media)

        def check() -> _Body:
            return checked(kind, body, self.settings.limits, reading)

        if len(body) < LONG:
            asked = check()
        else:
            asked = await while_there(request, self._body_queue.run(client_of(request), check))
        if reading.left_out:
            kinds = ", ".join(sorted(reading.left_out))
            _log.info("%s left out of the prompt, since it is not text: %s", request.state.record.id, kinds)
        return asked

    def check_model(self, name: str | None) -> None:
        """Refuse to answer in another model's name.

        Raises:
            ApiError: ``name`` is none of this model's.
        """
        if name is not None and not self.settings.knows(name):
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} here; this server has {self.settings.name!r}",
                param="model",
                code="model_not_found",
            )

    def sampling(self, **asked: Any) -> SamplingParams:
        """What was asked for, None being nothing, completed by the server's own settings.

        Raises:
            ApiError: a value makes no sense.
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

    async def warm(self) -> None:
        """Start the process that renders templates before the first request has to wait for it."""
        if self.tokenizer.chat_template is not None:
            with contextlib.suppress(GodwitError, ApiError):
                await run_sync(self.prompts.chat, Conversation([{"role": "user", "content": "."}]))

    async def prepare(self, request: Request, work: Callable[[], _Result]) -> _Result:
        """Do what a prompt takes in a thread, when it is the turn of the request's client.

        Raises:
            ApiError: it failed, too many are waiting, or the client is gone.
        """
        return await while_there(request, self._prompt_queue.run(client_of(request), work))

    async def make_prompt(self, request: Request, conversation: Conversation) -> Prompt:
        """The prompt of a conversation.

        Raises:
            ApiError: it is too long, the template does not take it, or the client is gone.
        """
        limits = self.settings.limits
        if len(conversation.messages) > limits.messages or len(conversation.tools) > limits.tools:
            raise bad_request(f"a request may have {limits.messages} messages and {limits.tools} tools")
        if self.tokenizer.chat_template is None:
            raise bad_request("this model has no chat template; send plain prompts to /v1/completions")
        check_variables(conversation.variables)
        if self.format in ("mistral", "mistral_args"):
            conversation = replace(conversation, messages=with_short_ids(conversation.messages))
        return await self.prepare(request, lambda: self.prompts.chat(conversation))

    async def chat(self, request: Request, chat: Chat) -> Answers:
        """Start the answers to a conversation.

        Raises:
            ApiError: they cannot be given.
        """
        self._check_start(chat.n)
        if chat.conversation.begun and (chat.form is not None or chat.mode == "required"):
            raise bad_request(
                "an answer that continues a message cannot be held to a form or made to call a tool"
            )
        tools = [] if chat.mode == "none" else list(chat.conversation.tools)
        if tools and self.format is None:
            raise bad_request(NO_TOOLS, "tools")
        chat = replace(chat, parallel=chat.parallel and not self._one_call)
        form = form_of(chat, tools)
        prompt = await self.make_prompt(request, replace(chat.conversation, tools=tools))
        constraints = await self.hold(request, form, self._thinking(chat, prompt), chat.n)
        schemas = {t["function"]["name"]: t["function"].get("parameters") or {} for t in tools}
        format = self.format if tools else None
        rules = self.thinking.rules(
            chat.thinking,
            opened=prompt.thinking,
            max_tokens=chat.params.max_tokens,
            held=form is not None,
            format=format,
        )
        return self.start(
            request,
            [prompt] * chat.n,
            chat.params,
            chat.salt,
            constraints=constraints,
            parser=lambda: AnswerParser(
                format, schemas, thinking=prompt.thinking, only_calls=chat.form is not None
            ),
            parallel=chat.parallel,
            shown_ids=self._marks if tools else frozenset(),
            thinking=rules,
        )

    async def hold(
        self, request: Request, form: Form | Calls | None, thinking: Thinking, count: int
    ) -> Sequence[Constraint | None]:
        """What holds so many answers to a form.

        Raises:
            ApiError: the form cannot be used, too many are waiting, or the client is gone.
        """
        if form is None:
            return [None] * count
        abandon = Abandon()
        try:
            look = self._known_queue.run(client_of(request), lambda: self._forms.known(form, thinking, count))
            if (known := await while_there(request, look)) is not None:
                return known
            made = self._form_queue.run(
                client_of(request), lambda: self._forms.make(form, thinking, count, abandon)
            )
            return await while_there(request, made)
        except ApiError as error:
            error.param = error.param or form.field
            raise
        finally:
            abandon.give_up()

    def _thinking(self, chat: Chat, prompt: Prompt) -> Thinking:
        if prompt.thinking:
            return "opened"
        may_think = self._knows_thinking and chat.conversation.variables.get("enable_thinking", True)
        return "optional" if may_think else "none"

    def start(
        self,
        request: Request,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        salt: str = "",
        *,
        constraints: Sequence[Constraint | None],
        parser: Callable[[], AnswerParser] | None = None,
        parallel: bool = True,
        score_prompts: bool = False,
        shown_ids: frozenset[int] = frozenset(),
        thinking: ThinkingRules | None = None,
    ) -> Answers:
        """Start one answer to each prompt.

        Raises:
            ApiError: they cannot be given.
        """
        self._check_start(len(prompts))
        longest = max(len(prompt.ids) for prompt in prompts)
        if longest >= self.context:
            asked_for = max(1, params.max_tokens or 1)
            raise too_long(self.context, longest, asked_for, part="messages" if parser else "prompt")
        salt = f"{request.state.salt}\0{salt}"
        streams: list[Stream] = []
        try:
            for index, (prompt, constraint) in enumerate(zip(prompts, constraints, strict=True)):
                own = params if params.seed is None else replace(params, seed=params.seed + index)
                asked = GenerationRequest(
                    prompt.ids,
                    own,
                    prompt.boundaries,
                    salt,
                    constraint,
                    score_prompt=score_prompts,
                    shown_ids=shown_ids,
                    thinking=thinking,
                )
                streams.append(self._submit(asked))
        except (GodwitError, ApiError) as error:
            for stream in streams:
                stream.cancel()
            raise from_engine(error) from error
        record: Record = request.state.record
        record.note_prompts(sum({id(prompt): len(prompt.ids) for prompt in prompts}.values()))
        return Answers(
            streams,
            record=record,
            mailbox=self.host.mailbox,
            num_prompt=len(prompts[0].ids),
            parser=parser,
            parallel=parallel,
            keep_alive=self.settings.keep_alive,
        )

    def _submit(self, request: GenerationRequest) -> Stream:
        engine = self.host.engine
        if engine is None or not engine.health.alive:
            raise overloaded("the engine is starting again; send the request again in a moment")
        return engine.submit(request)

    def _check_start(self, num_answers: int) -> None:
        check_choices(num_answers, self.settings.limits.choices)
        stats = self.host.stats()
        if self.draining:
            raise overloaded("the server is shutting down")
        if (
            stats is not None
            and stats.num_waiting + stats.num_running + num_answers > self.settings.limits.active
        ):
            raise overloaded("too many answers are under way; try again later")


def fingerprint(config: object) -> str:
    """What changes when the same seed may give another answer: the program's version, or the model."""
    return "fp_" + sha256(f"{godwit.__version__}\0{config!r}".encode()).hexdigest()[:10]


def allowed_tools(tools: Sequence[_Function], choice: Choice) -> list[_Function]:
    """Those of the tools that there are for now.

    Raises:
        ApiError: one is allowed that is not there.
    """
    if choice.allowed is None:
        return list(tools)
    if missing := set(choice.allowed) - {tool.name for tool in tools}:
        raise bad_request(f"`tool_choice` allows {min(missing)}, which `tools` does not have", "tool_choice")
    return [tool for tool in tools if tool.name in choice.allowed]


def form_of(chat: Chat, tools: Sequence[Mapping[str, Any]]) -> Form | Calls | None:
    """What the answers to a request are held to: one that may call tools does so, or has the form asked for.

    Raises:
        ApiError: it asks for a tool that is not there.
    """
    if chat.mode == "required":
        if chat.tool not in (None, *(tool["function"]["name"] for tool in tools)) or not tools:
            raise bad_request("`tool_choice` asks for a tool that `tools` does not have", "tool_choice")
        return Calls(chat.tool or "required", tools, chat.parallel)
    if tools and (chat.strict or chat.form is not None):
        return Calls("auto", tools, chat.parallel, chat.form)
    return chat.form


def checked(kind: type[_Body], body: bytes, limits: Limits, reading: Reading) -> _Body:
    """A body as what it has to be.

    Raises:
        ApiError: it is something else.
    """
    try:
        return kind.model_validate(parse_object(body, limits), context=reading)
    except ValidationError as error:
        raise explain(error) from None


def explain(error: ValidationError) -> ApiError:
    """What is wrong with a body, in one sentence without what was sent.

    Where a field may be one of several things, the complaint that goes deepest tells most.
    """
    first = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
    place = ".".join(str(part) for part in first["loc"] if not _TAG.fullmatch(str(part)))[:200]
    if first["type"] == "extra_forbidden":
        return bad_request(f"`{place}` is no field that this server can honour; leave it out", place)
    message = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    return bad_request(f"`{place}`: {message}" if place else message, place or None)
