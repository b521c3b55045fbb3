"""API keys: read from a file and the environment, and compared by their hashes."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from starlette.datastructures import Headers

from godwit.errors import UsageError
from godwit.server.connections.pace import Bucket

MIN_KEY_CHARS = 8
MAX_KEYS = 1024
MAX_KEY_FILE_BYTES = 1 << 20
ENVIRONMENT_LABEL = "env"
_KEY = re.compile(r"[!-~]+")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LIMIT = re.compile(r"(rpm|tpm)=([1-9][0-9]{0,11})")


@dataclass(frozen=True)
class Key:
    """An API key.

    Attributes:
        secret: what clients send.
        label: the key's name in the log and in /metrics.
        rpm, tpm: requests, and tokens of prompts and answers, per minute; None: no limit.
    """

    secret: str = field(repr=False)
    label: str
    rpm: int | None = None
    tpm: int | None = None


def read_keys(file: Path | None, environment: Mapping[str, str]) -> tuple[Key, ...]:
    """The keys in a file and the one in GODWIT_API_KEY.

    A line of the file is ``KEY [LABEL] [rpm=N] [tpm=N]``; blank lines and comments (#) are skipped.
    The n-th key is labelled ``keyN`` if it has no label.

    Raises:
        UsageError: the file cannot be read or has no keys, or a line is invalid.
    """
    keys = [] if file is None else _read_file(file)
    single = environment.get("GODWIT_API_KEY")
    if single is not None and single.strip() not in {key.secret for key in keys}:
        keys.append(Key(_checked(single.strip(), "GODWIT_API_KEY"), ENVIRONMENT_LABEL))
    _refuse_duplicates(keys, str(file))
    return tuple(keys)


def _read_file(file: Path) -> list[Key]:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_KEY_FILE_BYTES + 1)
        lines = data.decode("ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read as a list of keys ({error})") from None
    if len(data) > MAX_KEY_FILE_BYTES:
        raise UsageError(f"{file}: a key file is limited to {MAX_KEY_FILE_BYTES >> 20} MiB")
    keys: list[Key] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            keys.append(_parse(line.split(), f"{file} line {number}", f"key{len(keys) + 1}"))
    if not keys:
        raise UsageError(f"{file}: no keys in it; write one per line")
    if len(keys) > MAX_KEYS:
        raise UsageError(f"{file}: {len(keys)} keys, but only {MAX_KEYS} are allowed")
    return keys


def _parse(words: Sequence[str], place: str, label: str) -> Key:
    secret, *rest = words
    if rest and "=" not in rest[0]:
        label = rest.pop(0)
        if not _LABEL.fullmatch(label):
            raise UsageError(
                f"{place}: a label has up to 64 letters, digits, dots, hyphens and underscores, and begins "
                "with a letter or digit"
            )
    limits: dict[str, int] = {}
    for word in rest:
        match = _LIMIT.fullmatch(word)
        if match is None or match[1] in limits:
            raise UsageError(f"{place}: write a key as KEY [LABEL] [rpm=N] [tpm=N]")
        limits[match[1]] = int(match[2])
    return Key(_checked(secret, place), label, **limits)


def _checked(secret: str, place: str) -> str:
    if len(secret) < MIN_KEY_CHARS or not _KEY.fullmatch(secret):
        raise UsageError(
            f"{place}: an API key has {MIN_KEY_CHARS} or more printable ASCII characters and no spaces"
        )
    return secret


def _refuse_duplicates(keys: Sequence[Key], place: str) -> None:
    secrets, labels = set[str](), set[str]()
    for key in keys:
        if key.secret in secrets:
            raise UsageError(
                f"{place}: the key labelled {key.label} is listed twice; remove one of the lines"
            )
        if key.label in labels:
            raise UsageError(f"{place}: two keys are labelled {key.label}; give each its own label")
        secrets.add(key.secret)
        labels.add(key.label)


class Quota:
    """The rate limits of a key. A request is admitted while there are tokens left, however many it will use;
    the next ones wait until the excess is paid back.

    Args:
        key: with its limits.
        clock: seconds.
    """

    def __init__(self, key: Key, clock: Callable[[], float]) -> None:
        self._requests = None if key.rpm is None else Bucket(key.rpm / 60, key.rpm, clock)
        self._tokens = None if key.tpm is None else Bucket(key.tpm / 60, key.tpm, clock)

    def admit(self) -> tuple[str, float] | None:
        """Take one request, or return what is used up ("requests" or "tokens") and for how many seconds."""
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None and (wait := bucket.wait()) > 0:
                return name, wait
        if self._requests is not None:
            self._requests.take(1)
        return None

    def spend(self, num_tokens: int) -> None:
        """Take tokens, even more than there are."""
        if self._tokens is not None:
            self._tokens.take(num_tokens)


@dataclass(frozen=True)
class Holder:
    """The key of a request.

    Attributes:
        salt: separates its caches from those of other keys.
    """

    key: Key
    salt: str
    quota: Quota


class KeyRing:
    """The keys by their hashes; all comparisons take the same time."""

    def __init__(self, keys: Iterable[Key], clock: Callable[[], float] = monotonic) -> None:
        self._holders = {
            digest: Holder(key, digest.hex()[:32], Quota(key, clock))
            for key in keys
            for digest in [_digest(key.secret.encode())]
        }

    def __bool__(self) -> bool:
        return bool(self._holders)

    def find(self, headers: Headers) -> Holder | None:
        """The key that a request brings, if it is valid."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        mine = _digest(given.encode("latin-1", "replace"))
        found = None
        for digest, holder in self._holders.items():  # all of them, for constant time
            if hmac.compare_digest(digest, mine):
                found = holder
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(b"godwit api key\0" + key).digest()
