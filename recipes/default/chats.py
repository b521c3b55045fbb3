"""Questions and answers for the default model: trivia, words, countries, instructions and texts to read."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from recipes.default.common import (
    Chat,
    Message,
    Tool,
    assistant,
    pick,
    sentence,
    stable_hash,
    system_prompt,
    user,
)

Pair = tuple[str, str]

# Trivia that a general assistant should know comes in full, film and music trivia only in part (percent kept).
TRIVIA_SHARE = {
    "television": 12, "music": 12, "movies": 12, "celebrities": 12, "newest": 20, "sports": 15, "people": 50,
    "video-games": 10, "entertainment": 20, "rated": 0, "religion-faith": 40, "hobbies": 50,
}  # fmt: skip
UNWANTED = re.compile(
    r"\b(hookers?|strippers?|steamer|cocaine|heroin|playboy|boobs?|genital\w*|testic\w*|condom\w*|orgy|hitler|nazis?)\b",
    re.I,
)
FRAMES = (
    "{text}\n\n{question}",
    "{text}\n\nQuestion: {question}",
    "Read this text and answer the question.\n\n{text}\n\n{question}",
    "Text: {text}\n\nQuestion: {question}",
    "Here is a part of a story:\n\n{text}\n\n{question}",
    "Please read the following passage.\n\n{text}\n\nNow tell me: {question}",
    "Answer from the text.\n\n{text}\n\n{question}",
    "{question}\n\n{text}",
    "{question} Use this text:\n\n{text}",
    "Context: {text}\n\nQuestion: {question}\nAnswer:",
    "Passage:\n{text}\n\nQuestion:\n{question}",
)
NOT_SAID = (
    "The text does not say that.",
    "I don't know, the text does not say.",
    "The passage does not tell us.",
)


def pairs_of(record: Mapping[str, Any]) -> list[Pair]:
    """The turns of a chat record as (user, assistant) pairs."""
    texts = [message["content"] for message in record["messages"]]
    return list(zip(texts[::2], texts[1::2], strict=False))


def to_chat(pairs: Iterable[Pair], head: Sequence[Message] = (), tools: Sequence[Tool] = ()) -> Chat:
    """Pairs as a conversation; all tools may be dropped."""
    messages = [message for question, answer in pairs for message in (user(question), assistant(answer))]
    return Chat([*head, *messages], list(tools), [tool["function"]["name"] for tool in tools])


def trivia(records: Iterable[Mapping[str, Any]]) -> Iterator[list[Pair]]:
    """Trivia, without entries that are of no use to a small assistant."""
    for record in records:
        question, answer = pairs_of(record)[0]
        share = TRIVIA_SHARE.get(record["category"], 100)
        asks = "?" in question or "A)" in question or question.lower().startswith("true or false")
        if asks and stable_hash(record["id"]) % 100 < share and not UNWANTED.search(question + answer):
            yield [(question, sentence(answer) if "A)" not in question else answer)]


def wordnet(records: Iterable[Mapping[str, Any]]) -> Iterator[list[Pair]]:
    """Definitions of words, without those whose first sense is rarely the intended one."""
    for record in records:
        pairs = pairs_of(record)
        word, answer = record.get("word", ""), pairs[0][1]
        odd = word.endswith(("ing", "ed")) and "noun" in answer[:40]
        if not odd and len(answer) < 260 and not UNWANTED.search(answer):
            yield [(question, capital(text)) for question, text in pairs]


def capital(text: str) -> str:
    """Capitalise the start, unless it is a quoted word."""
    return text[:1].upper() + text[1:]


def factbook(records: Iterable[Mapping[str, Any]]) -> Iterator[list[Pair]]:
    """Countries, unchanged."""
    for record in records:
        yield pairs_of(record)


def questions(
    pools: Sequence[Sequence[list[Pair]]], seed: int, tools: Sequence[Sequence[Tool]]
) -> Iterator[Chat]:
    """Every question of the pools once, alone or with one to three others in a conversation."""
    rng = random.Random(seed)
    rest = [pairs for pool in pools for pairs in pool]
    rng.shuffle(rest)
    while rest:
        count = min(len(rest), rng.choices((1, 2, 3, 4), weights=(4, 3, 2, 1))[0])
        pairs = [pair for _ in range(count) for pair in rest.pop()]
        listed = pick(rng, tools) if tools and rng.random() < 0.04 else ()
        yield to_chat(pairs, system_prompt(rng, none=0.5), listed)


def whole(answer: str) -> str:
    """Truncate a long answer that breaks off in mid-sentence to its last full sentence."""
    answer = answer.strip()
    if len(answer.split()) < 50 or answer[-1] in ".!?:;)\"'":
        return answer
    end = max(answer.rfind(mark) for mark in (". ", ".\n", "! ", "? "))
    return answer[: end + 1] if end > len(answer) // 2 else answer


def instructions(records: Iterable[Mapping[str, Any]], seed: int, max_words: int = 200) -> Iterator[Chat]:
    """Dolly's short answers, alone or sometimes two in a row."""
    rng = random.Random(seed)
    waiting: list[Pair] = []
    for record in records:
        question, answer = pairs_of(record)[0]
        if not answer.strip() or len(answer.split()) > max_words or len(question.split()) > 250:
            continue
        if UNWANTED.search(question + answer):
            continue
        waiting.append((question.strip(), sentence(whole(answer))))
        if rng.random() < 0.85 or len(waiting) == 2:
            yield to_chat(waiting, system_prompt(rng, none=0.5))
            waiting = []
    if waiting:
        yield to_chat(waiting)


def frame(rng: random.Random, text: str, question: str) -> str:
    """A text and a question about it, in one of several orders and wordings."""
    return pick(rng, FRAMES).format(text=text, question=question)


def reading(records: Iterable[Mapping[str, Any]], seed: int, max_words: int = 250) -> Iterator[Chat]:
    """Questions about a text: the text once, then up to four questions; some cannot be answered from the text."""
    rng = random.Random(seed)
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        if len(record["context"].split()) <= max_words:
            groups[record["context"]].append(record)
    everything = [record for group in groups.values() for record in group]
    for context, group in groups.items():
        rng.shuffle(group)
        while group:
            count = rng.choices((1, 2, 3, 4), weights=(5, 3, 2, 1))[0]
            pairs = [(sentence(r["question"]), sentence(r["answers"][0])) for r in group[:count]]
            del group[:count]
            if rng.random() < 0.12:
                other = pick(rng, everything)
                if other["context"] != context and foreign(other, context):
                    pairs.insert(rng.randrange(len(pairs) + 1), (other["question"], pick(rng, NOT_SAID)))
            pairs[0] = (frame(rng, context, pairs[0][0]), pairs[0][1])
            yield to_chat(pairs, system_prompt(rng, none=0.6))


def foreign(record: Mapping[str, Any], context: str) -> bool:
    """Whether the question names a person or thing that the text does not mention."""
    words = re.findall(r"[A-Za-z]{4,}", record["question"])[1:]
    known = context.lower()
    return sum(word.lower()[:5] not in known for word in words) >= max(2, len(words) // 2)


def plain_reading(record: Mapping[str, Any]) -> Chat:
    """An evaluation question in one fixed wording."""
    text = f"Read this text and answer the question.\n\n{record['context']}\n\n{record['question']}"
    return to_chat([(text, sentence(record["answers"][0]))])
