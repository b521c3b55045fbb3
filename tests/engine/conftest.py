"""What holds answers to forms, made once: it starts processes of its own."""

from __future__ import annotations

import pytest

from godwit.engine.constraint.constraints import Constraints
from godwit.text.tokenizer import Tokenizer
from tests.engine.forms import FOLDER


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(FOLDER)


@pytest.fixture(scope="session")
def forms(tokenizer: Tokenizer) -> Constraints:
    return Constraints(tokenizer, seconds=60)
