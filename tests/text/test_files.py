"""Reading a tokenizer from the files of a checkpoint, whole and damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from godwit.errors import CheckpointError, GodwitError, TemplateError
from godwit.text.tokenizer import Tokenizer

Make = Callable[[str], dict[str, Any]]


class TestFiles:
    @pytest.fixture(autouse=True)
    def _tokenizer(self, make: Make) -> None:
        self.raw = make("bytes")

    def write(self, folder: Path, **files: Any) -> Path:
        for name, content in {"tokenizer": self.raw, **files}.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
        return folder

    def test_everything_beside_it(self, tmp_path: Path) -> None:
        base = len(self.raw["model"]["vocab"])
        settings = {
            "eos_token": {"content": "<|im_end|>"},
            "bos_token": None,
            "chat_template": "{{ eos_token }}",
        }
        generation = {"eos_token_id": [base, 10**9], "temperature": 0.7, "top_k": 20, "do_sample": True}
        generation |= {"transformers_version": "5", "top_p": "odd"}
        config = {"eos_token_id": base + 1, "text_config": {"eos_token_id": 5}}
        tok = Tokenizer.from_dir(
            self.write(tmp_path, tokenizer_config=settings, generation_config=generation, config=config)
        )
        assert tok.stop_ids == {5, base, base + 1, base + 2}
        assert set(tok.stop_tokens) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>", tok.id_to_token(5)}
        assert tok.special_ids == {base, base + 1, base + 2}
        assert tok.generation_defaults == {"temperature": 0.7, "top_k": 20, "do_sample": True}
        assert tok.chat_template is not None
        assert tok.chat_template.render([]) == "<|im_end|>"

    def test_only_the_tokenizer(self, tmp_path: Path) -> None:
        tok = Tokenizer.from_dir(self.write(tmp_path))
        assert tok.chat_template is None
        assert not tok.stop_ids
        assert not tok.generation_defaults

    def test_which_template(self, tmp_path: Path) -> None:
        several = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
        several.append({"name": "tool_use", "template": "t"})
        self.write(tmp_path, tokenizer_config={"chat_template": several})
        template = Tokenizer.from_dir(tmp_path).chat_template
        assert template is not None
        assert template.render([]) == "d"
        assert template.render([], tools=[{"a": 1}]) == "t"
        (tmp_path / "chat_template.jinja").write_text("file")
        template = Tokenizer.from_dir(tmp_path).chat_template
        assert template is not None
        assert template.render([]) == "file"

    @pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config", "generation_config", "config"])
    @pytest.mark.parametrize("content", ["{", "[]", "", '{"a": ' * 50_000, "\x00"])
    def test_broken_files_are_named(self, tmp_path: Path, name: str, content: str) -> None:
        self.write(tmp_path, **{name: content})
        with pytest.raises(CheckpointError, match=rf"{name}\.json"):
            Tokenizer.from_dir(tmp_path, trusted=True)

    def test_files_in_memory_are_read_alike(self, tmp_path: Path) -> None:
        settings = {"eos_token": "<|im_end|>", "chat_template": "{{ eos_token }}"}
        self.write(tmp_path, tokenizer_config=settings, generation_config={"top_k": 5})
        files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        tok, same = Tokenizer.from_dir(tmp_path), Tokenizer.from_files(files, "model.godwit")
        assert tok.chat_template is not None and same.chat_template is not None
        assert same.chat_template.source == tok.chat_template.source
        assert (same.stop_ids, same.generation_defaults) == (tok.stop_ids, {"top_k": 5})
        assert same.encode("a b") == tok.encode("a b")
        for name, content, message in (
            ("tokenizer.json", b"[]", "does not hold a JSON object"),
            ("config.json", b"\xff", "cannot be read"),
            ("config.json", b" " * ((16 << 20) + 1), "larger than 16 MiB"),
        ):
            with pytest.raises(CheckpointError, match=rf"^model\.godwit/{name}.* {message}"):
                Tokenizer.from_files({**files, name: content}, "model.godwit")
        with pytest.raises(CheckpointError, match=r"model\.godwit has no tokenizer"):
            Tokenizer.from_files({}, "model.godwit")

    def test_not_text(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        (tmp_path / "config.json").write_bytes(b"\xff\xfe\xff")
        with pytest.raises(CheckpointError, match="cannot be read"):
            Tokenizer.from_dir(tmp_path)

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
            Tokenizer.from_dir(tmp_path)

    def test_oversized(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        with (tmp_path / "tokenizer.json").open("ab") as file:
            file.truncate((64 << 20) + 1)  # a hole: nothing is written
        with pytest.raises(CheckpointError, match="64 MiB"):
            Tokenizer.from_dir(tmp_path)

    def test_a_template_that_is_too_long(self, tmp_path: Path) -> None:
        self.write(tmp_path, tokenizer_config={"chat_template": "x" * ((1 << 20) + 1)})
        with pytest.raises(TemplateError, match="longer than"):
            Tokenizer.from_dir(tmp_path)

    def test_any_damage_is_an_error_of_ours(self, make: Make) -> None:
        """Whatever part of a tokenizer.json is replaced, it works or raises GodwitError."""
        values: list[Any] = [None, -1, "x", [], {}, [1], 1e300, True]
        for path in list(paths(make("bytes"))):
            for value in values:
                raw = make("bytes")
                target = raw
                for key in path[:-1]:
                    target = target[key]
                target[path[-1]] = value
                try:
                    Tokenizer(raw).encode("the <|im_end|> dog")
                except GodwitError:
                    continue


def paths(value: Any, start: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places in a nested value; of the long tables only the first entries."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, item in items[:20]:
        yield (*start, key)
        if isinstance(item, (dict, list)):
            yield from list(paths(item, (*start, key)))[:40]
