"""Request bodies by the published OpenAPI, and against it: whatever comes, the server answers as it says it does."""

from collections import Counter
from collections.abc import Iterator

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
from gemma_wgpu.models.config import Gemma3Config
from tests.test_server import NAME, Served, serving
from tests.tiny import HF, random_weights, write_folder

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 100  # of each path


@pytest.fixture(scope="module")
def guessing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = write_folder(tmp_path_factory.mktemp("guessing"), HF, random_weights(Gemma3Config.from_hf(HF)))
    with load(folder, precision="f32") as gemma, serving(gemma) as served:
        yield served


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models/{model}")],
)
def test_whatever_is_sent(guessing: Served, method: str, path: str, mode: schemathesis.GenerationMode) -> None:
    """What the API describes, and what it does not."""
    described = mode is schemathesis.GenerationMode.POSITIVE
    api = schemathesis.openapi.from_url(f"{guessing.url}/openapi.json")
    statuses = Counter[int]()

    @given(case=api[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
    )
    def send(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = NAME  # else it gets no further
        if described and isinstance(case.body, dict):
            for number, message in enumerate(case.body.get("messages", ())):
                message["role"] = ("user", "assistant")[number % 2]
        statuses[case.call_and_validate(checks=CHECKS).status_code] += 1

    send()
    if described and method == "POST":
        assert statuses[200] > EXAMPLES // 10
