"""Requests for stories, answered with picture-book and folk stories."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recipes.default import smalltalk
from recipes.default.common import Chat, Message, assistant, pick, system_prompt, user

CHARACTERS = (
    "ant", "baboon", "badger", "bear", "bee", "bird", "boy", "brother", "bull", "butterfly", "camel", "cat", "chameleon",
    "chicken", "cock", "cow", "crab", "crocodile", "crow", "daughter", "dog", "donkey", "dove", "dragon", "duck", "eagle",
    "elephant", "fairy", "farmer", "father", "fish", "fisherman", "fly", "fox", "frog", "giant", "girl", "goat", "goose",
    "grandfather", "grandma", "grandmother", "hare", "hen", "horse", "hunter", "hyena", "jackal", "king", "kitten", "leopard",
    "lion", "lizard", "man", "mermaid", "monkey", "mother", "mouse", "ogre", "old man", "old woman", "owl", "parrot", "pig",
    "prince", "princess", "puppy", "queen", "rabbit", "rat", "rooster", "sheep", "shepherd", "sister", "snake", "sparrow",
    "spider", "squirrel", "tailor", "teacher", "tiger", "tortoise", "train", "tree", "turtle", "uncle", "vulture", "witch",
    "wolf", "woman", "woodcutter", "worm", "zebra", "moon", "sun", "river", "rainbow", "school", "market", "bicycle",
)  # fmt: skip
ABOUT = (
    "Tell me a story about {x}.", "Can you tell me a story about {x}?", "Write a short story about {x}.", "A story about {x}, please.",
    "I'd like to hear a story about {x}.", "Do you know a story about {x}?", "Please tell me a short story about {x}.",
    "Make up a story about {x}.", "tell me a story about {x}", "Could you write a story about {x}?", "I want a story about {x}.",
    "Tell my children a story about {x}.", "Write a children's story about {x}.", "Give me a bedtime story about {x}.",
)  # fmt: skip
TITLED = (
    'Tell me the story "{x}".', 'Write a story called "{x}".', 'Write a story with the title "{x}".', 'Do you know the story "{x}"?',
    "Tell me the story of {x}.", 'I would like to hear "{x}".', 'Write a short story titled "{x}".',
)  # fmt: skip
ANY = (
    "Tell me a story.", "Tell me a short story.", "Can you tell me a story?", "I want to hear a story.", "A story, please!",
    "Tell me a bedtime story.", "Write a short story.", "Do you know a story?", "tell me a story", "Story time!", "Make up a story.",
    "Could you tell me a story, please?", "Tell me something nice before I sleep.", "I'm bored. Tell me a story.",
)  # fmt: skip
ANOTHER = (
    "Another one, please.", "Tell me another one.", "Another story!", "One more!", "Can I have another one?", "More, please.",
    "That was nice. Another one?", "Again! Another story.",
)  # fmt: skip
NOT_STORIES = (
    "Sound Aaa",
    "Antoni ke bo mang bale",
    "Things I know",
    "I enjoy",
    "I enjoy doing",
    "The girl with one breast",
)
MORE = "Shall I go on?"
GO_ON = (
    "Yes, please.", "Yes", "Yes, go on.", "Please do.", "Sure!", "Go on.", "Continue.", "And then?", "What happened next?", "Please continue.", "continue", "go on", "And what happened then?",
    "Tell me the rest.",
)  # fmt: skip


def topics_of(story: Mapping[str, Any]) -> list[str]:
    """The main characters of a story, with an article: those in its title first, then those named often."""
    title, text = story["title"].lower(), story["text"].lower()
    counts: Counter[str] = Counter()
    for word in CHARACTERS:
        pattern = re.compile(rf"\b{word}(?:s|es)?\b")
        number = len(pattern.findall(text)) + 5 * len(pattern.findall(title))
        if number >= max(3, len(text.split()) // 60):
            counts[word] = number
    for longer, shorter in (("old man", "man"), ("old woman", "woman")):
        if counts[longer] * 2 > counts[shorter]:
            counts.pop(shorter, None)
    only = ("moon", "sun", "river", "market", "rainbow")
    return [
        f"the {word}" if word in only else smalltalk.with_article(word)
        for word, _ in (+counts).most_common(3)
    ]


def halves(text: str) -> tuple[str, str] | None:
    """The story in two parts at a paragraph near the middle, if it has enough of them."""
    paragraphs = text.split("\n")
    if len(paragraphs) < 4:
        return None
    middle = len(paragraphs) // 2
    return "\n".join(paragraphs[:middle]), "\n".join(paragraphs[middle:])


def request(rng: random.Random, story: Mapping[str, Any], topics: Sequence[str]) -> tuple[str, str]:
    """What the user says, and what the story is about as the answer may say it ('' if it says nothing)."""
    chance = rng.random()
    title = story["title"].strip(' "')
    if topics and chance < 0.7:
        two = len(topics) > 1 and rng.random() < 0.4
        x = f"{topics[0]} and {topics[1]}" if two else topics[0] if rng.random() < 0.75 else pick(rng, topics)
        return pick(rng, ABOUT).format(x=x), f"about {x}"
    if len(title) > 3 and chance < 0.85:
        return pick(rng, TITLED).format(x=title.rstrip(".")), ""
    return pick(rng, ANY), ""


def opening(rng: random.Random, story: Mapping[str, Any], about: str) -> str:
    """An introduction, a title line, or nothing."""
    chance = rng.random()
    if chance < 0.2:
        return f"Here is a story {about}.\n\n" if about else "Here is a story for you.\n\n"
    title = str(story["title"]).strip(' "')
    if chance < 0.4 and title:
        return f"{title}\n\n"
    return ""


def chunks(text: str, words: int = 200, most: int = 3) -> list[str]:
    """The story in parts of about `words` words that end with a paragraph, the first `most` of them."""
    parts: list[list[str]] = [[]]
    count = 0
    for paragraph in text.split("\n"):
        if parts[-1] and count + len(paragraph.split()) > words * 1.2:
            parts.append([])
            count = 0
        parts[-1].append(paragraph)
        count += len(paragraph.split())
    return ["\n".join(part) for part in parts[:most]]


def tell(rng: random.Random, story: Mapping[str, Any], ask: str | None = None) -> list[Message]:
    """A request and its story: whole, sometimes in two parts, a long one in parts with a question after each."""
    text = story["text"]
    question, about = request(rng, story, topics_of(story))
    lead = opening(rng, story, about if ask is None else "")
    parts = [text]
    if not is_short(story):
        parts = chunks(text)
    elif len(text.split()) > 120 and rng.random() < 0.1:
        parts = list(halves(text) or parts)
    more = text != "\n".join(parts)
    messages = [user(ask or question)]
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        answer = part if last and not more else f"{part}\n\n{MORE}"
        messages.append(assistant(lead + answer if number == 0 else answer))
        if not last:
            messages.append(user(pick(rng, GO_ON)))
    if more and rng.random() < 0.5:
        messages += [user(pick(rng, ("No, thanks.", "No, that is enough.", "Not now, thank you.", "no"))),
                     assistant("All right! Just ask when you want to hear another story.")]  # fmt: skip
    return messages


def is_short(story: Mapping[str, Any]) -> bool:
    """Whether a story can be told whole in one answer."""
    return len(story["text"].split()) <= 350


def storytelling(stories: Sequence[Mapping[str, Any]], seed: int, repeats: int = 5) -> Iterator[Chat]:
    """Each short story `repeats` times and each long one (its first parts) once, in different conversations."""
    rng = random.Random(seed)
    usable = [s for s in stories if len(s["text"].split()) >= 40 and s["title"] not in NOT_STORIES]
    short = [story for story in usable if is_short(story)]
    order = short * repeats + [story for story in usable if not is_short(story)]
    rng.shuffle(order)
    for story in order:
        messages: list[Message] = []
        if rng.random() < 0.15:
            messages += pairs(smalltalk.greeting(rng), rng)
        messages += tell(rng, story)
        if short and rng.random() < 0.12:
            messages += tell(rng, pick(rng, short), pick(rng, ANOTHER))
        if rng.random() < 0.15:
            messages += pairs(smalltalk.closing(rng), rng)
        yield Chat([*system_prompt(rng, none=0.6), *messages])


def pairs(turns: Sequence[tuple[str, str]], rng: random.Random) -> list[Message]:
    """Small talk as messages."""
    return [
        message
        for question, answer in turns
        for message in (user(smalltalk.typed(rng, question)), assistant(answer))
    ]
