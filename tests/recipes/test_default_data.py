"""The data of the default model: renaming, distractors, small talk, roles; a trial run on the real files."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from godwit.train.data import learned
from recipes.default import chats, encode, smalltalk, storytelling, substitute, tools
from recipes.default import tokenizer as bpe
from recipes.default.common import Chat, assistant, held_out, system, user

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"


def function(name: str, *arguments: str) -> dict[str, Any]:
    properties = {argument: {"type": "string", "description": f"The {argument}"} for argument in arguments}
    parameters = {"type": "object", "properties": properties, "required": list(arguments[:1])}
    inner = {"name": name, "description": f"To {name}", "parameters": parameters}
    return {"type": "function", "function": inner}


def entry(
    service: str, variant: int, split: str, listed: list[dict[str, Any]], rename: dict[str, Any]
) -> dict[str, Any]:
    return {"service": service, "variant": variant, "split": split, "tools": listed, "rename": rename}


BUS_RENAME = {
    "find_bus": {
        "name": "search_route",
        "arguments": {"origin": "city_from", "day": "depart_day"},
        "results": {"price": "fare", "origin": "city_from"},
    }
}
LIBRARY = tools.Library(
    [
        entry("Buses_1", 0, "train", [function("find_bus", "origin", "day")], {}),
        entry("Buses_1", 1, "train", [function("search_route", "depart_day", "city_from")], BUS_RENAME),
        entry("Music_1", 0, "train", [function("play_song", "title")], {}),
        entry("Music_1", 1, "train", [function("search_route", "title")],
              {"play_song": {"name": "search_route", "arguments": {}, "results": {}}}),
        entry("Alarm_1", 0, "dev", [function("set_alarm", "time")], {}),
    ]
)  # fmt: skip
DIALOGUE: dict[str, Any] = {
    "id": "one",
    "domain_services": ["Buses_1"],
    "date": "2019-03-01",
    "tools": [function("find_bus", "origin", "day")],
    "messages": [
        user("I want to take a bus from Fresno, please."),
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"name": "find_bus", "arguments": {"origin": "Fresno", "day": "2019-03-02"}}],
        },
        {"role": "tool", "name": "find_bus", "content": '{"count":1,"results":[{"price":"12","count":2}]}'},
        assistant("There is one for $12."),
    ],
}


def test_rewording_renames_tool_arguments_and_results() -> None:
    listed, messages = tools.reword(DIALOGUE, LIBRARY, {"Buses_1": 1})
    assert [tool["function"]["name"] for tool in listed] == ["search_route"]
    call = messages[1]["tool_calls"][0]
    assert call["name"] == "search_route"
    assert list(call["arguments"].items()) == [("depart_day", "2019-03-02"), ("city_from", "Fresno")]
    assert messages[2]["name"] == "search_route"
    assert json.loads(messages[2]["content"]) == {"count": 1, "results": [{"fare": "12", "count": 2}]}
    assert DIALOGUE["messages"][1]["tool_calls"][0]["name"] == "find_bus"


def test_equal_names_of_two_services_are_told_apart() -> None:
    both = {**DIALOGUE, "domain_services": ["Buses_1", "Music_1"]}
    both["tools"] = [function("find_bus", "origin", "day"), function("play_song", "title")]
    listed, _ = tools.reword(both, LIBRARY, {"Buses_1": 1, "Music_1": 1})
    assert [tool["function"]["name"] for tool in listed] == ["search_route", "music1_search_route"]


def test_distractors_come_from_other_training_services() -> None:
    rng = random.Random(0)
    for _ in range(50):
        found = [tool["function"]["name"] for tool in LIBRARY.some(rng, 3, ["Buses_1"], ["play_song"])]
        assert len(found) == len(set(found))
        assert set(found) <= {"search_route"}  # the other wording of Music_1; never a dev service


@pytest.mark.parametrize("seed", range(20))
def test_every_call_of_a_dialogue_is_listed_and_fits_its_schema(seed: int) -> None:
    chat = tools.dialogue(DIALOGUE, LIBRARY, random.Random(seed))
    listed = {tool["function"]["name"]: tool["function"] for tool in chat.tools}
    assert len(listed) == len(chat.tools)
    calls = [call for message in chat.messages for call in message.get("tool_calls", ())]
    assert len(calls) == 1
    for call in calls:
        assert call["name"] not in chat.spare
        properties = listed[call["name"]]["parameters"]["properties"]
        assert list(call["arguments"]) == [name for name in properties if name in call["arguments"]]
    assert "2019" in chat.messages[0]["content"]


def test_names_get_others_wherever_they_stand() -> None:
    messages = [
        user("Play Blue Moon by Frank Sinatra, please. Is blue moon a jazz song?"),
        {"role": "assistant", "content": "", "tool_calls": [
            {"name": "play", "arguments": {"title": "Blue Moon", "on": "TV", "mood": "Calm Evening"}}]},
        {"role": "tool", "name": "play", "content": '{"album":"Night Train","mood":"Calm Evening"}'},
        assistant("Blue Moon is on the album Night Train."),
    ]  # fmt: skip
    assert substitute.replaceable(messages, []) == [
        "Blue Moon",
        "Night Train",
    ]  # "Calm Evening" was not said before
    assert substitute.replaceable(messages, [function("Night Train")]) == ["Blue Moon"]
    substitute.substitute(random.Random(0), messages, [], share=1.0)
    call = messages[1]["tool_calls"][0]["arguments"]
    album = json.loads(messages[2]["content"])["album"]
    assert call["title"] != "Blue Moon" and call["mood"] == "Calm Evening"
    said = f"Play {call['title']} by Frank Sinatra, please. Is {call['title'].lower()} a jazz song?"
    assert messages[0]["content"] == said
    assert messages[3]["content"] == f"{call['title']} is on the album {album}."


def test_missing_tool_is_refused() -> None:
    chat = tools.missing_tool(DIALOGUE, None, LIBRARY, random.Random(1))
    assert chat is not None
    assert not tools.used_names(chat.messages)
    assert "no tool for buses" in chat.messages[2]["content"]
    assert all(tool["function"]["name"] != "find_bus" for tool in chat.tools)


def test_small_talk_is_seeded_distinct_and_never_calls() -> None:
    sets = [[function("play_song", "title")]]
    first = list(smalltalk.smalltalk(3, 300, [[("What is a cat?", "An animal.")]], sets))
    again = list(smalltalk.smalltalk(3, 300, [[("What is a cat?", "An animal.")]], sets))
    assert first == again
    assert len({repr(chat.messages) for chat in first}) == 300
    assert any(chat.tools for chat in first)
    for chat in first:
        spoken = [message for message in chat.messages if message["role"] != "system"]
        assert [message["role"] for message in spoken] == ["user", "assistant"] * (len(spoken) // 2)
        assert not tools.used_names(chat.messages)
        assert all(message["content"].strip() and "{" not in message["content"] for message in spoken)


def test_arithmetic_is_right() -> None:
    rng = random.Random(0)
    for _ in range(300):
        answer = smalltalk.arithmetic(rng)[0][1].rstrip(".")
        numbers = [int(number) for number in re.findall(r"\d+", answer)]
        word = next(sign for sign in ("+", "-", "*", "plus", "minus", "times") if f" {sign} " in answer)
        a, b, result = numbers
        plus, minus, times = a + b, a - b, a * b
        right = {"+": plus, "plus": plus, "-": minus, "minus": minus, "*": times, "times": times}
        assert result == right[word]


def test_story_requests_name_the_characters() -> None:
    text = "\n".join(["A fox met a crow.", "The fox wanted the cheese.", "The fox sang."] * 6)
    story = {"title": "The Fox and the Crow", "text": text}
    assert storytelling.topics_of(story)[0] == "a fox"
    for chat in storytelling.storytelling([story], seed=0, repeats=10):
        told = "\n".join(m["content"] for m in chat.messages if m["role"] == "assistant")
        assert "The fox wanted the cheese." in told


def test_reading_puts_the_text_before_its_first_question() -> None:
    record = {"context": "Anna has a red hat.", "question": "Who has a hat?", "answers": ["anna"]}
    (chat,) = chats.reading([record], seed=0)
    spoken = [message for message in chat.messages if message["role"] != "system"]
    assert record["context"] in spoken[0]["content"]
    assert spoken[1]["content"] == "Anna."


def test_a_broken_answer_ends_with_its_last_sentence() -> None:
    broken = "One sentence is here. " * 20 + "And then it"
    assert chats.whole(broken) == ("One sentence is here. " * 20).strip()
    assert chats.whole("Paul Newman") == "Paul Newman"


def test_holding_out_is_stable() -> None:
    held = [name for name in map(str, range(10_000)) if held_out(name, 1.0)]
    assert 60 < len(held) < 140
    assert held == [name for name in map(str, range(10_000)) if held_out(name, 1.0)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    call = '{"name": "find_bus", "arguments": {"a": 1}}'
    texts = ["The cat sat on the mat and looked at the bus.", call] * 20
    bpe.write(bpe.train(iter(texts), vocab_size=300), folder)
    return folder


def test_added_tokens_have_the_last_ids(tokenizer_folder: Path) -> None:
    raw = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {token["content"]: token for token in raw["added_tokens"]}
    assert list(added) == [*bpe.SPECIAL, *bpe.ATOMIC]
    assert added["<|im_end|>"]["special"] and not added["<tool_call>"]["special"]
    assert [token["id"] for token in raw["added_tokens"]] == list(range(len(raw["model"]["vocab"]), 300))


def test_roles_and_bytes_of_a_dialogue(tokenizer_folder: Path) -> None:
    encoder = encode.Encoder(tokenizer_folder)
    chat = Chat([system("Today is 2019-03-01."), *DIALOGUE["messages"]], list(DIALOGUE["tools"]))
    (doc,) = encoder.chat(chat)
    ids, roles, size = doc
    spoken = encoder.tokenizer.decode(ids[learned(roles)].tolist(), skip_special=False)
    arguments = '{"origin": "Fresno", "day": "2019-03-02"}'
    call = f'<tool_call>\n{{"name": "find_bus", "arguments": {arguments}}}\n</tool_call>'
    assert spoken == f"{call}<|im_end|>There is one for $12.<|im_end|>"
    assert size == len(f"{call}There is one for $12.")
    marked = encoder.tokenizer.decode(ids[roles == encode.CALL].tolist(), skip_special=False)
    assert marked == call.removeprefix("<tool_call>")
    asked = encoder.tokenizer.decode(ids[roles == 1].tolist())
    assert asked == "I want to take a bus from Fresno, please."


def test_a_long_chat_loses_spare_tools_then_turns(tokenizer_folder: Path) -> None:
    messages = [user("a b"), assistant("c d"), user("e f"), assistant("g h")]
    whole = Chat(messages, [function("spare_one", "x")], ["spare_one"])
    full = len(encode.Encoder(tokenizer_folder).chat(whole)[0][0])
    bare = len(encode.Encoder(tokenizer_folder).chat(Chat(whole.messages))[0][0])
    assert bare < full
    (doc,) = encode.Encoder(tokenizer_folder, max_tokens=full - 1).chat(whole)
    assert len(doc[0]) == bare
    encoder = encode.Encoder(tokenizer_folder, max_tokens=bare - 1)
    (doc,) = encoder.chat(whole)
    assert encoder.tokenizer.decode(doc[0][doc[1] == 0].tolist()) == "c d"
    assert encode.Encoder(tokenizer_folder, max_tokens=5).chat(whole) == []


def test_a_long_text_is_cut_between_paragraphs(tokenizer_folder: Path) -> None:
    encoder = encode.Encoder(tokenizer_folder, max_tokens=40)
    text = "\n".join(f"Line {number} of the cat." for number in range(12))
    docs = encoder.text(text)
    assert len(docs) > 1
    assert all(len(ids) <= 40 and ids[-1] == encoder.end and not roles.any() for ids, roles, _ in docs)
    parts = [encoder.tokenizer.decode(ids.tolist()) for ids, _, _ in docs]
    assert "".join(parts) == text
    assert all(part.endswith("\n") for part in parts[:-1])


@pytest.mark.skipif(not DATA.is_dir(), reason="the training files of ../shared/data are not here")
def test_a_trial_run_writes_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes.default import prepare

    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}")
    prepare.prepare(DATA, tmp_path, limit=12, seed=0, only=(), processes=1)
    meta = json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))
    assert set(meta["sources"]) >= {"books", "dialogues", "orders", "smalltalk", "qa", "heldout_dialogues"}
    for name, facts in meta["sources"].items():
        tokens, roles = np.load(tmp_path / f"{name}.tokens.npy"), np.load(tmp_path / f"{name}.roles.npy")
        offsets = np.load(tmp_path / f"{name}.offsets.npy")
        assert (tokens.dtype, roles.dtype, offsets.dtype) == (np.uint16, np.uint8, np.int64)
        assert len(tokens) == len(roles) == offsets[-1] == facts["tokens"]
        assert len(offsets) == facts["docs"] + 1
        assert np.diff(offsets).max(initial=0) <= encode.MAX_TOKENS
        if facts["held_out"]:
            assert len(np.load(tmp_path / f"{name}.bytes.npy")) == facts["docs"]
