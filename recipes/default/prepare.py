"""Make the training data of the default model: `python recipes/default/prepare.py --data DIR --out DIR`."""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.default import chats, encode, smalltalk, storytelling, tools
from recipes.default import tokenizer as bpe
from recipes.default.common import Chat, held_out, read_jsonl

SMALLTALK = 24_000
HELD_OUT_PERCENT = 1.0
HELD_OUT_DIALOGUES = 300
HELD_OUT_QUESTIONS = 200
# A figure was dropped from the sentence and left "as shown in." behind.
LOST_FIGURE = re.compile(
    r" ?\((?:[^()]{0,40}\b)?in ?\)|,? (?:as )?(?:shown|illustrated|seen|depicted) in(?=[.,;])"
)
# Books of tales, and how a tale begins.
TALE_BOOK = re.compile(r"Fairy|Tale|Stories|Story|Wonder")
TALE = re.compile(
    r"(?i:once upon a time|there was once|there once|there lived once|long ago|once there)|There lived (?:a|an|in)\b"
)
CREDITS = re.compile(r"\n[* ]*Translated [Bb]y:.*")
BOOKS = ("gutenberg_simple-00", "gutenberg_simple-01")
Item = Chat | str


@dataclass(frozen=True)
class Source:
    """One set of documents: its name, its source files, their licence, and how to make it."""

    name: str
    files: tuple[str, ...]
    licence: str
    items: Callable[[], Iterable[Item]]

    @property
    def held_out(self) -> bool:
        """Whether it is for evaluation only."""
        return self.name.startswith("heldout")


class Recipe:
    """The sources of the default model, read from `data`; `limit`: records of each file, for a test run."""

    def __init__(self, data: Path, seed: int = 0, limit: int | None = None) -> None:
        self.data, self.seed, self.limit = data, seed, limit
        self.library = tools.Library.load(data)
        self.tool_sets = tools.tool_sets(self.library, random.Random(seed), 400)

    def read(self, *names: str) -> Iterator[dict[str, Any]]:
        """The records of the files `names`, in order."""
        for name in names:
            for record in read_jsonl(self.data / f"{name}.jsonl.xz", self.limit):
                if "text" in record:
                    record["text"] = CREDITS.sub("", LOST_FIGURE.sub("", record["text"]))
                yield record

    def texts(self, name: str, *, held: bool, titled: bool) -> Iterator[str]:
        """Plain text; whole books and articles are held out."""
        files = BOOKS if name == "books" else (name,)
        for record in self.read(*files):
            if record.get("split") == "val" or held_out(name + record["title"], HELD_OUT_PERCENT) != held:
                continue
            yield f"{record['title']}\n\n{record['text']}" if titled else record["text"]

    def held_out_text(self) -> Iterator[str]:
        """The held-out books, stories and articles, about one in a hundred."""
        yield from self.texts("books", held=True, titled=False)
        yield from self.texts("stories", held=True, titled=True)
        yield from self.texts("wikipedia", held=True, titled=True)

    def questions(self) -> list[list[list[chats.Pair]]]:
        """Trivia, words and countries."""
        return [
            list(chats.trivia(self.read("trivia_train"))),
            list(chats.wordnet(self.read("wordnet_chat"))),
            list(chats.factbook(self.read("factbook_chat"))),
        ]

    def small_talk(self) -> Iterator[Chat]:
        """Small talk with a little knowledge in it."""
        count = SMALLTALK if self.limit is None else min(SMALLTALK, self.limit)
        questions = [pairs for pool in self.questions()[1:] for pairs in pool]
        return smalltalk.smalltalk(self.seed, count, questions, self.tool_sets)

    def stories(self) -> list[dict[str, Any]]:
        """The stories for training, without duplicates."""
        seen: set[str] = set()
        kept = []
        for record in self.read("stories"):
            held = record.get("split") == "val" or held_out("stories" + record["title"], HELD_OUT_PERCENT)
            if not held and record["text"][:200] not in seen:
                seen.add(record["text"][:200])
                kept.append(record)
        for record in self.read(*BOOKS):
            tale = TALE_BOOK.search(record["title"]) and TALE.match(record["text"])
            if tale and not held_out("books" + record["title"], HELD_OUT_PERCENT):
                kept.append({**record, "title": ""})
        return kept

    def sources(self) -> list[Source]:
        """All sources, training sources first."""
        seed, read = self.seed, self.read
        train = ("sgd_train-00", "sgd_train-01")
        return [
            Source("books", BOOKS, "public domain in the USA", lambda: self.texts("books", held=False, titled=False)),
            Source("textbooks", ("openstax",), "CC BY 4.0", lambda: self.texts("openstax", held=False, titled=True)),
            Source("wikipedia", ("wikipedia",), "CC BY-SA 3.0", lambda: self.texts("wikipedia", held=False, titled=True)),
            Source("stories", ("stories",), "CC BY; Apache-2.0", lambda: self.texts("stories", held=False, titled=True)),
            Source("dialogues", (*train, "sgd_tools"), "CC BY-SA 4.0",
                   lambda: tools.dialogues(list(read(*train)), self.library, seed)),
            Source("orders", ("tm4_train",), "CC BY 4.0", lambda: tools.orders(read("tm4_train"), seed)),
            Source("smalltalk", ("wordnet_chat", "factbook_chat", "sgd_tools"), "own; CC BY 4.0; public domain; CC BY-SA 4.0",
                   self.small_talk),
            Source("qa", ("trivia_train", "wordnet_chat", "factbook_chat"), "CC BY-SA 4.0; CC BY 4.0; public domain",
                   lambda: chats.questions(self.questions(), seed, self.tool_sets)),
            Source("instruct", ("dolly_subset",), "CC BY-SA 3.0", lambda: chats.instructions(read("dolly_subset"), seed)),
            Source("reading", ("fairytale_qa_train",), "Apache-2.0", lambda: chats.reading(read("fairytale_qa_train"), seed)),
            Source("storytelling", ("stories", *BOOKS), "CC BY; Apache-2.0; public domain in the USA",
                   lambda: storytelling.storytelling(self.stories(), seed)),
            Source("heldout_text", (*BOOKS, "stories", "wikipedia"), "see the training sources", self.held_out_text),
            Source("heldout_dialogues", ("sgd_dev",), "CC BY-SA 4.0", lambda: (
                tools.plain_dialogue(record) for _, record in zip(range(HELD_OUT_DIALOGUES), read("sgd_dev"), strict=False))),
            Source("heldout_reading", ("fairytale_qa_dev",), "Apache-2.0", lambda: (
                chats.plain_reading(r) for _, r in zip(range(HELD_OUT_QUESTIONS), self.spread_questions(), strict=False))),
        ]  # fmt: skip

    def spread_questions(self) -> Iterator[dict[str, Any]]:
        """The held-out story questions in random order, so that any part of them covers all stories."""
        records = list(self.read("fairytale_qa_dev"))
        random.Random(0).shuffle(records)
        yield from (record for record in records if len(record["context"].split()) <= 400)


def show(console: Console, stats: dict[str, encode.Stats]) -> None:
    """A table of the sources written."""
    table = Table("source", "documents", "tokens", "learned tokens", "bytes a learned token")
    for name, s in stats.items():
        table.add_row(
            name, f"{s.docs:,}", f"{s.tokens:,}", f"{s.learned:,}", f"{s.text_bytes / max(1, s.learned):.2f}"
        )
    console.print(table)


def prepare(
    data: Path, out: Path, *, limit: int | None, seed: int, only: tuple[str, ...], processes: int
) -> None:
    """Write the tokenizer (if there is none) and every source to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    folder = out / "tokenizer"
    console = Console(stderr=True)
    if not (folder / "tokenizer.json").exists():
        with console.status("training the tokenizer"):
            bpe.build(data, folder, limit)
    recipe = Recipe(data, seed, limit)
    sources = [source for source in recipe.sources() if not only or source.name in only]
    meta_path = out / "meta.json"
    meta: dict[str, Any] = (
        json.loads(meta_path.read_text()) if only and meta_path.exists() else {"sources": {}}
    )
    stats: dict[str, encode.Stats] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[docs]} documents"),
        TimeElapsedColumn(),
    )
    with (
        encode.Workers(folder, processes=processes) as workers,
        Progress(*columns, console=console) as progress,
    ):
        for source in sources:
            task = progress.add_task(source.name, total=None, docs=0)

            def docs(items: Iterable[Item], task: Any = task) -> Iterator[encode.Doc]:
                for found in workers.encode(items):
                    yield from found
                    progress.update(task, docs=progress.tasks[task].fields["docs"] + len(found))

            stats[source.name] = encode.write(
                out, source.name, docs(source.items()), with_bytes=source.held_out
            )
            progress.update(task, total=1, completed=1)
            meta["sources"][source.name] = {
                **asdict(stats[source.name]),
                "licence": source.licence,
                "files": [name + ".jsonl.xz" for name in source.files],
                "held_out": source.held_out,
            }
    meta.update(seed=seed, limit=limit, max_tokens=encode.MAX_TOKENS, tokenizer="tokenizer")
    meta_path.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    show(Console(), stats)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the .jsonl.xz files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--limit", type=int, help="read only this many records of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="write only these sources")
    parser.add_argument("--processes", type=int, default=2)
    o = parser.parse_args()
    prepare(o.data, o.out, limit=o.limit, seed=o.seed, only=tuple(o.only), processes=o.processes)


if __name__ == "__main__":
    main()
