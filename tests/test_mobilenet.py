"""The configuration of MobileNetV5, its table, and the stem's patches. What it computes: tests/reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gemma_wgpu.errors import ModelError
from gemma_wgpu.models.mobile_blocks import EdgeResidual, InvertedResidual, MobileAttention, parsed
from gemma_wgpu.models.mobilenet_v5 import MobileNetV5, MobileNetV5Config, tensors
from gemma_wgpu.models.spec import Kind
from tests.kernels.windows import windows

REAL: dict[str, Any] = {"vision_config": {"model_type": "gemma3n_vision", "architecture": "mobilenetv5_300m_enc"}}


def config(vision: dict[str, object] | None = None, **outer: object) -> MobileNetV5Config:
    built = MobileNetV5Config.from_hf(
        REAL | {"vision_config": REAL["vision_config"] | (vision or {})} | outer, "config.json", "Gemma 3n"
    )
    assert built
    return built


def test_the_encoder_is_the_real_one() -> None:
    """The count of parameters is timm's, and so are these shapes."""
    table = {spec.name: spec for spec in tensors(config(), 2048)}
    tower = "model.vision_tower.timm_model."
    assert sum(spec.size for name, spec in table.items() if name.startswith(tower)) == 294_126_912
    assert all(spec.tower for spec in table.values())
    shapes = {
        "conv_stem.conv.weight": (64, 3, 3, 3),
        "blocks.0.1.conv_exp.weight": (512, 128, 3, 3),
        "blocks.1.0.dw_mid.conv.weight": (768, 1, 5, 5),
        "blocks.2.9.attn.key.down_conv.weight": (640, 1, 3, 3),
        "blocks.2.36.layer_scale.gamma": (640,),
        "blocks.3.1.attn.query.proj.weight": (1536, 1280, 1, 1),
        "blocks.3.38.pw_proj.conv.weight": (1280, 2560, 1, 1),
        "msfa.ffn.pw_proj.conv.weight": (2048, 3840, 1, 1),
    }
    assert {name: table[tower + name].shape for name in shapes} == shapes
    assert f"{tower}blocks.3.1.attn.key.down_conv.weight" not in table
    assert table[f"{tower}blocks.0.1.conv_exp.weight"].kind == Kind.CONVOLUTION
    assert table[f"{tower}blocks.0.1.conv_exp.weight"].gguf == "v.blk.0.1.conv_exp.weight"
    assert table[f"{tower}msfa.norm.weight"].gguf == "v.msfa.norm.weight"
    assert table["model.embed_vision.embedding_projection.weight"].shape == (2048, 2048)
    assert table["model.embed_vision.hard_embedding_norm.weight"].gguf == "mm.hard_emb_norm.weight"
    assert len(list(config().placed())) == 84
    assert [placed.side_out for placed in config().fused] == [48, 24]
    assert "768 x 768" in config().summary()["images"]


def test_no_tower() -> None:
    assert MobileNetV5Config.from_hf({"vision_config": None}, "config.json", "Gemma 3n") is None


@pytest.mark.parametrize(
    "vision",
    [{}, {"image_size": 64, "blocks": [["er_k3_s2_e1_c32"], ["uir_a0_k3_s2_e1_c64", "mqa_h1_d32_c64"]]}],
)
def test_what_is_written_is_read(vision: dict[str, object]) -> None:
    tokens = {"vision_soft_tokens_per_image": 16, "boi_token_id": 7, "eoi_token_id": 8, "image_token_id": 9}
    built = config({"hidden_size": 96, "vocab_size": 3, "vocab_offset": 40, "rms_norm_eps": 1e-5} | vision, **tokens)
    written = built.to_hf()
    assert MobileNetV5Config.from_hf(written, "config.json", "Gemma 3n") == built
    assert ("blocks" in written["vision_config"]) == bool(vision)  # type: ignore[operator]


def test_blocks_are_read() -> None:
    assert parsed("er_r2_k3_s2_e4_c128") == [EdgeResidual(3, 2, 4, 128), EdgeResidual(3, 1, 4, 128)]
    assert parsed("uir_r1_a5_k0_s1_e2_c64") == [InvertedResidual(5, 0, 1, 2, 64)]
    assert parsed("mqa_h12_v2_d64_c640") == [MobileAttention(h=12, d=64, c=640, k=3, v=2, s=1)]


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"model_type": "resnet"}, "vision_config.model_type is 'resnet'; only gemma3n_vision can be run"),
        ({"architecture": "resnet50"}, "architecture is 'resnet50'; only mobilenetv5_300m_enc can be run"),
        ({"blocks": "er"}, "blocks is 'er', not a list of two or more stages"),
        ({"blocks": [["er_k3_s2_e4_c32"], []]}, r"blocks has \[\], not a list of blocks"),
        ({"blocks": [["cn_k3_s2_c32"]] * 2}, "has 'cn_k3_s2_c32', which does not begin with er_, uir_ or mqa_"),
        ({"blocks": [["er_k3_s2_c32"]] * 2}, "which has other numbers than this kind, which has k, s, e and c"),
        ({"blocks": [["er_k3_s2_e4_c30"]] * 2}, "which has channels that are not a multiple of 32"),
        ({"blocks": [["er_k4_s2_e4_c32"]] * 2}, "which has a kernel that is not 1, 3, 5 or 7"),
        ({"blocks": [["er_k3_s3_e4_c32"]] * 2}, "which has a stride that is not 1 or 2"),
        ({"blocks": [["er_k3_s2_e99_c32"]] * 2}, "which does not widen by 1 to 16"),
        ({"blocks": [["er_r0_k3_s2_e1_c32"]] * 2}, "which does not come 1 to 64 times"),
        ({"blocks": [["uir_a0_k0_s2_e1_c32"]] * 2}, "which has a stride and no kernel"),
        ({"blocks": [["mqa_h2_d48_c64"]] * 2}, "which has heads that are not of a multiple of 32"),
        ({"blocks": [["mqa_h2_s2_d32_c64"]] * 2}, "which is not an attention of one head or more, with s1"),
        ({"blocks": [["mqa_h2_d32_c64"]] * 2}, "begins with a block that adds what comes in"),
        ({"blocks": [["er_k3_s2_e1_c32"], ["mqa_h2_d32_c64"]]}, "has an attention of 64 channels behind 32"),
        ({"image_size": 100}, "image_size is 100; only multiples of 32 can be run"),
        ({"hidden_size": 2000}, "hidden_size is 2000; only multiples of 32 can be run"),
    ],
)
def test_what_cannot_be_run(vision: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        config(vision)


@pytest.mark.parametrize("count", [255, 49])
def test_tokens_that_pixels_do_not_average_to(count: int) -> None:
    with pytest.raises(ModelError, match=f"is {count}, which 48 x 48 pixels do not average to"):
        config(vision_soft_tokens_per_image=count)


def test_patches() -> None:
    tower = MobileNetV5(config({"image_size": 32}, vision_soft_tokens_per_image=4))
    pixels = np.random.default_rng(0).random((3, 32, 32), np.float32)
    patches = tower.patches(pixels)
    assert patches.dtype == np.float32
    assert np.array_equal(patches, windows(pixels.transpose(1, 2, 0), 3, 2).reshape(256, 27))
    assert tower.hard == range(262_144, 262_272)
    assert (tower.mean, tower.deviation, tower.image_size) == (0, 1, 32)
