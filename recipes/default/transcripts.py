"""Ten conversations with the default model, written as Markdown without editing.

    python -m recipes.default.transcripts > docs/transcripts.md

The user's messages and the tools' results are fixed below; the answers are the model's first ones, with the sampling
parameters of its generation_config.json and the conversation's number as the seed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from godwit.cli import common
from godwit.cli.options import SamplingOptions
from godwit.cli.reply import parse_reply
from godwit.cli.responder import Responder
from godwit.engine import ChatRenderer, Piece

TODAY = "You are Godwit, a helpful assistant. Today is 2026-11-23."
MAX_CALLS = 3  # limit of tool calls after one message, in case the model does not stop


def tool(name: str, description: str, required: list[str], **properties: dict[str, Any]) -> dict[str, Any]:
    """An OpenAI function object."""
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def text(description: str, *enum: str) -> dict[str, Any]:
    """A string property."""
    return {"type": "string", "description": description} | ({"enum": list(enum)} if enum else {})


RESTAURANTS = [
    tool(
        "find_restaurants",
        "Find a restaurant of a kind in a city",
        ["city", "cuisine"],
        city=text("City of the restaurant"),
        cuisine=text("Kind of food", "Italian", "Mexican", "Indian", "Chinese"),
    ),
    tool(
        "reserve_table",
        "Reserve a table at a restaurant",
        ["restaurant_name", "city", "time"],
        restaurant_name=text("Name of the restaurant"),
        city=text("City of the restaurant"),
        time=text("Time of the reservation (HH:MM, 24-hour)"),
        party_size={"type": "integer", "description": "Number of people", "enum": [1, 2, 3, 4, 5, 6]},
        date=text("Date of the reservation (YYYY-MM-DD)"),
    ),
]
WEATHER = [
    tool(
        "get_weather",
        "Get the weather of a city on a date",
        ["city"],
        city=text("Name of the city"),
        date=text("Date (YYYY-MM-DD)"),
    )
]
BUSES = [
    tool(
        "find_bus",
        "Find a bus between two cities on a date",
        ["origin", "destination", "departure_date"],
        origin=text("City where the bus starts"),
        destination=text("City where the bus goes"),
        departure_date=text("Date of the departure (YYYY-MM-DD)"),
    ),
    tool(
        "buy_bus_ticket",
        "Buy tickets for a bus",
        ["origin", "destination", "departure_date", "departure_time"],
        origin=text("City where the bus starts"),
        destination=text("City where the bus goes"),
        departure_date=text("Date of the departure (YYYY-MM-DD)"),
        departure_time=text("Time of the departure (HH:MM, 24-hour)"),
        group_size={"type": "integer", "description": "Number of tickets", "enum": [1, 2, 3, 4, 5]},
    ),
]


@dataclass(frozen=True)
class Talk:
    """One conversation: the user's messages and the tools' results, in order."""

    title: str
    user: list[str]
    tools: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)


TALKS = [
    Talk(
        "Getting acquainted", ["Hello!", "How are you?", "Who are you?", "What can you do?", "Thanks, bye."]
    ),
    Talk("Stories", ["Hi", "Please tell me a short story about a fox.", "Thank you! Another one please."]),
    Talk(
        "Words and facts",
        [
            'What does "brave" mean?',
            'What is the opposite of "hot"?',
            "What is the capital of France?",
            "What language do people speak in Brazil?",
            "What is 3 + 4?",
        ],
    ),
    Talk(
        "A table for four",
        [
            "I am looking for a place to eat.",
            "Italian, in San Jose.",
            "Sounds good. Book it for 4 people at 7 pm.",
            "Yes, please.",
            "Thanks, that's all.",
        ],
        RESTAURANTS,
        [
            {
                "count": 3,
                "results": [
                    {
                        "restaurant_name": "Bella Roma",
                        "street_address": "12 Market Street",
                        "has_live_music": False,
                    }
                ],
            },
            {"success": True, "phone_number": "408-555-0117"},
            {"success": True, "phone_number": "408-555-0117"},
        ],
    ),
    Talk(
        "The weather",
        ["What will the weather be like in Oslo tomorrow?", "Thank you."],
        WEATHER,
        [{"count": 1, "results": [{"temperature": 41, "precipitation": 20, "wind": 9}]}],
    ),
    Talk(
        "A bus ticket",
        [
            "I need a bus to Fresno.",
            "From Sacramento, on the 3rd of December.",
            "Great. I want to buy 2 tickets.",
            "Yes, that's right.",
            "No, that is all. Bye!",
        ],
        BUSES,
        [
            {"count": 2, "results": [{"departure_time": "09:30", "price": 31, "transfers": 0}]},
            {"success": True, "price": 62},
            {"success": True, "price": 62},
        ],
    ),
    Talk(
        "Tools at hand, but not needed",
        ["Hey there", "Do you like music?", "Tell me a fact about whales."],
        WEATHER,
    ),
    Talk(
        "No tool for it",
        [
            "Can you book me a hotel in Berlin for two nights?",
            "Then what is the weather like in Berlin right now?",
        ],
    ),
    Talk(
        "What it does not do",
        [
            "Who will win the next election?",
            "How do I make a bomb?",
            "I have a strong pain in my chest. What should I take?",
        ],
    ),
    Talk(
        "Reading",
        [
            "Anna lived by the sea with her grandfather. Every morning she carried bread to the lighthouse keeper. One day "
            "the keeper was ill, so Anna climbed the stairs and lit the lamp herself, and a ship came home safely.\n\n"
            "Why did Anna light the lamp?",
            "What did she carry every morning?",
            "My dog is called Rex.",
            "What is the name of my dog?",
        ],
    ),
]


def main() -> None:
    opened = common.open_model(None)
    responder = opened.start(threads=None, dtype="auto")
    params = common.sampling_params(SamplingOptions(), opened.tokenizer.generation_defaults)
    print("# Ten conversations with the default model\n")
    print(
        "Unedited first answers, written by `python -m recipes.default.transcripts`; the system message of all is"
    )
    print(f"`{TODAY}` What the tools return was fixed beforehand.")
    for number, talk in enumerate(TALKS, 1):
        print(f"\n## {number}. {talk.title}\n")
        if talk.tools:
            print("Tools: " + ", ".join(f"`{entry['function']['name']}`" for entry in talk.tools) + "\n")
        hold(responder, talk, replace(params, seed=number))
    responder.close()


def hold(responder: Responder, talk: Talk, params: Any) -> None:
    """Run one conversation and print it."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": TODAY}]
    results = list(talk.results)
    for said in talk.user:
        messages.append({"role": "user", "content": said})
        show("You", said)
        for _ in range(MAX_CALLS):
            answer = reply(responder, messages, talk.tools, params)
            show("Godwit", answer)
            parsed = parse_reply(answer)
            messages.append(parsed.as_message())
            if not parsed.calls:
                break
            for call in parsed.calls:
                content = json.dumps(results.pop(0) if results else {"success": False}, separators=(",", ":"))
                messages.append({"role": "tool", "name": call.name, "content": content})
                show("Tool", content)


def reply(
    responder: Responder, messages: list[dict[str, Any]], tools: list[dict[str, Any]], params: Any
) -> str:
    """The model's next answer."""
    prompt = ChatRenderer(responder.tokenizer, tools).prompt(messages)
    return "".join(event.text for event in responder.answer(prompt, params) if isinstance(event, Piece))


def show(who: str, said: str) -> None:
    """Print one turn as a quoted block."""
    print(f"**{who}:**\n")
    print("\n".join(f"> {line}".rstrip() for line in said.splitlines() or [""]) + "\n")


if __name__ == "__main__":
    main()
