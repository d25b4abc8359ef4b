"""MobileNetV5, the vision tower of Gemma 3n: the encoder that timm calls mobilenetv5_300m_enc.

It is made of the blocks of MobileNetV4 (arXiv 2404.10518). The images of the last two stages, a fine and a coarse
one, are fused, averaged and projected into the space of the language model's embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.models import multimodal_embedder
from gemma_wgpu.models.keys import Keys, shown
from gemma_wgpu.models.mobile_blocks import EdgeResidual, InvertedResidual, MobileAttention, Placed, parsed
from gemma_wgpu.models.multimodal_embedder import MultimodalEmbedder
from gemma_wgpu.models.spec import Kind, Loader, TensorSpec, VisionModel
from gemma_wgpu.ops import convolution
from gemma_wgpu.ops.convolution import Convolution, Depthwise, Image
from gemma_wgpu.ops.encoder import EncoderStep
from gemma_wgpu.ops.launch import Value
from gemma_wgpu.ops.linear import Linear
from gemma_wgpu.ops.step import Norm
from gemma_wgpu.tokens.chat import MediumTokens

ARCHITECTURE = "mobilenetv5_300m_enc"
TOWER = "model.vision_tower.timm_model."

_ATTEND_FINE = ("mqa_r1_k3_h12_v2_s1_d64_c640", "uir_r1_a0_k0_s1_e2_c640")
_ATTEND_COARSE = ("mqa_r1_k3_h16_s1_d96_c1280", "uir_r1_a0_k0_s1_e2_c1280")
# The stages of the encoder, as mobile_blocks.py reads them. Each halves the sides of the image, and so does the stem.
STAGES: tuple[tuple[str, ...], ...] = (
    ("er_r1_k3_s2_e4_c128", *2 * ("er_r1_k3_s1_e4_c128",)),
    ("uir_r1_a3_k5_s2_e6_c256", *2 * ("uir_r1_a5_k0_s1_e4_c256", "uir_r1_a3_k0_s1_e4_c256")),
    (
        "uir_r1_a5_k5_s2_e6_c640",
        *7 * ("uir_r1_a5_k0_s1_e4_c640",),
        "uir_r1_a0_k0_s1_e1_c640",
        *14 * _ATTEND_FINE,
    ),
    ("uir_r1_a5_k5_s2_e6_c1280", *19 * _ATTEND_COARSE),
)
STEM_SIZE = 64
IMAGE_SIZE = 768

_EPS = 1e-6  # of all norms but those of the embedder
_STEM_KERNEL = 3
_FUSED_EXPANSION = 2
_LAUNCHES_TO_PAUSE = 30


@dataclass(frozen=True)
class MobileNetV5Config:
    """The shape of a tower. Names, meanings and defaults are those of Hugging Face's Gemma3nVisionConfig.

    Beside those, files have `blocks`, `stem_size` and `image_size` if they are not the encoder's. `tokens` says how
    an image stands in a prompt. The `vocab_size` ids from `vocab_offset` on have vectors of the tower's own.
    """

    hidden_size: int
    vocab_size: int
    vocab_offset: int
    rms_norm_eps: float
    blocks: tuple[tuple[str, ...], ...]
    stem_size: int
    image_size: int
    tokens: MediumTokens

    @classmethod
    def from_hf(cls, config: Mapping[str, object], source: str, family: str) -> Self | None:
        """Read the keys of a multimodal config.json; return None if there is no `vision_config`.

        Raises ModelError, which names `source` and the key.
        """
        if config.get("vision_config") is None:
            return None
        outer = Keys(config, source, family)
        keys = outer.inner("vision_config")
        for key, default in (("model_type", "gemma3n_vision"), ("architecture", ARCHITECTURE)):
            if keys.get(key, default) != default:
                raise keys.error(key, f"is {shown(keys.get(key))}; only {default} can be run")
        built = cls(
            hidden_size=keys.size("hidden_size", 2048),
            vocab_size=keys.count("vocab_size", 128),
            vocab_offset=keys.count("vocab_offset", 262_144),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
            blocks=_blocks(keys),
            stem_size=keys.size("stem_size", STEM_SIZE),
            image_size=keys.count("image_size", IMAGE_SIZE, most=1 << 11),
            tokens=MediumTokens(
                begin=outer.count("boi_token_id", 255_999),
                soft=outer.count("image_token_id", 262_145),
                end=outer.count("eoi_token_id", 262_144),
                count=outer.count("vision_soft_tokens_per_image", 256),
            ),
        )
        placed = list(built.placed())
        strides = 2 * math.prod(each.block.s for each in placed)
        if built.image_size % strides:
            raise keys.error("image_size", f"is {built.image_size}; only multiples of {strides} can be run")
        if placed[0].skips:
            raise keys.error("blocks", "begins with a block that adds what comes in, which only later ones can")
        for each in placed:
            if isinstance(each.block, MobileAttention) and not each.skips:
                raise keys.error("blocks", f"has an attention of {each.block.c} channels behind {each.channels}")
        fine, side = built.fused[0].side_out, math.isqrt(built.tokens.count)
        if side**2 != built.tokens.count or fine % side:
            problem = f"is {built.tokens.count}, which {fine} x {fine} pixels do not average to"
            raise outer.error("vision_soft_tokens_per_image", problem)
        return built

    def to_hf(self) -> dict[str, object]:
        """Return the keys of a multimodal config.json that `from_hf` and transformers read, without `text_config`."""
        vision: dict[str, object] = {
            "model_type": "gemma3n_vision",
            "architecture": ARCHITECTURE,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "vocab_offset": self.vocab_offset,
            "rms_norm_eps": self.rms_norm_eps,
        }
        if (self.blocks, self.stem_size, self.image_size) != (STAGES, STEM_SIZE, IMAGE_SIZE):
            vision["blocks"] = [list(stage) for stage in self.blocks]
            vision |= {"stem_size": self.stem_size, "image_size": self.image_size}
        return {
            "vision_config": vision,
            "boi_token_id": self.tokens.begin,
            "image_token_id": self.tokens.soft,
            "eoi_token_id": self.tokens.end,
            "vision_soft_tokens_per_image": self.tokens.count,
        }

    def summary(self) -> dict[str, str]:
        """Return what people want to know of the shape, by name."""
        placed = list(self.placed())
        return {
            "images": f"{self.image_size} x {self.image_size} pixels become {self.tokens.count} tokens, in "
            f"{len(placed)} blocks of {placed[0].block.c} to {placed[-1].block.c} channels"
        }

    def stages(self) -> list[list[Placed]]:
        """Return the blocks of each stage, with their places."""
        stages: list[list[Placed]] = []
        side, channels = -(-self.image_size // 2), self.stem_size
        for number, texts in enumerate(self.blocks):
            stage: list[Placed] = []
            for index, block in enumerate(block for text in texts for block in parsed(text)):
                placed = Placed(block, f"{TOWER}blocks.{number}.{index}.", side, channels)
                side, channels = placed.side_out, block.c
                stage.append(placed)
            stages.append(stage)
        return stages

    def placed(self) -> Iterator[Placed]:
        """Yield all blocks, in order."""
        for stage in self.stages():
            yield from stage

    @property
    def fused(self) -> tuple[Placed, Placed]:
        """Return the blocks whose images are fused: the last ones of the last two stages."""
        fine, coarse = self.stages()[-2:]
        return fine[-1], coarse[-1]


def _blocks(keys: Keys) -> tuple[tuple[str, ...], ...]:
    """Return the texts of the blocks of each stage, checked."""
    stages = keys.get("blocks", STAGES)
    if not isinstance(stages, Sequence) or isinstance(stages, str) or len(stages) < 2:
        raise keys.error("blocks", f"is {shown(stages)}, not a list of two or more stages")
    for stage in stages:
        if not isinstance(stage, Sequence) or isinstance(stage, str) or not stage or len(stage) > 1 << 10:
            raise keys.error("blocks", f"has {shown(stage)}, not a list of blocks")
        for text in stage:
            try:
                parsed(str(text))
            except ValueError as problem:
                raise keys.error("blocks", f"has {shown(text)}, which {problem}") from None
    return tuple(tuple(stage) for stage in stages)


def tensors(config: MobileNetV5Config, text_hidden_size: int) -> list[TensorSpec]:
    """Return the table of the tower and its embedder, in the order in which they are used."""
    stem, fused = config.stem_size, config.fused
    joined = sum(placed.block.c for placed in fused)
    wide = _FUSED_EXPANSION * joined
    table: list[_Entry] = [
        (f"{TOWER}conv_stem.conv.weight", (stem, 3, _STEM_KERNEL, _STEM_KERNEL), Kind.CONVOLUTION),
        (f"{TOWER}conv_stem.conv.bias", (stem,), Kind.BIAS),
        (f"{TOWER}conv_stem.bn.weight", (stem,), Kind.NORM),
        *(entry for placed in config.placed() for entry in _block_tensors(placed)),
        *_pointwise(f"{TOWER}msfa.ffn.pw_exp.", wide, joined),
        *_pointwise(f"{TOWER}msfa.ffn.pw_proj.", config.hidden_size, wide),
        (f"{TOWER}msfa.norm.weight", (config.hidden_size,), Kind.NORM),
    ]
    return [
        *(TensorSpec(name, _gguf(name), shape, kind, tower=True) for name, shape, kind in table),
        *MultimodalEmbedder.tensors(
            multimodal_embedder.VISION, config.vocab_size, config.hidden_size, text_hidden_size
        ),
    ]


_Entry = tuple[str, tuple[int, ...], Kind]


def _gguf(name: str) -> str:
    return name.replace(f"{TOWER}blocks.", "v.blk.").replace(TOWER, "v.")


def _pointwise(name: str, rows: int, cols: int) -> list[_Entry]:
    return [(f"{name}conv.weight", (rows, cols, 1, 1), Kind.MATRIX), (f"{name}bn.weight", (rows,), Kind.NORM)]


def _channelwise(name: str, channels: int, kernel: int) -> list[_Entry]:
    if not kernel:
        return []
    shape = (channels, 1, kernel, kernel)
    return [(f"{name}conv.weight", shape, Kind.DEPTHWISE), (f"{name}bn.weight", (channels,), Kind.NORM)]


def _block_tensors(placed: Placed) -> list[_Entry]:
    block, name, channels, wide = placed.block, placed.name, placed.channels, placed.wide
    gamma = (f"{name}layer_scale.gamma", (block.c,), Kind.NORM)
    if isinstance(block, EdgeResidual):
        return [
            (f"{name}conv_exp.weight", (wide, channels, block.k, block.k), Kind.CONVOLUTION),
            (f"{name}bn1.weight", (wide,), Kind.NORM),
            (f"{name}conv_pwl.weight", (block.c, wide, 1, 1), Kind.MATRIX),
            (f"{name}bn2.weight", (block.c,), Kind.NORM),
        ]
    if isinstance(block, InvertedResidual):
        return [
            *_channelwise(f"{name}dw_start.", channels, block.a),
            *_pointwise(f"{name}pw_exp.", wide, channels),
            *_channelwise(f"{name}dw_mid.", wide, block.k),
            *_pointwise(f"{name}pw_proj.", block.c, wide),
            gamma,
        ]
    table: list[_Entry] = [
        (f"{name}norm.weight", (channels,), Kind.NORM),
        (f"{name}attn.query.proj.weight", (wide, channels, 1, 1), Kind.MATRIX),
    ]
    for part in ("key", "value"):
        if block.v > 1:
            down = (channels, 1, block.k, block.k)
            table.append((f"{name}attn.{part}.down_conv.weight", down, Kind.DEPTHWISE))
            table.append((f"{name}attn.{part}.norm.weight", (channels,), Kind.NORM))
        table.append((f"{name}attn.{part}.proj.weight", (block.d, channels, 1, 1), Kind.MATRIX))
    return [*table, (f"{name}attn.output.proj.weight", (block.c, wide, 1, 1), Kind.MATRIX), gamma]


@dataclass(frozen=True, eq=False)
class Channelwise:
    """A depthwise convolution and the norm behind it."""

    conv: Depthwise
    norm: Norm


@dataclass(frozen=True, eq=False)
class Edge:
    """The weights of an EdgeResidual."""

    conv_exp: Convolution
    bn1: Norm
    conv_pwl: Linear
    bn2: Norm


@dataclass(frozen=True, eq=False)
class Inverted:
    """The weights of an InvertedResidual. The layer scale is in the last norm."""

    dw_start: Channelwise | None
    pw_exp: Linear
    pw_exp_norm: Norm
    dw_mid: Channelwise | None
    pw_proj: Linear
    pw_proj_norm: Norm


@dataclass(frozen=True, eq=False)
class Projection:
    """What makes keys or values of an image, which may be reduced before that."""

    down: Channelwise | None
    proj: Linear


@dataclass(frozen=True, eq=False)
class Attention:
    """The weights of a MobileAttention. `gamma` is the layer scale."""

    norm: Norm
    query: Linear
    key: Projection
    value: Projection
    output: Linear
    gamma: Norm


class _Weights:
    """Loads the weights of blocks, in the order of the table."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    async def norm(self, name: str) -> Norm:
        return await self.loader.norm(f"{name}.weight", _EPS)

    async def linear(self, name: str) -> Linear:
        return await self.loader.linear(f"{name}.weight")

    async def channelwise(self, conv: str, norm: str, kernel: int, stride: int) -> Channelwise | None:
        if not kernel:
            return None
        weight = await self.loader.depthwise(f"{conv}.weight")
        return Channelwise(Depthwise(weight, kernel, stride), await self.norm(norm))

    async def gamma(self, name: str, norm: Norm | None = None) -> Norm:
        """Return a layer scale as a norm, or the norm before it times that."""
        gamma = await self.loader.norm(f"{name}layer_scale.gamma", _EPS)
        return gamma if norm is None else Norm(norm.weight * gamma.weight, norm.eps)

    async def block(self, placed: Placed) -> Edge | Inverted | Attention:
        block, name = placed.block, placed.name
        if isinstance(block, EdgeResidual):
            return Edge(
                conv_exp=Convolution(await self.linear(f"{name}conv_exp"), block.k, block.s),
                bn1=await self.norm(f"{name}bn1"),
                conv_pwl=await self.linear(f"{name}conv_pwl"),
                bn2=await self.norm(f"{name}bn2"),
            )
        if isinstance(block, InvertedResidual):
            start, middle = f"{name}dw_start", f"{name}dw_mid"
            return Inverted(
                # The stride is that of the middle, if there is one.
                dw_start=await self.channelwise(f"{start}.conv", f"{start}.bn", block.a, 1 if block.k else block.s),
                pw_exp=await self.linear(f"{name}pw_exp.conv"),
                pw_exp_norm=await self.norm(f"{name}pw_exp.bn"),
                dw_mid=await self.channelwise(f"{middle}.conv", f"{middle}.bn", block.k, block.s),
                pw_proj=await self.linear(f"{name}pw_proj.conv"),
                pw_proj_norm=await self.gamma(name, await self.norm(f"{name}pw_proj.bn")),
            )
        return Attention(
            norm=await self.norm(f"{name}norm"),
            query=await self.linear(f"{name}attn.query.proj"),
            key=await self._projection(f"{name}attn.key", block),
            value=await self._projection(f"{name}attn.value", block),
            output=await self.linear(f"{name}attn.output.proj"),
            gamma=await self.gamma(name),
        )

    async def _projection(self, name: str, block: MobileAttention) -> Projection:
        kernel = block.k if block.v > 1 else 0
        down = await self.channelwise(f"{name}.down_conv", f"{name}.norm", kernel, block.v)
        return Projection(down, await self.linear(f"{name}.proj"))


class MobileNetV5(VisionModel):
    """A tower with its embedder and their weights."""

    mean = 0.0
    deviation = 1.0

    stem: Linear
    stem_norm: Norm
    stages: list[list[Edge | Inverted | Attention]]
    fused_exp: Linear
    fused_exp_norm: Norm
    fused_proj: Linear
    fused_proj_norm: Norm
    norm: Norm  # it multiplies the features by the square root of their size, too
    embedder: MultimodalEmbedder

    def __init__(self, config: MobileNetV5Config) -> None:
        self.config, self.tokens, self.image_size = config, config.tokens, config.image_size
        self.hard = range(config.vocab_offset, config.vocab_offset + config.vocab_size)

    @classmethod
    async def load(cls, config: MobileNetV5Config, loader: Loader) -> MobileNetV5:
        """Load the weights, in the order of the table."""
        model, weights, msfa = cls(config), _Weights(loader), f"{TOWER}msfa."
        name = f"{TOWER}conv_stem."
        model.stem = await loader.linear(f"{name}conv.weight", biases=[f"{name}conv.bias"])
        model.stem_norm = await weights.norm(f"{name}bn")
        model.stages = [[await weights.block(placed) for placed in stage] for stage in config.stages()]
        model.fused_exp = await weights.linear(f"{msfa}ffn.pw_exp.conv")
        model.fused_exp_norm = await weights.norm(f"{msfa}ffn.pw_exp.bn")
        model.fused_proj = await weights.linear(f"{msfa}ffn.pw_proj.conv")
        model.fused_proj_norm = await weights.norm(f"{msfa}ffn.pw_proj.bn")
        norm = await weights.norm(f"{msfa}norm")
        model.norm = Norm(norm.weight * np.float32(config.hidden_size**0.5), norm.eps)
        model.embedder = await MultimodalEmbedder.load(loader, multimodal_embedder.VISION, config.rms_norm_eps)
        return model

    def patches(self, data: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what the stem sees of an image (3, image_size, image_size): (image_size^2 / 4, 27).

        Patches overlap. The end of rows and columns is padded by a zero, as TensorFlow's "same" does.
        """
        padded = np.pad(data, ((0, 0), (0, 1), (0, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (_STEM_KERNEL, _STEM_KERNEL), (1, 2))
        return windows[:, ::2, ::2].transpose(1, 2, 0, 3, 4).reshape(-1, 3 * _STEM_KERNEL**2)

    def forward(self, step: EncoderStep) -> Value:
        """Take an image's patches through the stages and the embedder."""
        return self.embedder.soft(step, self._fused(step, *self.images(step)[-2:]))

    def images(self, step: EncoderStep) -> list[Image]:
        """Take an image's patches through the stages; return what comes out of each."""
        h = convolution.norm(step, step.linear(self.stem, step.patches), self.stem_norm, gelu=True)
        x, images = Image(h, h), []
        for blocks, stage in zip(self.config.stages(), self.stages, strict=True):
            for placed, weights in zip(blocks, stage, strict=True):
                x = _block(step, placed, weights, x)
                if len(step.launches) >= (step.pauses or [0])[-1] + _LAUNCHES_TO_PAUSE:
                    step.pause()
            images.append(x)
        return images

    def hard_rows(self, step: EncoderStep) -> Value:
        """Return the vectors of the ids from `vocab_offset` on, float32 (vocab_size, hidden size of the text)."""
        return self.embedder.hard(step)

    def _fused(self, step: EncoderStep, fine: Image, coarse: Image) -> Value:
        """Fuse two scales, and average what comes of it: float32 (tokens.count, hidden_size)."""
        joined = convolution.join(step, fine, coarse)
        h = convolution.norm(step, step.linear(self.fused_exp, joined), self.fused_exp_norm, gelu=True)
        h = step.rms_norm(step.linear(self.fused_proj, h), self.fused_proj_norm, half=False)
        h = step.average_pool(h, fine.side // math.isqrt(self.tokens.count))
        return step.rms_norm(h, self.norm, half=False)


def _block(step: EncoderStep, placed: Placed, weights: Edge | Inverted | Attention, x: Image) -> Image:
    """Take an image through a block."""
    out = convolution.image(step, placed.side_out, placed.block.c)
    residual = x if placed.skips else None
    if isinstance(weights, Edge):
        _edge(step, placed, weights, x, residual, out)
    elif isinstance(weights, Inverted):
        h = step.linear(weights.pw_proj, _widened(step, placed, weights, x))
        convolution.end(step, h, weights.pw_proj_norm, out, residual=residual)
    else:
        h = step.linear(weights.output, _attended(step, weights, x))
        convolution.end(step, h, weights.gamma, out, residual=residual, normed=False)
    return out


def _edge(step: EncoderStep, placed: Placed, weights: Edge, x: Image, residual: Image | None, out: Image) -> None:
    """Take an image through an EdgeResidual, band by band."""
    seen = placed.channels * weights.conv_exp.kernel**2 * x.half.itemsize
    for band in convolution.bands(placed.side_out, seen + 4 * placed.wide):
        h = convolution.convolve(step, weights.conv_exp, x.half, band)
        h = step.linear(weights.conv_pwl, convolution.norm(step, h, weights.bn1, gelu=True))
        convolution.end(step, h, weights.bn2, out, residual=residual, band=band)


def _widened(step: EncoderStep, placed: Placed, weights: Inverted, x: Image) -> Value:
    """Take an image through the first half of an InvertedResidual, band by band where a kernel cuts bands out."""
    norm = weights.pw_exp_norm
    if weights.dw_start:
        side = -(-placed.side // weights.dw_start.conv.stride)
        wide = convolution.activated(step, side**2, placed.wide)
        for band in convolution.bands(side, 4 * placed.wide):
            h = convolution.depthwise(step, weights.dw_start.conv, x.half, band)
            h = step.linear(weights.pw_exp, convolution.norm(step, h, weights.dw_start.norm))
            convolution.norm(step, h, norm, gelu=True, out=wide, band=band)
    else:
        wide = convolution.norm(step, step.linear(weights.pw_exp, x.half), norm, gelu=True)
    if weights.dw_mid:
        h = convolution.depthwise(step, weights.dw_mid.conv, wide)
        wide = convolution.norm(step, h, weights.dw_mid.norm, gelu=True)
    return wide


def _attended(step: EncoderStep, weights: Attention, x: Image) -> Value:
    """Let the pixels of an image attend to it, float32."""
    h = convolution.norm(step, x.x, weights.norm)
    queries, keys, values = step.linear(weights.query, h), _seen(step, weights.key, h), _seen(step, weights.value, h)
    return convolution.attention(step, queries, keys, values, scale=keys.size**-0.5)


def _seen(step: EncoderStep, projection: Projection, x: Value) -> Value:
    if projection.down:
        x = convolution.norm(step, convolution.depthwise(step, projection.down.conv, x), projection.down.norm)
    return step.linear(projection.proj, x)
