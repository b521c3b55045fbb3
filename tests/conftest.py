"""What all tests share."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent

# The models of the tests are small: more threads would only wait for each other.
torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The project's shared files (real tokenizers, reference logits), which do not travel with the code."""
    path = Path(os.environ.get("GODWIT_SHARED") or REPOSITORY.parent / "shared")
    if not path.is_dir():
        pytest.skip(f"needs the shared files; {path} is absent (GODWIT_SHARED names another place)")
    return path


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers for a test whichever tests run before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_configure() -> None:
    """Hear Ctrl-C also where the runner was started in the background, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """At the end, how many tests were skipped for which reason."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", ()):
        where = report.longrepr  # file, line and reason, but for tests that are expected to fail
        reasons[str(where[2] if isinstance(where, tuple) else where).removeprefix("Skipped: ")] += 1
    if reasons:
        terminalreporter.section(f"{sum(reasons.values())} skipped")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:5} {reason}")
