"""DiskCatalog: which nodes the files of a disk cache hold."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from godwit.engine.cache.disk_file import SegmentHeader
from godwit.engine.cache.nodes import Node
from godwit.engine.cache.prefix import PrefixIndex
from godwit.models.batch import BLOCK_SIZE


@dataclass
class FileEntry:
    """What is known of a file.

    Attributes:
        root, parent, keys: as in its header.
        tail: tokens of its last node, if these are less than a block.
        state_bytes: 0 without a state.
        whole: whether it has logits, so that its text can be continued without another token.
        num_bytes: size of the file, approximately.
        written: False while it waits to be written.
    """

    root: bytes
    parent: bytes
    keys: list[bytes]
    tail: tuple[int, ...]
    state_bytes: int
    whole: bool
    num_bytes: int
    written: bool

    @property
    def before_last(self) -> bytes:
        """Key of the node above the last one."""
        return self.keys[-2] if len(self.keys) > 1 else self.parent


class DiskCatalog:
    """The files of a disk cache by name, and the nodes in them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, FileEntry] = {}
        self._file_of: dict[bytes, str] = {}  # key of a node -> name of a file that holds it
        self._tails: dict[bytes, dict[tuple[int, ...], str]] = {}  # node above, tokens of a partial node

    def __getitem__(self, name: str) -> FileEntry:
        return self._entries[name]

    def add(self, header: SegmentHeader, num_bytes: int, *, written: bool) -> None:
        name = header.file_name
        tail = header.tokens[-1] if len(header.tokens[-1]) < BLOCK_SIZE else ()
        state, logits = header.state_bytes, header.has_logits
        entry = FileEntry(header.root, header.parent, header.keys, tail, state, logits, num_bytes, written)
        with self._lock:
            self._entries[name] = entry
            for key in entry.keys:
                self._file_of.setdefault(key, name)
            if state:
                self._file_of[entry.keys[-1]] = name
            if tail:
                self._tails.setdefault(entry.before_last, {})[tail] = name

    def mark_written(self, name: str) -> None:
        with self._lock:
            if name in self._entries:
                self._entries[name].written = True

    def forget(self, name: str) -> None:
        with self._lock:
            entry = self._entries.pop(name, None)
            if entry is None:
                return
            for key in entry.keys:
                if self._file_of.get(key) == name:
                    del self._file_of[key]
            tails = self._tails.get(entry.before_last, {})
            if tails.get(entry.tail) == name:
                del tails[entry.tail]

    def orphans(self) -> list[str]:
        """Files whose parent is in no file."""
        return [n for n, e in self._entries.items() if e.parent != e.root and e.parent not in self._file_of]

    def files_of(self, nodes: Iterable[Node]) -> list[str]:
        """The files that hold these nodes."""
        with self._lock:
            found = (self._file_of.get(node.key) for node in nodes)
            return list(dict.fromkeys(name for name in found if name))

    def unsaved(self, end: Node) -> list[Node]:
        """``end`` and the nodes above it, up to one that a file holds; empty if there is nothing to write."""
        with self._lock:
            name = self._file_of.get(end.key)
            known = None if name is None else self._entries[name]
            if known and (end.snapshot is None or (known.state_bytes and known.keys[-1] == end.key)):
                return []
            nodes = [end]
            while (above := nodes[-1].parent) and above.parent and above.key not in self._file_of:
                nodes.append(above)
            return nodes[::-1]

    def fitting(self, num_blocks: int, num_bytes: int) -> list[str]:
        """Files in the order of their entry, as far as blocks and states fit; each after its parent."""
        chosen: dict[str, None] = {}
        for name in self._entries:
            line = self._line(name, chosen)
            num_blocks -= sum(len(self._entries[one].keys) for one in line)
            num_bytes -= sum(self._entries[one].state_bytes for one in line)
            if num_blocks < 0 or num_bytes < 0:
                break
            chosen |= dict.fromkeys(line)
        return list(chosen)

    def _line(self, name: str, chosen: dict[str, None]) -> list[str]:
        """A file and those before it that are not chosen yet, the first one first."""
        line: dict[str, None] = {}
        above: str | None = name
        while above and above not in chosen and above not in line:
            line[above] = None
            above = self._file_of.get(self._entries[above].parent)
        return list(line)[::-1]

    def find(
        self, ids: Sequence[int], root: bytes, chain: Sequence[bytes], least: int, index: PrefixIndex
    ) -> list[str]:
        """The files that the index lacks to resume ``ids`` as late as possible; each after its parent.

        Args:
            least: the first position that is worth it.
        """
        path: dict[str, None] = {}
        best: list[str] = []
        with self._lock:
            for place, key in enumerate((root, *chain)):
                name = self._file_of.get(key)
                if place and (name is None or not self._entries[name].written):
                    break
                ends = self._ends(ids, place * BLOCK_SIZE, key)
                if place and name is not None:
                    path[name] = None
                    if not index.recurrent or self._entries[name].keys[-1] == key:
                        ends.insert(0, (place * BLOCK_SIZE, name))
                for end, last in ends:
                    if least <= end < len(ids) + self._entries[last].whole and self._resumes(last, index):
                        best, least = list(dict.fromkeys((*path, last))), end + 1
            return [n for n in best if n == best[-1] or not index.contains(self._entries[n].keys)]

    def _ends(self, ids: Sequence[int], start: int, key: bytes) -> list[tuple[int, str]]:
        """Positions less than a block after the node ``key`` at which files end, and their names."""
        tails = self._tails.get(key)
        if not tails:
            return []
        longest = min(BLOCK_SIZE - 1, len(ids) - start)
        names = [(end, tails.get(tuple(ids[start:end]))) for end in range(start + 1, start + longest + 1)]
        return [(end, name) for end, name in names if name and self._entries[name].written]

    def _resumes(self, name: str, index: PrefixIndex) -> bool:
        return not index.recurrent or 0 < self._entries[name].state_bytes <= index.max_bytes
