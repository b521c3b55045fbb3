"""Every family once, in ``transformers`` and in Godwit."""

from __future__ import annotations

import re

import pytest

from tests.models.families import FAMILIES, Family
from tests.models.harness import Pair, make_pair


@pytest.fixture(scope="session", params=FAMILIES, ids=lambda family: family.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One set of random weights in both implementations."""
    pytest.importorskip("transformers", reason="the reference implementation is not installed")
    family: Family = request.param
    return make_pair(family, tmp_path_factory.mktemp(re.sub(r"\W", "_", family.name)))
