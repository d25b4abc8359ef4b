"""The scripts beside the benchmark that write models: the models can be opened, and have the right weights."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import make_onnx, make_random
from gemma_wgpu.weights.checkpoint import Checkpoint
from gemma_wgpu.weights.opening import open_checkpoint
from tests.tiny import PIECES, TYPES
from tests.vocabulary import Vocabulary, tokenizer_json

SMALL = {"vocab_size": len(PIECES), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


@pytest.fixture
def random_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = make_random.CONFIG | SMALL
    monkeypatch.setattr(make_onnx, "CONFIG", config)
    folder = tmp_path / "random"
    make_random.write(folder, seed=0, config=config)
    vocabulary = Vocabulary(PIECES, -np.arange(len(PIECES), dtype=np.float32), np.array(TYPES, np.int32))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(vocabulary)))
    return folder


def weights(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {
        name: checkpoint.tensor(name).pack().dequantize() if spec.kind.is_matrix else checkpoint.values(name)
        for name, spec in checkpoint.table.items()
    }


def test_a_random_model(random_model: Path) -> None:
    with open_checkpoint(random_model) as checkpoint:
        assert checkpoint.config.num_hidden_layers == 2
        found = weights(checkpoint)
    for name, values in found.items():
        if values.ndim == 2:
            assert values.std() == pytest.approx(values.shape[1] ** -0.5, rel=0.1), name
        else:
            assert values.mean() == pytest.approx(1, abs=0.1), name
            assert values.std() == pytest.approx(0.1, rel=0.5), name


def test_what_the_builder_of_onnx_is_given(random_model: Path, tmp_path: Path) -> None:
    with open_checkpoint(random_model) as checkpoint:
        make_onnx.write_original(checkpoint, tmp_path / "original", random_model / "tokenizer.json")
        expected = weights(checkpoint)
    with open_checkpoint(tmp_path / "original") as checkpoint:
        found = weights(checkpoint)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert np.array_equal(values, expected[name]), name
