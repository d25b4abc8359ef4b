"""Whatever comes, the server answers as its published OpenAPI says.

Some bodies of requests are made by this description, and some against it.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gemma_wgpu import load
from tests.test_server import NAME, Served, serving
from tests.tiny_vision import write_sighted

pytestmark = pytest.mark.slow

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 100  # of each path


@pytest.fixture(scope="module")
def guessing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with load(write_sighted(tmp_path_factory.mktemp("guessing")), precision="f32") as gemma, serving(gemma) as served:
        yield served


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models/{model}")],
)
def test_whatever_is_sent(guessing: Served, method: str, path: str, mode: schemathesis.GenerationMode) -> None:
    """Send what the API describes, and what it does not."""
    described = mode is schemathesis.GenerationMode.POSITIVE
    api = schemathesis.openapi.from_url(f"{guessing.url}/openapi.json")
    statuses = Counter[int]()

    @given(case=api[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, derandomize=True, suppress_health_check=list(HealthCheck))
    def send(case: schemathesis.Case[Any]) -> None:
        body: Any = case.body
        if isinstance(body, dict) and isinstance(body.get("model"), str):
            body["model"] = NAME  # any other one is refused
        if described and isinstance(body, dict):
            for number, message in enumerate(body.get("messages", ())):
                message["role"] = ("user", "assistant")[number % 2]
        statuses[case.call_and_validate(checks=CHECKS).status_code] += 1

    send()
    if described and method == "POST":
        assert statuses[200] > EXAMPLES // 10
