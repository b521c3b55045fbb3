"""Small talk for the default model: short random conversations from our own sentences."""

from __future__ import annotations

import datetime
import random
import re
from collections.abc import Callable, Iterator, Sequence

from recipes.default import facts, phrases
from recipes.default.common import (
    PERSONAS,
    Chat,
    Message,
    Tool,
    assistant,
    date_line,
    long_date,
    pick,
    random_date,
)
from recipes.default.common import system as system_message
from recipes.default.common import user as user_message
from recipes.default.phrases_topics import LIMITS, MOODS

Pair = tuple[str, str]
Part = Callable[[random.Random], list[Pair]]

TOPICS = phrases.ABOUT_ME + MOODS + LIMITS
# If functions are listed, nothing may be said that they contradict.
NOT_WITH_TOOLS = re.compile(
    r"tool|internet|song|music|film|movie|bored|eat|cook|dinner|lunch|pizza|hungry|look things up|buy|price|ticket|score|money",
    re.I,
)
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def typed(rng: random.Random, text: str) -> str:
    """`text` as people type: sometimes in lower case, without the final mark, or with a word before or after."""
    chance = rng.random()
    if chance < 0.12:
        text = text.lower()
    elif chance < 0.2:
        text = text.lower().rstrip("?.!").replace("'", "")
    elif chance < 0.27:
        text = text.rstrip("?.!")
    elif chance < 0.3 and text.endswith("?"):
        text = pick(
            rng, ("Tell me, ", "So, ", "Please tell me: ", "Hey, ", "One question: ", "By the way, ")
        ) + lower(text)
    elif chance < 0.32 and text.endswith("?"):
        text = text[:-1] + pick(rng, (", please?", " then?", "??", ", Godwit?"))
    return text


def lower(text: str) -> str:
    """`text` with a lower-case first letter, unless its first word is always capitalised."""
    first = text.split()[0].rstrip("'s,.?!")
    return (
        text
        if first in ("I", "I'm", "I'd", "Godwit", *facts.CITIES, *facts.NAMES) or first.isupper()
        else text[0].lower() + text[1:]
    )


def topic(rng: random.Random) -> list[Pair]:
    """One of the fixed topics."""
    _, asked, answers = rng.choices(TOPICS, weights=[entry[0] for entry in TOPICS])[0]
    return [(pick(rng, asked), pick(rng, answers))]


def greeting(rng: random.Random) -> list[Pair]:
    """A greeting, sometimes with how people are."""
    pairs = [(pick(rng, phrases.GREET_IN), pick(rng, phrases.GREET_OUT))]
    chance = rng.random()
    if chance < 0.35:
        pairs.append((pick(rng, phrases.HOW_IN), pick(rng, phrases.HOW_OUT[:3])))
        if rng.random() < 0.6:
            pairs.append((pick(rng, phrases.FINE_IN), pick(rng, phrases.FINE_OUT)))
    elif chance < 0.5:
        greet = pick(rng, [text for text in phrases.GREET_IN if "?" not in text]).rstrip("!")
        how = pick(rng, phrases.HOW_IN)
        pairs = [
            (
                greet + pick(rng, (", " + how[0].lower() + how[1:], "! " + how)),
                "Hello! " + pick(rng, phrases.HOW_OUT[:3]),
            )
        ]
        if rng.random() < 0.5:
            pairs.append((pick(rng, phrases.FINE_IN), pick(rng, phrases.FINE_OUT)))
    return pairs


def how_are_you(rng: random.Random) -> list[Pair]:
    """How are you, and the user's reply to the same question."""
    pairs = [(pick(rng, phrases.HOW_IN), pick(rng, phrases.HOW_OUT[:3]))]
    if rng.random() < 0.6:
        pairs.append((pick(rng, phrases.FINE_IN), pick(rng, phrases.FINE_OUT)))
    return pairs


def closing(rng: random.Random) -> list[Pair]:
    """Thanks, goodbye or both."""
    thanks = (pick(rng, phrases.THANKS_IN), pick(rng, phrases.THANKS_OUT))
    bye = (pick(rng, phrases.BYE_IN), pick(rng, phrases.BYE_OUT))
    chance = rng.random()
    if chance < 0.2:
        return [
            (
                thanks[0].rstrip("!.") + pick(rng, (". ", ", ", "! ")) + bye[0],
                "You're welcome! " + pick(rng, phrases.BYE_OUT),
            )
        ]
    return [thanks, bye] if chance < 0.5 else [thanks] if chance < 0.75 else [bye]


def acknowledge(rng: random.Random) -> list[Pair]:
    """A word of agreement in the middle."""
    return [(pick(rng, phrases.ACK_IN), pick(rng, phrases.ACK_OUT))]


def arithmetic(rng: random.Random) -> list[Pair]:
    """Adding, subtracting and multiplying small numbers."""
    kind = pick(rng, ("+", "+", "+", "-", "-", "*"))
    a, b = rng.randrange(11), rng.randrange(11)
    if kind == "-" and a < b:
        a, b = b, a
    value = {"+": a + b, "-": a - b, "*": a * b}[kind]
    word = {"+": "plus", "-": "minus", "*": "times"}[kind]
    form = rng.randrange(4)
    if form == 0:
        question, answer = f"{NUMBER_WORDS[a]} {word} {NUMBER_WORDS[b]}", f"{a} {word} {b} is {value}."
    elif form == 1:
        question, answer = f"{a} {word} {b}", f"{a} {word} {b} is {value}."
    else:
        question, answer = f"{a} {kind} {b}", f"{a} {kind} {b} = {value}."
    ask = pick(
        rng,
        (
            "What is {}?",
            "What's {}?",
            "How much is {}?",
            "{}",
            "{}?",
            "Can you work out {}?",
            "Calculate {}.",
        ),
    )
    return [(ask.format(question), answer)]


def counting(rng: random.Random) -> list[Pair]:
    """Counting up or down, and the number before or after."""
    days = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
    months = facts.PLAIN_QA[8][1].rstrip(".").replace(" and ", ", ").split(", ")
    form = rng.randrange(6)
    if form == 0:
        a = rng.randrange(1, 8)
        b = rng.randrange(a + 2, 13)
        return [(f"Count from {a} to {b}.", ", ".join(map(str, range(a, b + 1))) + ".")]
    if form == 1:
        a = rng.randrange(3, 11)
        return [
            (
                pick(rng, (f"Count to {a}.", f"Can you count to {a}?")),
                ", ".join(map(str, range(1, a + 1))) + ".",
            )
        ]
    if form == 2:
        a = rng.randrange(3, 11)
        return [(f"Count backwards from {a}.", ", ".join(map(str, range(a, 0, -1))) + ".")]
    if form == 3:
        a = rng.randrange(1, 30)
        return [(f"Which number comes after {a}?", f"After {a} comes {a + 1}.")]
    names, kind = (days, "day") if form == 4 else (months, "month")
    at = rng.randrange(len(names))
    step, word = pick(rng, ((1, "after"), (-1, "before")))
    other = names[(at + step) % len(names)]
    return [(pick(rng, (f"Which {kind} comes {word} {names[at]}?", f"What {kind} is {word} {names[at]}?")),
             f"{other} comes {word} {names[at]}.")]  # fmt: skip


def with_article(noun: str) -> str:
    """`a dog`, `an owl`."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def plain_fact(rng: random.Random) -> list[Pair]:
    """Common knowledge."""
    form = rng.randrange(10)
    if form == 0:
        animal = pick(rng, list(facts.SOUNDS))
        ask = pick(
            rng,
            (
                "What sound does {} make?",
                "What noise does {} make?",
                "What does {} say?",
                "How does {} sound?",
            ),
        )
        return [
            (
                ask.format(with_article(animal)),
                f'{with_article(animal).capitalize()} says "{facts.SOUNDS[animal]}".',
            )
        ]
    if form == 1:
        animal = pick(rng, list(facts.YOUNG))
        ask = pick(
            rng,
            ("What is a baby {} called?", "What do you call a young {}?", "What's the name for a baby {}?"),
        )
        return [(ask.format(animal), f"A young {animal} is called {with_article(facts.YOUNG[animal])}.")]
    if form == 2:
        animal = pick(rng, list(facts.LEGS))
        count = facts.LEGS[animal]
        ask = pick(rng, ("How many legs does {} have?", "How many legs has {}?"))
        has = f"has {NUMBER_WORDS[count]} legs" if count else "has no legs"
        return [(ask.format(with_article(animal)), f"{with_article(animal).capitalize()} {has}.")]
    if form == 3:
        thing = pick(rng, list(facts.COLOURS))
        ask = pick(rng, ("What colour is {}?", "What color is {}?", "Which colour does {} have?"))
        return [(ask.format(thing), f"{thing[0].upper() + thing[1:]} is {facts.COLOURS[thing]}.")]
    if form == 4:
        a, b = pick(rng, list(facts.OPPOSITES.items()))
        ask = pick(
            rng,
            ('What is the opposite of "{}"?', "What's the opposite of {}?", "Tell me the opposite of {}."),
        )
        return [(ask.format(a), f'The opposite of "{a}" is "{b}".')]
    if form in (5, 6):
        kind, things = pick(rng, list(facts.MORE_GROUPS.items()))
        count = rng.randrange(2, 5)
        chosen = rng.sample(things, count)
        ask = pick(
            rng, ("Name {} {}.", "Tell me {} {}.", "Can you name {} {}?", "Give me {} {}.", "List {} {}.")
        )
        text = ", ".join(chosen[:-1]) + " and " + chosen[-1] + "."
        return [(ask.format(pick(rng, (str(count), NUMBER_WORDS[count])), kind), text[0].upper() + text[1:])]
    return [pick(rng, facts.PLAIN_QA)]


def name_talk(rng: random.Random) -> list[Pair]:
    """The user's name, remembered or not known."""
    name = pick(rng, facts.NAMES)
    told = pick(
        rng,
        (
            "My name is {}.",
            "I'm {}.",
            "I am {}.",
            "Hi, I'm {}.",
            "Hello, my name is {}.",
            "Call me {}.",
            "You can call me {}.",
        ),
    )
    pairs = [
        (
            told.format(name),
            pick(rng, ("Nice to meet you, {}! How can I help you?", "Hello {}! Nice to meet you.")).format(
                name
            ),
        )
    ]
    if rng.random() < 0.5:
        pairs += pick(rng, (plain_fact, arithmetic, topic, how_are_you))(rng)
    ask = pick(
        rng,
        (
            "What is my name?",
            "What's my name?",
            "Do you remember my name?",
            "Do you know my name?",
            "Who am I?",
        ),
    )
    if rng.random() < 0.2:
        return [
            (ask, "You have not told me your name yet. What is it?"),
            pairs[0],
            (ask, f"Your name is {name}."),
        ]
    return [*pairs, (ask, f"Your name is {name}.")]


def memory_talk(rng: random.Random) -> list[Pair]:
    """Something the user said, asked about later."""
    if rng.random() < 0.4:
        animal, name = pick(rng, facts.PETS), pick(rng, facts.PET_NAMES)
        pairs = [(pick(rng, (f"I have a {animal} called {name}.", f"My {animal} is called {name}.", f"My {animal}'s name is {name}.")),
                  pick(rng, (f"{name} is a nice name for a {animal}!", f"How nice! I'm sure {name} is a lovely {animal}.")))]  # fmt: skip
        ask = pick(
            rng,
            (
                f"What is my {animal} called?",
                f"What is the name of my {animal}?",
                f"What's my {animal}'s name?",
            ),
        )
        last = (ask, f"Your {animal} is called {name}.")
    else:
        kinds, things = pick(rng, facts.FAVOURITES)
        kind, thing = pick(rng, kinds), pick(rng, things)
        favourite = "favorite" if kind == "color" or rng.random() < 0.4 else "favourite"
        pairs = [
            (
                f"My {favourite} {kind} is {thing}.",
                pick(rng, ("That is a good choice!", "Good to know!", "A fine choice!")),
            )
        ]
        last = (f"What is my {favourite} {kind}?", f"Your {favourite} {kind} is {thing}.")
    if rng.random() < 0.5:
        pairs += pick(rng, (plain_fact, arithmetic, acknowledge))(rng)
    return [*pairs, last]


def repeat_talk(rng: random.Random) -> list[Pair]:
    """Requests to repeat something."""
    if rng.random() < 0.5:
        text = (
            pick(rng, facts.PLAIN_QA)[1]
            if rng.random() < 0.5
            else pick(rng, ("hello world", "good morning", "I like tea", "the cat is black"))
        )
        return [(pick(rng, ("Repeat after me: {}", "Say: {}", "Please repeat: {}")).format(text), text)]
    question, answer = pick(rng, (plain_fact, arithmetic, topic))(rng)[-1]
    again = pick(
        rng,
        (
            "Can you repeat that?",
            "Say that again, please.",
            "Sorry, what?",
            "Could you say that again?",
            "Once more please.",
        ),
    )
    return [(question, answer), (again, answer)]


def statement(rng: random.Random) -> list[Pair]:
    """Something that people say about themselves, and a friendly reply."""
    ask, answers, things = pick(rng, facts.STATEMENTS)
    thing = pick(rng, things)
    return [(pick(rng, ask).format(x=thing), pick(rng, answers).format(x=thing))]


def wish(rng: random.Random) -> list[Pair]:
    """A request for a service without a tool for it."""
    wants, service = pick(rng, facts.SERVICES)
    city, city2 = rng.sample(facts.CITIES, 2)
    want = pick(rng, wants).format(
        city=city, city2=city2, place=pick(rng, facts.PLACES), n=rng.randrange(2, 9)
    )
    text = pick(rng, facts.REQUESTS).format(x=want)
    return [(text[0].upper() + text[1:], pick(rng, facts.NO_TOOL).format(s=service))]


PARTS: tuple[tuple[float, Part], ...] = (
    (6, topic), (1, greeting), (1, how_are_you), (2, arithmetic), (1, counting), (3.5, plain_fact), (1, name_talk),
    (1, memory_talk), (0.6, repeat_talk), (1, wish), (1.2, statement),
)  # fmt: skip
ONCE: tuple[Part, ...] = (greeting, how_are_you, name_talk, statement)


def choose_part(rng: random.Random, used: Sequence[Part], *, with_tools: bool) -> Part:
    """A part that does not repeat a greeting or similar; with tools, none that requests a service."""
    while True:
        part = rng.choices([part for _, part in PARTS], weights=[weight for weight, _ in PARTS])[0]
        if not (part in ONCE and part in used) and not (part is wish and with_tools):
            return part


def turns_of(rng: random.Random, part: Part, *, with_tools: bool) -> list[Pair]:
    """The turns of `part`; with tools, nothing that the tools contradict."""
    while True:
        pairs = part(rng)
        if not with_tools or not any(NOT_WITH_TOOLS.search(text) for pair in pairs for text in pair):
            return pairs


def plain_date(rng: random.Random, day: datetime.date) -> tuple[str, list[Pair]]:
    """A system line with the bare date, and a question that it answers."""
    asked = (
        "What is the date?",
        "What's today's date?",
        "What is today's date?",
        "What day is it?",
        "Tell me the date.",
    )
    text = f"{day:%B} {day.day}, {day.year}"
    return pick(rng, ("Today is {}.", "Today's date is {}.", "Current date: {}")).format(day.isoformat()), [
        (pick(rng, asked), f"Today is {text}.")
    ]


def date_talk(rng: random.Random, day: datetime.date | None) -> list[Pair]:
    """Questions about the date; `day` is what the system prompt says, with the day of the week, if anything."""
    asked = (
        "What day is it?", "What day is it today?", "What is the date?", "What's today's date?", "Which date is today?",
        "What is today's date?", "Do you know what day it is?", "Tell me the date.", "What day of the week is it?",
    )  # fmt: skip
    if day is None:
        return [(pick(rng, asked), "I don't know today's date. Nobody has told me, and I have no clock.")]
    form, tomorrow = rng.randrange(6), day + datetime.timedelta(days=1)
    if form == 0:
        return [
            (pick(rng, ("What year is it?", "Which year is it?", "What year is this?")), f"It is {day.year}.")
        ]
    if form == 1:
        return [(pick(rng, ("What month is it?", "Which month is it?")), f"It is {day:%B}.")]
    if form == 2:
        return [
            (
                pick(rng, ("What day is tomorrow?", "What date is tomorrow?")),
                f"Tomorrow is {long_date(tomorrow)}.",
            )
        ]
    return [(pick(rng, asked), f"Today is {long_date(day)}.")]


def tool_summary(rng: random.Random, tools: Sequence[Tool]) -> list[Pair]:
    """Questions about what the model can do, with functions listed."""
    does = [
        tool["function"].get("description") or tool["function"]["name"].replace("_", " ") for tool in tools
    ]
    does = [text[0].lower() + text[1:].rstrip(".?!") for text in does]
    asked = (
        "What can you do?",
        "What can you help me with?",
        "How can you help me?",
        "Which tools do you have?",
        "What can I ask you?",
    )
    return [
        (
            pick(rng, asked),
            "With the tools I have here, I can " + "; ".join(does) + ". I can also chat with you.",
        )
    ]


def make(
    rng: random.Random, questions: Sequence[Sequence[Pair]], tool_sets: Sequence[Sequence[Tool]]
) -> Chat:
    """One conversation. `questions` are knowledge chats to mix in, `tool_sets` lists of functions that go unused."""
    tools = list(pick(rng, tool_sets)) if tool_sets and rng.random() < 0.1 else []
    day = random_date(rng) if rng.random() < 0.35 else None
    bare, dated = plain_date(rng, day) if day and rng.random() < 0.25 else ("", [])
    used: list[Part] = []
    summed = False
    pairs: list[Pair] = []
    if rng.random() < 0.3:
        used.append(greeting)
        pairs += greeting(rng)
    if any(answer == phrase for _, answer in pairs for phrase in phrases.HOW_OUT):
        used.append(how_are_you)
    for _ in range(rng.choices((1, 2, 3, 4), weights=(5, 3, 2, 1))[0]):
        chance = rng.random()
        if dated and chance < 0.4:
            pairs, dated = pairs + dated, []
        elif not bare and (chance < 0.04 or (day and chance < 0.3)):
            pairs += date_talk(rng, day)
        elif tools and chance < 0.45 and not summed:
            summed = True
            pairs += tool_summary(rng, tools)
        elif questions and chance > 0.85:
            pairs += pick(rng, questions)
        else:
            part = choose_part(rng, used, with_tools=bool(tools))
            used.append(part)
            pairs += turns_of(rng, part, with_tools=bool(tools))
        if rng.random() < 0.06:
            pairs += acknowledge(rng)
    if rng.random() < 0.3:
        pairs += closing(rng)
    messages: list[Message] = []
    if day is not None or rng.random() < 0.5:
        text = pick(rng, PERSONAS)
        if day is not None:
            stamp = bare or date_line(rng, day, weekday=True)
            text = stamp if rng.random() < 0.15 else text + pick(rng, (" ", "\n")) + stamp
        messages.append(system_message(text))
    for question, answer in pairs:
        messages += [user_message(typed(rng, question)), assistant(answer)]
    return Chat(messages, tools, [tool["function"]["name"] for tool in tools])


def smalltalk(
    seed: int, count: int, questions: Sequence[Sequence[Pair]] = (), tool_sets: Sequence[Sequence[Tool]] = ()
) -> Iterator[Chat]:
    """`count` different conversations (fewer only if the sentences run out)."""
    rng = random.Random(seed)
    seen: set[str] = set()
    for _ in range(20 * count):
        if len(seen) >= count:
            return
        chat = make(rng, questions, tool_sets)
        key = repr(chat.messages)
        if key not in seen:
            seen.add(key)
            yield chat
