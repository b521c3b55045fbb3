"""Tool dialogues for the default model: functions renamed, mixed with others, and missing."""

from __future__ import annotations

import copy
import datetime
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.default import facts, smalltalk
from recipes.default.common import (
    TOOL_PERSONAS,
    Chat,
    Message,
    Tool,
    assistant,
    date_line,
    pick,
    random_date,
    read_jsonl,
    system,
    user,
)
from recipes.default.substitute import substitute

# What a service does, to complete "no tool for ...".
DOMAINS = {
    "Banks": "bank accounts", "Buses": "buses", "Calendar": "calendars", "Events": "events", "Flights": "flights",
    "Homes": "apartments", "Hotels": "places to stay", "Media": "films", "Movies": "films", "Music": "music",
    "RentalCars": "rental cars", "Restaurants": "restaurants", "RideSharing": "rides", "Services": "appointments",
    "Travel": "places to visit", "Weather": "the weather",
}  # fmt: skip
# Domains that could serve the same request, so that they must not be "missing" or distractors for each other.
KIN = (
    {"Media", "Movies"},
    {"Hotels", "Homes"},
    {"RentalCars", "RideSharing"},
    {"Buses", "Flights"},
    {"Events", "Calendar", "Music"},
)
COFFEE = (
    "You take orders at a coffee shop.",
    "You are Godwit, and you take coffee orders.",
    "You are a helpful assistant in a coffee shop. Use the functions to take the order.",
    "You are a helpful assistant.",
    "Take the customer's order with the functions below.",
)


def domain(service: str) -> str:
    """`Restaurants_1` -> `Restaurants`."""
    return service.split("_")[0]


def related(service: str) -> set[str]:
    """The domain of `service` and similar ones."""
    name = domain(service)
    return {name}.union(*(group for group in KIN if name in group))


class Library:
    """The functions of every training service, in the original wording (variant 0) and five others."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self.tools: dict[tuple[str, int], list[Tool]] = {}
        self.renames: dict[tuple[str, int], Mapping[str, Any]] = {}
        for record in records:
            if record["split"] == "train":
                key = record["service"], record["variant"]
                self.tools[key], self.renames[key] = record["tools"], record["rename"]
        self.services = sorted({service for service, _ in self.tools})
        self.variants = sorted({variant for _, variant in self.tools})

    @classmethod
    def load(cls, data: Path) -> Library:
        """The library of `sgd_tools.jsonl.xz`."""
        return cls(read_jsonl(data / "sgd_tools.jsonl.xz"))

    def some(
        self, rng: random.Random, count: int, avoid: Iterable[str], taken: Iterable[str] = ()
    ) -> list[Tool]:
        """`count` functions of services that are not close to `avoid`, with names not in `taken`."""
        banned = set[str]().union(*(related(service) for service in avoid))
        services = [service for service in self.services if domain(service) not in banned]
        names, found = set(taken), list[Tool]()
        for _ in range(10 * count):
            if len(found) == count or not services:
                break
            tool = pick(rng, self.tools[pick(rng, services), pick(rng, self.variants)])
            if tool["function"]["name"] not in names:
                names.add(tool["function"]["name"])
                found.append(copy.deepcopy(tool))
        return found


def origins(record: Mapping[str, Any], library: Library) -> dict[str, tuple[str, str]]:
    """For each function of a dialogue: its service and its name there."""
    found: dict[str, tuple[str, str]] = {}
    for service in record["domain_services"]:
        for tool in library.tools.get((service, 0), ()):
            name = tool["function"]["name"]
            prefixed = f"{service.replace('_', '').lower()}_{name}"
            for listed in record["tools"]:
                if listed["function"]["name"] == prefixed:
                    found[prefixed] = service, name
                elif listed["function"]["name"] == name and name not in found:
                    found[name] = service, name
    return found


def rename_keys(value: Any, names: Mapping[str, str]) -> Any:
    """`value` with the keys of every object in it renamed."""
    if isinstance(value, dict):
        return {names.get(key, key): rename_keys(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [rename_keys(item, names) for item in value]
    return value


def rename_result(content: str, names: Mapping[str, str]) -> str:
    """A tool result with its fields renamed; `count`, `results`, `success` and `alternatives` stay."""
    frame = {"count", "results", "success", "alternatives"}
    names = {old: new for old, new in names.items() if old not in frame}
    return json.dumps(rename_keys(json.loads(content), names), ensure_ascii=False, separators=(",", ":"))


def reword(
    record: Mapping[str, Any], library: Library, variants: Mapping[str, int]
) -> tuple[list[Tool], list[Message]]:
    """Tools and messages of a dialogue with each service in the wording `variants[service]`."""
    origin = origins(record, library)
    new_names, tools = dict[str, str](), list[Tool]()
    for listed in record["tools"]:
        old = listed["function"]["name"]
        service, plain = origin.get(old, ("", old))
        variant = variants.get(service, 0)
        if variant == 0:
            new, tool = old, copy.deepcopy(listed)
        else:
            new = library.renames[service, variant][plain]["name"]
            tool = copy.deepcopy(
                next(t for t in library.tools[service, variant] if t["function"]["name"] == new)
            )
        if new in new_names.values():
            new = f"{service.replace('_', '').lower()}_{new}"
        tool["function"]["name"] = new_names[old] = new
        tools.append(tool)
    messages = []
    for message in record["messages"]:
        message = copy.deepcopy(message)
        for call in message.get("tool_calls") or ():
            names = _map(call["name"], origin, library, variants, "arguments")
            call["name"] = new_names[call["name"]]
            call["arguments"] = in_schema_order(
                {names.get(key, key): value for key, value in call["arguments"].items()}, tools, call["name"]
            )
        if message["role"] == "tool":
            names = _map(message["name"], origin, library, variants, "results")
            message["content"] = rename_result(message["content"], names) if names else message["content"]
            message["name"] = new_names[message["name"]]
        messages.append(message)
    return tools, messages


def in_schema_order(arguments: Mapping[str, Any], tools: Iterable[Tool], name: str) -> dict[str, Any]:
    """The arguments in the order of the function `name`."""
    listed: Mapping[str, Any] = next(
        (t["function"]["parameters"]["properties"] for t in tools if t["function"]["name"] == name), {}
    )
    order = [*(key for key in listed if key in arguments), *(key for key in arguments if key not in listed)]
    return {key: arguments[key] for key in order}


def _map(
    name: str, origin: Mapping[str, tuple[str, str]], library: Library, variants: Mapping[str, int], part: str
) -> Mapping[str, str]:
    service, plain = origin.get(name, ("", name))
    variant = variants.get(service, 0)
    names: Mapping[str, str] = library.renames[service, variant][plain][part] if variant else {}
    return names


def used_names(messages: Iterable[Message]) -> set[str]:
    """The functions called in `messages`."""
    return {call["name"] for message in messages for call in message.get("tool_calls") or ()}


def without_descriptions(tool: Tool, *, keep_own: bool) -> Tool:
    """`tool` without the descriptions of its arguments, and without its own unless `keep_own`."""
    function = copy.deepcopy(tool["function"])
    if not keep_own:
        function.pop("description", None)
    for prop in function["parameters"].get("properties", {}).values():
        prop.pop("description", None)
        prop.get("items", {}).pop("description", None)
        for inner in prop.get("items", {}).get("properties", {}).values():
            inner.pop("description", None)
    return {"type": "function", "function": function}


def vary_results(rng: random.Random, messages: list[Message]) -> None:
    """In some dialogues, write results with spaces after commas and colons, as json.dumps does."""
    if rng.random() < 0.3:
        for message in messages:
            if message["role"] == "tool":
                message["content"] = json.dumps(json.loads(message["content"]), ensure_ascii=False)


def finish(rng: random.Random, messages: list[Message], tools: list[Tool]) -> Chat:
    """Shuffle the tools, drop some, and record which are not called."""
    used = used_names(messages)
    tools = list(tools)
    rng.shuffle(tools)
    chance = rng.random()
    if chance < 0.25:
        tools = [without_descriptions(tool, keep_own=chance < 0.17) for tool in tools]
    spare = [tool["function"]["name"] for tool in tools if tool["function"]["name"] not in used]
    return Chat(messages, tools, spare)


def dated_system(rng: random.Random, date: str | None) -> list[Message]:
    """A system message with the dialogue's date."""
    day = datetime.date.fromisoformat(date) if date else random_date(rng)
    if rng.random() < 0.15:
        return [system(date_line(rng, day))]
    return [system(pick(rng, TOOL_PERSONAS) + pick(rng, (" ", "\n")) + date_line(rng, day))]


def small_turns(pairs: Sequence[tuple[str, str]], rng: random.Random) -> list[Message]:
    """Small talk as messages."""
    return [
        message
        for question, answer in pairs
        for message in (user(smalltalk.typed(rng, question)), assistant(answer))
    ]


def dialogue(
    record: Mapping[str, Any], library: Library, rng: random.Random, *, reworded: float = 0.7
) -> Chat:
    """A training dialogue: reworded services, new names, 0 to 3 distractors, sometimes small talk around it."""
    variants = {
        service: pick(rng, [v for v in library.variants if v]) if rng.random() < reworded else 0
        for service in record["domain_services"]
        if service in library.services
    }
    tools, messages = reword(record, library, variants)
    if rng.random() < 0.6:
        substitute(rng, messages, tools)
    used = used_names(messages)
    if rng.random() < 0.5:  # a shorter list: sometimes only what is needed
        tools = [tool for tool in tools if tool["function"]["name"] in used or rng.random() < 0.3] or tools
    count = rng.choices((0, 1, 2, 3), weights=(56, 27, 12, 5))[0]
    tools = tools + library.some(
        rng, count, record["domain_services"], (t["function"]["name"] for t in tools)
    )
    vary_results(rng, messages)
    chance = rng.random()
    if chance < 0.06:
        messages = small_turns(smalltalk.greeting(rng), rng) + messages
    elif chance < 0.1:
        messages = messages + small_turns(smalltalk.turns_of(rng, smalltalk.topic, with_tools=True), rng)
    elif chance < 0.14:
        messages = messages + small_turns(smalltalk.plain_fact(rng), rng)
    return finish(rng, dated_system(rng, record.get("date")) + messages, tools)


def plain_dialogue(record: Mapping[str, Any]) -> Chat:
    """An evaluation dialogue: original tools in their order and the date in one fixed wording."""
    text = f"You are Godwit, a helpful assistant. Today is {record['date']}."
    return Chat([system(text), *copy.deepcopy(record["messages"])], list(record["tools"]))


def order(record: Mapping[str, Any], rng: random.Random) -> Chat:
    """A coffee order with the functions it needs and a few of the others."""
    messages = copy.deepcopy(list(record["messages"]))
    while messages and (messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls")):
        messages.pop()
    used = used_names(messages)
    keep = pick(rng, (0.2, 0.5, 1.0))
    tools = [tool for tool in record["tools"] if tool["function"]["name"] in used or rng.random() < keep]
    if rng.random() < 0.5:
        tools = [without_descriptions(tool, keep_own=True) for tool in tools]
    vary_results(rng, messages)
    text = pick(rng, COFFEE) + (" " + date_line(rng, random_date(rng)) if rng.random() < 0.3 else "")
    return finish(rng, ([system(text)] if rng.random() < 0.8 else []) + messages, tools)


def missing_tool(
    record: Mapping[str, Any], then: Mapping[str, Any] | None, library: Library, rng: random.Random
) -> Chat | None:
    """A request that no listed function serves; with `then`, a dialogue follows whose functions are listed.

    None if the first user turn does not say what is wanted, or the two dialogues are too similar.
    """
    first = record["messages"][0]["content"]
    calls = [call["name"] for message in record["messages"] for call in message.get("tool_calls") or ()]
    services = [service for service, _ in origins(record, library).values()]
    if not calls or len(set(services)) != 1 or len(first.split()) < 6:
        return None
    wanted = services[0]
    if domain(wanted) not in DOMAINS:
        return None
    answer = pick(rng, facts.NO_TOOL).format(s=DOMAINS[domain(wanted)])
    head = [user(first), assistant(answer)]
    if then is None:
        tools = library.some(rng, rng.choices((1, 2, 3, 4), weights=(3, 3, 2, 1))[0], [wanted])
        tail = small_turns(smalltalk.closing(rng) if rng.random() < 0.5 else smalltalk.acknowledge(rng), rng)
        return finish(
            rng, dated_system(rng, record.get("date")) + head + (tail if rng.random() < 0.4 else []), tools
        )
    if any(domain(service) in related(wanted) for service in then["domain_services"]):
        return None
    chat = dialogue(then, library, rng)
    chat.tools = [tool for tool in chat.tools if tool["function"]["name"] in used_names(chat.messages)]
    return finish(rng, [chat.messages[0], *head, *chat.messages[1:]], chat.tools)


def dialogues(records: Sequence[Mapping[str, Any]], library: Library, seed: int) -> Iterator[Chat]:
    """All training dialogues, plus one in eight with a request that cannot be served."""
    rng = random.Random(seed)
    by_domain: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        by_domain[domain(record["domain_services"][0])].append(record)
        yield dialogue(record, library, rng)
    for record in records:
        if rng.random() < 0.16:
            then = pick(rng, records) if rng.random() < 0.3 else None
            chat = missing_tool(record, then, library, rng)
            if chat is not None:
                yield chat


def orders(records: Iterable[Mapping[str, Any]], seed: int) -> Iterator[Chat]:
    """All coffee orders."""
    rng = random.Random(seed)
    for record in records:
        chat = order(record, rng)
        if len(chat.messages) > 1:
            yield chat


def tool_sets(library: Library, rng: random.Random, count: int) -> list[list[Tool]]:
    """Short lists of functions for conversations that do not need them."""
    return [library.some(rng, rng.choices((1, 2, 3), weights=(4, 3, 1))[0], ()) for _ in range(count)]
