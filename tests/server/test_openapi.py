"""The server's own description, and requests drawn from it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from godwit.server.app import ROUTES
from godwit.server.openapi import describe
from tests.server.conftest import Engines, Running, running

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from schemathesis import GenerationMode, checks
    from schemathesis.specs.openapi import checks as conformance

CHECKS: list[Any] = [
    checks.not_a_server_error,
    *(
        getattr(conformance, name)
        for name in (
            "status_code_conformance",
            "content_type_conformance",
            "response_schema_conformance",
            "negative_data_rejection",
        )
    ),
]
POSTS = [path for method, path, _ in ROUTES if method == "POST"]
HIDDEN = {"/openapi.json", "/v1/models/{model:path}"}


@pytest.fixture(scope="module")
def server(engines: Engines) -> Iterator[Running]:
    """A server whose answers end at once."""
    with running(engines("hello"), names=("*",), sampling={"max_tokens": 4}) as server:
        yield server


def test_every_route_is_described() -> None:
    described = {(method.upper(), path) for path, item in describe()["paths"].items() for method in item}
    assert described == {(method, path) for method, path, _ in ROUTES if path not in HIDDEN}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: str(mode.value))
@pytest.mark.parametrize("path", POSTS)
def test_requests_drawn_from_the_description(server: Running, path: str, mode: GenerationMode) -> None:
    operation = schemathesis.openapi.from_dict(describe())[path]["POST"]
    statuses = set()

    @settings(max_examples=8, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(mode))
    def send(case: Any) -> None:
        response = case.call(base_url=server.url)
        if response.status_code != 413:  # which the check of refusals does not know
            case.validate_response(response, checks=CHECKS)
        statuses.add(response.status_code)

    send()
    assert statuses
    assert mode is GenerationMode.POSITIVE or 200 not in statuses


@pytest.mark.parametrize("status", ["401", "403", "429"])
def test_refusals_are_described(status: str) -> None:
    operations = [operation for item in describe()["paths"].values() for operation in item.values()]
    assert operations and all(status in operation["responses"] for operation in operations)
