"""The example for Ray Data runs on a cluster of this machine, with two workers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from click.testing import CliRunner

from examples.ray_batch import main
from gemma_wgpu import load
from gemma_wgpu.models.gemma3 import Gemma3Config
from tests.tiny import HF, random_weights, write_folder

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_prompts_on_two_workers(cluster: None, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", HF, random_weights(Gemma3Config.from_hf(HF)))
    prompts = [" ".join(["the cat"] * (i % 5 + 1)) for i in range(23)]
    path, answers = tmp_path / "prompts.jsonl", tmp_path / "answers"
    path.write_text("".join(json.dumps({"id": i, "prompt": prompt}) + "\n" for i, prompt in enumerate(prompts)))
    options = ["--model", str(folder), "--actors", "2", "--gpus", "0", "--max-new-tokens", "9", "--batch-size", "2"]
    result = CliRunner().invoke(main, [str(path), str(answers), *options], catch_exceptions=False)
    assert result.exit_code == 0
    lines = [json.loads(line) for file in answers.glob("*.json*") for line in file.read_text().splitlines()]
    with load(folder) as gemma:
        expected = gemma.generate(prompts, max_new_tokens=9, temperature=0)
        texts = expected.result()
    assert sorted(line["id"] for line in lines) == list(range(23))
    for line in lines:
        assert line["prompt"] == prompts[line["id"]]
        assert line["text"] == texts[line["id"]]
        assert line["finish_reason"] == expected.stats[line["id"]].finish_reason
