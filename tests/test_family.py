"""A family that only these tests know: whatever loads, converts, generates and inspects reads its table alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from gemma_wgpu import Gemma, ModelError, load
from gemma_wgpu.apps.cli import main
from gemma_wgpu.models import registry
from gemma_wgpu.weights.convert import convert
from gemma_wgpu.weights.opening import open_checkpoint
from tests.checkpoints import Raw, write_gguf
from tests.looped import EPS, FAMILY, PASSES, LoopedConfig, tensors
from tests.tiny import BOS, PIECES, TYPES, metadata_of_tokens, write_folder

CONFIG = LoopedConfig(len(PIECES), 64, 96, 2, 2, 32, 200)
IDS = [BOS, *np.random.default_rng(5).integers(6, len(PIECES), 150).tolist()]
F32 = 1e-4  # of the largest logit

Floats = NDArray[np.float64]


def random_weights() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return {
        spec.name: rng.standard_normal(spec.shape, np.float32)
        * np.float32(spec.shape[1] ** -0.5 if spec.kind.is_matrix else 0.3)
        + np.float32(not spec.kind.is_matrix)
        for spec in tensors(CONFIG)
    }


WEIGHTS = random_weights()


def reference(ids: list[int], passes: int = PASSES) -> Floats:
    """The logits after each of `ids`, in numpy."""
    w = {name: values.astype(np.float64) for name, values in WEIGHTS.items()}
    n, heads, dim = len(ids), CONFIG.num_attention_heads, CONFIG.head_dim

    def norm(x: Floats, name: str) -> Floats:
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPS) * w[name]

    def rotate(x: Floats) -> Floats:
        angles = np.arange(n, dtype=np.float32)[:, None, None] * (5000.0 ** (-np.arange(0, dim, 2) / dim)).astype(
            "f4"
        )
        turned = (x[..., : dim // 2] + 1j * x[..., dim // 2 :]) * np.exp(1j * angles.astype(np.float64))
        return np.concatenate((turned.real, turned.imag), axis=-1)

    x = w["embed.weight"][ids]
    for layer in list(range(CONFIG.num_hidden_layers)) * passes:
        p = f"layers.{layer}."
        q, k, v = np.split((norm(x, p + "norm_in") @ w[p + "qkv"].T).reshape(n, 3 * heads, dim), 3, axis=1)
        scores = 0.3 * np.einsum("qhd,khd->hqk", rotate(norm(q, p + "norm_q")), rotate(norm(k, p + "norm_k")))
        scores[:, ~np.tri(n, dtype=bool)] = -np.inf
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        x = x + norm(np.einsum("hqk,khd->qhd", shares, v).reshape(n, -1) @ w[p + "o"].T, p + "norm_attn")
        gate, up = np.split(norm(x, p + "norm_ff") @ w[p + "gate_up"].T, 2, axis=1)
        gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        x = x + norm((gelu * up) @ w[p + "down"].T, p + "norm_out")
    return norm(x, "norm.weight") @ w["embed.weight"].T


EXPECTED = reference(IDS)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    registry.FAMILIES.append(FAMILY)
    yield
    registry.FAMILIES.remove(FAMILY)


@pytest.fixture(scope="module")
def folder(registered: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "looped"
    return write_folder(path, CONFIG.to_hf(), WEIGHTS, plus_one=False)


@pytest.fixture(scope="module")
def gemma(folder: Path) -> Iterator[Gemma]:
    with load(folder, precision="f32", prefill_chunk=64) as gemma:
        yield gemma


def error(logits: NDArray[np.float32], expected: Floats) -> float:
    return float(np.max(np.abs(logits - expected)) / np.max(np.abs(expected)))


def test_the_reference_notices_the_passes() -> None:
    assert error(reference(IDS, passes=1).astype(np.float32), EXPECTED) > 100 * F32


@pytest.mark.parametrize("chunk", [1, 64, 512])
def test_logits(folder: Path, chunk: int) -> None:
    with load(folder, precision="f32", prefill_chunk=chunk) as gemma:
        assert gemma.family is FAMILY
        assert isinstance(gemma.config, LoopedConfig) and gemma.config == CONFIG
        assert error(gemma.logits(IDS), EXPECTED) < F32


def test_texts(gemma: Gemma) -> None:
    """Alone, side by side, and from a session: each takes the likeliest."""
    prompts = [IDS[:5], IDS[:90], IDS[:12]]
    singles = [gemma.generate(prompt, temperature=0, max_new_tokens=12) for prompt in prompts]
    for prompt, single in zip(prompts, singles, strict=True):
        single.result()
        expected = reference([*prompt, *single.ids])[len(prompt) - 1 : -1]
        chosen = np.take_along_axis(expected, np.array(single.ids)[:, None], axis=1)[:, 0]
        assert np.all(chosen > expected.max(axis=1) - 1e-3)
    several = gemma.generate(prompts, temperature=0, max_new_tokens=12)
    several.result()
    assert several.ids == [single.ids for single in singles]


def test_a_session(gemma: Gemma, tmp_path: Path) -> None:
    gemma.reset()
    gemma.logits(IDS[:90], last=1)
    gemma.save_session(tmp_path / "session")
    gemma.reset()
    gemma.load_session(tmp_path / "session")
    generation = gemma.generate(IDS[:100], temperature=0, max_new_tokens=1)
    generation.result()
    assert generation.stats.reused_tokens == 90
    assert error(gemma.logits(IDS[:101], last=1), EXPECTED[100:101]) < F32


def test_a_model_folder(folder: Path, tmp_path: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        convert(checkpoint, tmp_path / "out", quant="f16")
    with load(tmp_path / "out", precision="f32") as gemma:
        away = error(gemma.logits(IDS), EXPECTED)
    assert F32 < away < 1e-2
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    assert "2, each of them 2 times" in shown.output


def test_a_gguf(tmp_path: Path) -> None:
    raw: dict[str, Raw] = {spec.gguf: (WEIGHTS[spec.name], Kind.F32) for spec in tensors(CONFIG)}
    metadata: dict[str, object] = {
        f"looped.{name}": value for name, value in vars(CONFIG).items() if name != "vocab_size"
    }
    write_gguf(tmp_path / "looped.gguf", metadata | metadata_of_tokens(), raw, architecture="looped")
    with load(tmp_path / "looped.gguf", precision="f32") as gemma:
        assert error(gemma.logits(IDS), EXPECTED) < F32


def test_it_is_unknown_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", [family for family in registry.FAMILIES if family is not FAMILY])
    known = "only gemma3, gemma3_text, gemma3n, gemma3n_text, gemma4 and gemma4_text can be run$"
    with pytest.raises(ModelError, match=f"config.json: model_type is 'looped'; {known}"):
        load(folder)


def test_it_is_one_short_file() -> None:
    assert len((Path(__file__).parent / "looped.py").read_text(encoding="utf-8").splitlines()) < 150
    assert len(TYPES) == len(PIECES)
