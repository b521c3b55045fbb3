"""What tests of OpenAI's API share: its client, tools, and things to say."""

from __future__ import annotations

from typing import Any

from openai import OpenAI

from tests.server.conftest import Running

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "The time in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CUISINE = {"type": "string", "description": "Cuisine of food served in the restaurant"}
CITY = {"type": "string", "description": "City in which the restaurant is located"}
FIND: Any = {
    "type": "function",
    "function": {
        "name": "find_restaurants",
        "description": "Find a restaurant of a particular cuisine in a city",
        "parameters": {
            "type": "object",
            "properties": {"cuisine": CUISINE, "city": CITY},
            "required": ["cuisine", "city"],
        },
    },
}
SAN_JOSE: list[Any] = [
    {"role": "system", "content": "You are Godwit, a helpful assistant. Today is 2026-11-23."},
    {"role": "user", "content": "Find me an Italian restaurant in San Jose."},
]
HELLO: Any = [{"role": "user", "content": "Hello!"}]


def client_of(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
