"""Limits of open connections, and which of them is closed to make room for another."""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import Protocol

from godwit.server.connections.deadlines import Deadlines
from godwit.server.limits import Limits

#: Connections beyond the limits that get a 503; more are cut at once.
MAX_REFUSED = 64


class Connection(Protocol):
    """A connection that takes a place."""

    deadlines: Deadlines

    def drop(self) -> None:
        """Cut the connection."""


class Places:
    """The places of connections. If all are taken, the one that has waited longest for a request is closed;
    so silent connections keep nobody out.

    Args:
        limits: of all connections, and of those from one address.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._open: dict[Connection, str] = {}
        self._counts: Counter[str] = Counter()
        self._refused: set[Connection] = set()

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, connection: Connection, address: str) -> bool | None:
        """Take a place. False: there is none, and the client gets a 503; None: cut the connection at once."""
        group = _group(address)
        if group and self._counts[group] >= self._limits.per_address and not self._make_room(group):
            return self._refuse(connection)
        if len(self._open) >= self._limits.connections and not self._make_room(None):
            return self._refuse(connection)
        self._open[connection] = group
        self._counts[group] += 1
        return True

    def leave(self, connection: Connection) -> None:
        """Give the place back, if the connection has one."""
        self._refused.discard(connection)
        if (group := self._open.pop(connection, None)) is not None:
            self._counts[group] -= 1
            if not self._counts[group]:
                del self._counts[group]

    def _refuse(self, connection: Connection) -> bool | None:
        if len(self._refused) >= MAX_REFUSED:
            return None
        self._refused.add(connection)
        return False

    def _make_room(self, group: str | None) -> bool:
        """Cut the connection of the group, or of all, that has waited longest. False: all are busy."""
        waiting = [
            connection
            for connection, own in self._open.items()
            if connection.deadlines.waiting and group in (None, own)
        ]
        if not waiting:
            return False
        oldest = min(waiting, key=lambda connection: connection.deadlines.since)
        self.leave(oldest)
        oldest.drop()
        return True


def _group(address: str) -> str:
    """What counts as one address; "" for this machine, which has no limit of its own."""
    try:
        known = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(known, ipaddress.IPv6Address) and known.ipv4_mapped is not None:
        known = known.ipv4_mapped
    if known.is_loopback:
        return ""
    if isinstance(known, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((known, 64), strict=False))
    return str(known)
