"""API keys: their file, their limits, and where their labels show."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from godwit.errors import UsageError
from godwit.server.connections.pace import BoundedRate, Bucket, Share, Sieve
from godwit.server.keys import MAX_KEYS, Key, Quota, read_keys
from godwit.server.log import OneLine, Record
from tests.server.conftest import Engines, Running, running
from tests.server.test_life import wait

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello!"}]}


class Clock:
    """Stands still until it is turned."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(
        "# a remark\n  first-key-1  \n\nsecond-key=2# alice\nthird-key-3 rpm=5\n"
        "fourth-key-4 bob tpm=1000 rpm=60\n"
    )
    assert read_keys(file, {"GODWIT_API_KEY": " fifth-key-5 "}) == (
        Key("first-key-1", "key1"),
        Key("second-key=2#", "alice"),
        Key("third-key-3", "key3", rpm=5),
        Key("fourth-key-4", "bob", rpm=60, tpm=1000),
        Key("fifth-key-5", "env"),
    )
    assert len(read_keys(file, {"GODWIT_API_KEY": "first-key-1"})) == 4
    assert read_keys(None, {}) == ()
    assert "first" not in repr(Key("first-key-1", "key1"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no keys"),
        (b"# none\n", "no keys"),
        (b"short\n", "line 1: an API key has"),
        ("schl\u00fcssel-1".encode(), "cannot be read"),
        (b"\0" * 20, "line 1: an API key has"),
        (b"first-key-1 a label\n", "line 1: write a key as"),
        (b"\nfirst-key-1 rpm=0\n", "line 2: write a key as"),
        (b"first-key-1 rpm=1 rpm=2\n", "write a key as"),
        (b"first-key-1 rpm=1e3\n", "write a key as"),
        (b'first-key-1 a"b\n', "a label has"),
        (b"first-key-1 " + b"a" * 65, "a label has"),
        (b"first-key-1 a\nsecond-key-2 a\n", "two keys are labelled a"),
        (b"first-key-1 key2\nsecond-key-2\n", "two keys are labelled key2"),
        (b"first-key-1 a\nfirst-key-1 b\n", "labelled b is listed twice"),
        (b"".join(b"key-number-%d\n" % n for n in range(MAX_KEYS + 1)), "are allowed"),
    ],
)
def test_key_files_that_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=reason) as told:
        read_keys(file, {})
    assert "-key-1" not in str(told.value)


def test_keys_that_are_none(tmp_path: Path) -> None:
    for file, environment in ((tmp_path / "absent", {}), (None, {"GODWIT_API_KEY": ""})):
        with pytest.raises(UsageError):
            read_keys(file, environment)


def test_a_bucket_fills_with_time_and_may_be_in_debt() -> None:
    clock = Clock()
    bucket = Bucket(rate=2, size=4, clock=clock)
    bucket.take(4)
    assert bucket.wait() == 0.5
    clock.now += 0.5
    assert bucket.wait() == 0
    bucket.take(9)
    assert bucket.wait() == 4.5
    clock.now += 100
    bucket.take(4)
    assert bucket.wait() == 0.5


def test_a_quota_lets_in_while_there_is_something_left() -> None:
    clock = Clock()
    quota = Quota(Key("first-key-1", "a", rpm=2, tpm=60), clock)
    assert quota.admit() is None
    quota.spend(100)
    assert quota.admit() == ("tokens", 41)
    clock.now += 41
    assert quota.admit() is None
    assert Quota(Key("first-key-1", "a"), clock).admit() is None


def test_costly_work_gets_its_share_of_the_time() -> None:
    clock = Clock()
    share = Share(0.1, clock)
    assert share.spent(0.01) == pytest.approx(0.09)
    assert share.spent(0.01) == pytest.approx(0.18)  # someone else's, which has to wait for the first
    clock.now += 10
    assert share.spent(0.01) == pytest.approx(0.09)


def test_a_sieve_counts_what_it_holds_back() -> None:
    clock = Clock()
    sieve = Sieve(rate=1, burst=2, clock=clock)
    assert [sieve.passes() for _ in range(5)] == [0, 0, None, None, None]
    clock.now += 1
    assert [sieve.passes() for _ in range(2)] == [3, None]


def test_warnings_are_bounded_and_errors_are_not(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("godwit.test")
    clock = Clock()
    bound = BoundedRate(Sieve(rate=1, burst=1, clock=clock))
    logger.addFilter(bound)
    try:
        for _ in range(3):
            logger.warning("a %s", "fault")
        logger.error("b")
        clock.now += 1
        logger.warning("a %s", "fault")
    finally:
        logger.removeFilter(bound)
    assert caplog.messages == ["a fault", "b", "a fault (2 more like this were not logged)"]


KEYS = (
    Key("first-key-12345", "alice", rpm=3),
    Key("second-key-6789", "bob", tpm=60),
    Key("third-key-01234", "carol"),
)


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def metered(engines: Engines, clock: Clock) -> Iterator[Running]:
    with running(engines("hello"), keys=KEYS, clock=clock, names=("m",)) as server:
        yield server


def test_too_many_requests_through_the_clients(metered: Running, clock: Clock) -> None:
    key = KEYS[0].secret
    clock.now += 60
    with openai.OpenAI(base_url=f"{metered.url}/v1", api_key=key, max_retries=0) as client:
        for _ in range(3):
            assert client.chat.completions.create(**HELLO).choices
        client.models.list()  # asks for no work
        with pytest.raises(openai.RateLimitError) as told:
            client.chat.completions.create(**HELLO)
    assert told.value.code == "rate_limit_exceeded" and told.value.type == "rate_limit_error"
    assert told.value.response.headers["retry-after"] == "20" and "requests" in told.value.message
    with anthropic.Anthropic(base_url=metered.url, api_key=key, max_retries=0) as claude:
        with pytest.raises(anthropic.RateLimitError) as also:
            claude.messages.create(**HELLO, max_tokens=5)
        assert also.value.response.headers["retry-after"] == "20"
        assert also.value.body["error"]["type"] == "rate_limit_error"  # type: ignore[index]
        clock.now += 20
        assert claude.messages.create(**HELLO, max_tokens=5).content


def test_too_many_tokens(metered: Running, clock: Clock) -> None:
    clock.now += 600
    with openai.OpenAI(base_url=f"{metered.url}/v1", api_key=KEYS[1].secret, max_retries=0) as client:
        used = 0
        while used < 60:
            answer = client.chat.completions.create(**HELLO)
            assert answer.usage is not None
            used += answer.usage.total_tokens
        with pytest.raises(openai.RateLimitError, match="tokens") as told:
            client.chat.completions.create(**HELLO)
        seconds = int(told.value.response.headers["retry-after"])
        assert seconds == used - 60 + 1
        clock.now += seconds
        stream = client.chat.completions.create(**HELLO, stream=True, n=2)
        assert len(list(stream)) > 2
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**HELLO)
    with metered.client(KEYS[2].secret) as other:
        assert other.post(CHAT, json=HELLO).status_code == 200


def test_log_and_numbers_name_the_key(metered: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "godwit.server")
    with metered.client(KEYS[2].secret) as client:
        before = client.get("/metrics").text
        usage = client.post(CHAT, json=HELLO).json()["usage"]
        after = client.get("/metrics").text
    wait(lambda: len(caplog.messages) > 0)
    assert any(f"POST {CHAT} 200 " in line and " key=carol " in line for line in caplog.messages)
    for kind in ("prompt", "completion"):
        name = f'godwit_key_tokens_total{{key="carol",kind="{kind}"}}'
        assert value(after, name) - value(before, name) == usage[f"{kind}_tokens"]
    assert 'godwit_key_requests_total{key="carol",status="200"}' in after
    assert not any(key.secret in text for key in KEYS for text in (after, *caplog.messages))


def value(text: str, name: str) -> float:
    """Of a number of /metrics; 0 where it is not there."""
    return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0)


def test_refusals_are_logged_at_a_bounded_rate(metered: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "godwit.server")
    with metered.client() as client:
        statuses = {client.get("/v1/models").status_code for _ in range(100)}
    lines = [line for line in caplog.messages if " 401 " in line]
    assert statuses == {401} and 1 <= len(lines) < 50


def test_lines_cannot_be_forged(metered: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "godwit.server")
    forged = "x\n16:04:02 992d POST /v1/models 200 key=alice\x1b[31m \u2028"
    with metered.client(KEYS[2].secret) as client:
        client.get(httpx.URL(metered.url).copy_with(raw_path=b"/v1/%0a16:04:02%20key=alice"))
        client.post(CHAT, json=HELLO | {"model": forged + '" key=alice "'})
        client.post(CHAT, json=HELLO | {forged: 1})
    wait(lambda: len(caplog.messages) == 3)
    assert " GET /v1/%0a16:04:02%20key=alice 404 " in caplog.messages[0]
    for line in caplog.messages:
        head, _, error = line.partition(" error=")
        assert line.isprintable() and head.endswith(" key=carol") and head.count(" key=") == 1
        assert not error or re.fullmatch(r'"(?:[^"\\]|\\.)*"', error)


def test_a_record_is_one_line_also_with_a_traceback() -> None:
    formatter = OneLine("%(asctime)s %(message)s", "%H:%M:%S")
    try:
        raise ValueError("a\n16:04:02 forged\x1b")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("n", logging.ERROR, "p", 1, "b\n%s", ("16:04:02\r",), info)
    first, *rest = formatter.format(record).splitlines()
    assert first.endswith(r"b\n16:04:02\r") and rest
    assert all(line.startswith("    ") and line.isprintable() for line in rest)


def test_what_was_held_back_is_told() -> None:
    assert Record("GET", "/").line(3).endswith("(3 more refused requests were not logged)")
