"""GGUF files of Gemma 4: what they say of the shape, what is refused, and the commands on a file and its folder."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType, GGUFReader

from gemma_wgpu.apps.cli import main
from gemma_wgpu.errors import ModelError
from gemma_wgpu.models.gemma4 import Gemma4Config, constants
from gemma_wgpu.tokens.vocabulary import Vocabulary
from gemma_wgpu.weights.opening import open_checkpoint
from tests.checkpoints import description, patch
from tests.reference.families import CONFIGS, write_gguf_of

# A GGUF has numbers in float32.
CONFIG = replace(Gemma4Config.from_hf(CONFIGS["gemma4"]), rms_norm_eps=float(np.float32(1e-6)))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf_of(tmp_path_factory.mktemp("gemma4") / "tiny.gguf", "gemma4")


@pytest.fixture(scope="module")
def metadata(gguf: Path) -> Mapping[str, object]:
    with open_checkpoint(gguf) as checkpoint:
        return checkpoint.metadata  # type: ignore[attr-defined]


def test_says_what_config_json_says(gguf: Path, tmp_path: Path) -> None:
    with open_checkpoint(gguf) as checkpoint:
        assert checkpoint.config == CONFIG
        assert Gemma4Config.from_hf(checkpoint.config.to_hf()) == CONFIG
        tokenizer = checkpoint.tokenizer()
    assert [tokenizer.decode([token]) for token in sorted(tokenizer.eos_ids)] == [
        "<eos>",
        "<|tool_response>",
        "<turn|>",
    ]


def test_networks_of_one_width(metadata: Mapping[str, object]) -> None:
    for widths in (256, [256] * 8):
        assert Gemma4Config.from_gguf({**metadata, "gemma4.feed_forward_length": widths}) == replace(
            CONFIG, use_double_wide_mlp=False
        )


def test_heads_by_layer_that_are_the_same(metadata: Mapping[str, object]) -> None:
    assert Gemma4Config.from_gguf({**metadata, "gemma4.attention.head_count_kv": np.ones(8, np.int32)}) == CONFIG


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "gemma3", "is 'gemma3'; only gemma4 can be run"),
        ("gemma4.expert_count", 128, "is set, which Gemma 4 language models do not do"),
        ("gemma4.block_count", None, "is missing; this is not a complete Gemma 4 model"),
        ("gemma4.attention.shared_kv_layers", 8, "is 8, not a whole number from 0 to 7"),
        ("gemma4.attention.shared_kv_layers", 7, "leaves a kind of layers without keys and values"),
        ("gemma4.attention.sliding_window_pattern", [True] * 7, "not a list of 8 numbers"),
        ("gemma4.attention.sliding_window_pattern", [False] + [True] * 7, "ends in a window, which no Gemma 4 does"),
        ("gemma4.feed_forward_length", [256] * 7 + [512], "not one width and perhaps twice that in the last layers"),
        ("gemma4.feed_forward_length", [256] * 5 + [384] * 3, "not one width and perhaps twice that"),
        ("gemma4.feed_forward_length", 100, "has 100; only multiples of 32 can be run"),
        ("gemma4.feed_forward_length", [0.5] * 8, "not whole numbers from 1 to"),
        (
            "gemma4.attention.head_count_kv",
            [1, 1, 2, 1, 2, 1, 1, 2],
            "differs by layer, which only larger Gemma 4 do",
        ),
        ("gemma4.attention.head_count_kv", 3, "is 8, not a multiple of gemma4.attention.head_count_kv 3"),
        ("gemma4.attention.key_length", 63, "is 63; rotary embedding needs an even number"),
        ("gemma4.attention.key_length_swa", None, "is missing"),
        ("gemma4.rope.dimension_count", 32, "is not 128, the size of these layers' heads"),
        ("gemma4.embedding_length_per_layer_input", 0, "is 0, not a whole number from 1"),
        ("gemma4.final_logit_softcapping", None, "is missing"),
    ],
)
def test_metadata_that_are_refused(metadata: Mapping[str, object], key: str, value: object, message: str) -> None:
    changed = {**metadata, key: value}
    with pytest.raises(ModelError) as caught:
        Gemma4Config.from_gguf(changed, source="tiny.gguf")
    text = str(caught.value)
    assert text.startswith("tiny.gguf: ") and message in text and key in text


def test_the_part_of_a_head_that_is_turned_is_checked(gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "turned.gguf"
    [tensor] = [tensor for tensor in GGUFReader(gguf).tensors if tensor.name == "rope_freqs.weight"]
    assert np.array_equal(tensor.data, constants(CONFIG)["rope_freqs.weight"])
    path.write_bytes(gguf.read_bytes())
    patch(path, int(tensor.data_offset) + 16 * 4, np.float32(1).tobytes())  # one pair more
    with pytest.raises(ModelError, match=r"tensor 'rope_freqs.weight' is not what Gemma 4 has there"):
        open_checkpoint(path)
    path.write_bytes(gguf.read_bytes())
    patch(path, description(path, "rope_freqs.weight") + 12, GGMLQuantizationType.Q4_0.to_bytes(4, "little"))
    with pytest.raises(ModelError, match="rope_freqs"):
        open_checkpoint(path)


def run(*command: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    return result.output


def test_commands(gguf: Path, tmp_path: Path) -> None:
    folder, text = tmp_path / "folder", tmp_path / "text"
    text.write_text("the thought of the model " * 6)
    run("convert", gguf, folder, "--quant", "keep")
    manifest = Vocabulary.from_bytes((folder / "vocabulary.bin").read_bytes(), "vocabulary").tokenizer("vocabulary")
    with open_checkpoint(gguf) as checkpoint:
        assert manifest.encode(text.read_text()) == checkpoint.tokenizer().encode(text.read_text())
        assert manifest.control_ids == checkpoint.tokenizer().control_ids
    shown: dict[Path, list[Any]] = {}
    for model in (gguf, folder):
        inspected = run("inspect", model)
        assert "8, 5 of them with a window of 8, 3 without keys and values of their own" in inspected
        assert "8 of 64 and 128, 1 for keys and values" in inspected
        measured = run("evaluate", model, "--text", text, "--precision", "f32").splitlines()[1:]
        written = run("generate", "the", "--chat", "--model", model, "-q", "--temperature", 0, "--max-new-tokens", 4)
        shown[model] = [measured, written]
    assert shown[gguf] == shown[folder]
