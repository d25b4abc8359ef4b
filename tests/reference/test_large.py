"""Layers of the shapes of the 4B, 12B and 27B with random weights against transformers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gemma_wgpu import load
from tests.reference.golden import F16_DIVERGENCE, FOLDER, divergence, largest_error
from tests.reference.large import LENGTHS, SIZES, ids, write

Report = Callable[[str], None]

F32_LOGITS = 1e-5  # of the largest logit


@pytest.mark.parametrize("size", SIZES)
def test_logits(size: str, tmp_path: Path, report: Report) -> None:
    with np.load(FOLDER / "large.npz") as recorded:
        positions, expected = recorded[f"{size}_positions"].tolist(), recorded[f"{size}_logits"]
    folder = write(tmp_path / size, size)
    with load(folder, precision="f32", context_length=LENGTHS[size]) as model:
        assert model.config.max_position_embeddings == 131_072
        logits = model.logits(ids(LENGTHS[size]).tolist())
    error = largest_error(logits[positions], expected) / np.abs(expected).max()
    report(f"{error:.1e} of the largest")
    assert error < F32_LOGITS
    if size == "4b":
        with load(folder, precision="f16", context_length=64) as model:
            logits = model.logits(ids(40).tolist())
        apart = max(divergence(logits[at], row) for at, row in zip(positions, expected, strict=True) if at < 40)
        report(f"divergence in F16 {apart:.1e}")
        assert apart < F16_DIVERGENCE
    (folder / "model.safetensors").unlink()
