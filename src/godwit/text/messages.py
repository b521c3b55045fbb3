"""Conversations in the form that chat templates expect.

`normalise_messages` brings messages into one form. `calls_as_text` and `repaired` handle what some templates
refuse: calls whose arguments are not an object, system messages after the first, and conversations without a
user message.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from godwit.dialect.tags import CALL, FUNCTION
from godwit.errors import TemplateError

Message = dict[str, Any]
_CALL_KEYS = ("name", "arguments")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SYSTEM = ("system", "developer")
_NO_QUERY = re.compile("no user query", re.IGNORECASE)
_EMPTY_QUERY: Mapping[str, Any] = {"role": "user", "content": ""}
_MAX_ENCODINGS = 4


def normalise_messages(messages: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Messages in the shape of OpenAI's API.

    Text parts are joined by newlines. Tool calls have the nested form, with arguments as objects where they
    can be read as one. The results of the calls of one message stand in the order of the calls. What an
    assistant thought is under `reasoning_content`. Raises TemplateError for a message without a plain role
    name, and for `tool_calls` that is not a list of objects.
    """
    return _order_results([_normalise_message(index, message) for index, message in enumerate(messages)])


def _normalise_message(index: int, message: Mapping[str, Any]) -> Message:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise TemplateError(f"message {index} needs a `role` such as system, user, assistant or tool")
    result = dict(message)
    if isinstance(content := result.get("content"), list) and all(map(_is_text_part, content)):
        result["content"] = "\n".join(part["text"] for part in content)
    if role == "assistant" and (thoughts := _thoughts(result)):
        result["reasoning_content"] = thoughts
    if calls := result.get("tool_calls"):
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise TemplateError(f"`tool_calls` of message {index} has to be a list of objects")
        result["tool_calls"] = [_normalise_call(call) for call in calls]
    return result


def _is_text_part(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _thoughts(message: Mapping[str, Any]) -> str:
    found = (message.get(name) for name in _THOUGHTS)
    return next((text for text in found if isinstance(text, str) and text), "")


def _normalise_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Both `{"name", "arguments"}` and `{"id", "type", "function": {...}}` become the second shape."""
    inner = call.get("function")
    own = {key: value for key, value in call.items() if key in _CALL_KEYS}
    function = dict(inner) if isinstance(inner, Mapping) else own
    rest = {key: value for key, value in call.items() if key not in _CALL_KEYS and key != "function"}
    function["arguments"] = parse_arguments(function.get("arguments"))
    return {"type": "function", **rest, "function": function}


def parse_arguments(given: Any) -> Any:
    """The arguments of a call as an object; what was given where they are none.

    Nothing, null and blank text mean no arguments. JSON within a JSON string is decoded.
    """
    value = given
    for _ in range(_MAX_ENCODINGS):
        if value is None or (isinstance(value, str) and not value.strip()):
            return {}
        if not isinstance(value, str):
            break
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return given
    return value if isinstance(value, Mapping) else given


def _order_results(messages: list[Message]) -> list[Message]:
    """Templates show no ids, so the n-th result is read as that of the n-th call.

    Results that belong to no call stay where they are, and so does everything else between them.
    """
    result = list(messages)
    for index, message in enumerate(messages):
        ids = [call.get("id") for call in message.get("tool_calls") or ()]
        ranks = {id: rank for rank, id in reversed([*enumerate(ids)]) if id and isinstance(id, str)}
        if len(ranks) > 1:
            places = list(_results(messages, index, ranks))
            ranked = sorted(places, key=lambda place: ranks[messages[place]["tool_call_id"]])
            for place, source in zip(places, ranked, strict=True):
                result[place] = messages[source]
    return result


def _results(messages: Sequence[Message], index: int, ids: Collection[str]) -> Iterator[int]:
    """Where the results of calls with these ids stand, between an assistant's message and the next one."""
    for place in range(index + 1, len(messages)):
        if messages[place]["role"] == "assistant":
            return
        id = messages[place].get("tool_call_id") if messages[place]["role"] == "tool" else None
        if isinstance(id, str) and id in ids:
            yield place


def calls_as_text(messages: Iterable[Message], template: str) -> list[Message]:
    """Messages in which every call has an object as its arguments.

    Where a call of a message has none, since the model erred or was cut off, all calls of that message become
    part of its text, in the form that the source of the template has for calls.
    """
    return [
        _with_text(message, template) if any(map(_is_broken, message.get("tool_calls") or ())) else message
        for message in messages
    ]


def _is_broken(call: Mapping[str, Any]) -> bool:
    return not isinstance(call["function"]["arguments"], Mapping)


def _with_text(message: Message, template: str) -> Message:
    text = "\n".join(_write_call(call["function"], template) for call in message["tool_calls"])
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    content = message.get("content") or ""
    if isinstance(content, list):
        return rest | {"content": [*content, {"type": "text", "text": text}]}
    return rest | {"content": f"{content}\n{text}" if content else text}


def _write_call(function: Mapping[str, Any], template: str) -> str:
    name, arguments = str(function.get("name") or ""), function["arguments"]
    if FUNCTION in template:
        return f"<tool_call>\n<function={name}>\n{_tags(arguments)}</function>\n</tool_call>"
    key = "parameters" if '"parameters"' in template and '"arguments"' not in template else "arguments"
    text = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": {_plain(arguments)}}}'
    return f"<tool_call>\n{text}\n</tool_call>" if CALL in template else text


def _tags(arguments: Any) -> str:
    if not isinstance(arguments, Mapping):
        return f"{_plain(arguments)}\n"
    pairs = arguments.items()
    return "".join(f"<parameter={key}>\n{_plain(value)}\n</parameter>\n" for key, value in pairs)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def repaired(messages: list[Message], error: str) -> list[Message] | None:
    """What a template may take that refused `messages` with `error`; None where nothing is left to change.

    System messages are changed in their places: moved to the front, a late one would change the beginning of
    the prompt, and nothing computed for it could be used again.
    """
    can_ask = _EMPTY_QUERY not in messages
    if can_ask and _NO_QUERY.search(error):
        return _with_query(messages)
    if (changed := _with_one_system_message(messages)) != messages:
        return changed
    if can_ask and all(message["role"] != "user" for message in messages):
        return _with_query(messages)
    return None


def _with_query(messages: list[Message]) -> list[Message]:
    """An empty message of the user behind the system's, for templates that want to find one."""
    head, rest = _split_head(messages)
    return [*head, dict(_EMPTY_QUERY), *rest]


def _with_one_system_message(messages: list[Message]) -> list[Message]:
    """The leading system messages joined by a blank line, later ones said by the user."""
    head, rest = _split_head(messages)
    if len(head) > 1 and all(isinstance(message.get("content") or "", str) for message in head):
        content = "\n\n".join(filter(None, (message.get("content") for message in head)))
        head = [{**head[0], "content": content}]
    return [
        *({**message, "role": "system"} for message in head),
        *({**message, "role": "user"} if message["role"] in _SYSTEM else message for message in rest),
    ]


def _split_head(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    head = list(itertools.takewhile(lambda message: message["role"] in _SYSTEM, messages))
    return head, messages[len(head) :]
