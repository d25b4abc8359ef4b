"""The audio encoder of Gemma 3n, a Universal Speech Model (arXiv 2303.01037; transformers' modeling_gemma3n).

Two convolutions make a quarter of the frames of a sound, each of a quarter of the bands. The layers are a conformer's
(arXiv 2005.08100): an attention to the last twelve frames and a convolution over the last five, between two halves of
a feed-forward network. Of what they make, every fourth frame is projected into the space of the language model's
embeddings. A sound that is shorter than the tokens that it has in a prompt is filled up with one and the same vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import RequestError
from gemma_wgpu.models import multimodal_embedder
from gemma_wgpu.models.keys import MOST_LAYERS, Keys, shown
from gemma_wgpu.models.multimodal_embedder import MultimodalEmbedder
from gemma_wgpu.models.spec import Kind, Loader, TensorSpec, Tower
from gemma_wgpu.ops import conformer
from gemma_wgpu.ops.conformer import LightConvolution, RelativeAttention, Subsampling
from gemma_wgpu.ops.encoder import EncoderStep
from gemma_wgpu.ops.launch import Value
from gemma_wgpu.ops.layout import BLOCK
from gemma_wgpu.ops.linear import Linear
from gemma_wgpu.ops.step import Norm
from gemma_wgpu.tokens.chat import MediumTokens

TOWER = "model.audio_tower."
FRAMES_PER_SECOND = 100

_SUBSAMPLING = f"{TOWER}subsample_conv_projection."
_INPUT = f"{_SUBSAMPLING}input_proj_linear.weight"
_KERNEL, _STRIDE, _CHANNELS = [[3, 3], [3, 3]], [[2, 2], [2, 2]], [128, 32]
_EPS = 1e-6  # of the norms of a layer
_CLIPPING = 1e10
_EXPANSION = 4
_TIMESCALES = 1e4  # the longest is so many times the shortest
# What a workgroup keeps in its memory, of which 16 KiB are certain.
_MOST_HIDDEN, _MOST_CONTEXT = 3584, 256


@dataclass(frozen=True)
class UsmConfig:
    """The shape of an encoder. Names, meanings and defaults are those of Hugging Face's Gemma3nAudioConfig.

    A frame attends to `conf_attention_context_left` frames up to itself, and `conf_attention_context_right` after it;
    `conf_attention_chunk_size` says how many frames others compute at a time, and has no effect on the result.
    `tokens` says how a sound stands in a prompt. The `vocab_size` ids from `vocab_offset` on have vectors of the
    encoder's own.
    """

    hidden_size: int
    input_feat_size: int
    conf_num_hidden_layers: int
    conf_num_attention_heads: int
    conf_attention_chunk_size: int
    conf_attention_context_left: int
    conf_attention_context_right: int
    conf_attention_logit_cap: float
    conf_conv_kernel_size: int
    conf_reduction_factor: int
    conf_residual_weight: float
    sscp_conv_channel_size: tuple[int, int]
    sscp_conv_group_norm_eps: float
    rms_norm_eps: float
    vocab_size: int
    vocab_offset: int
    tokens: MediumTokens

    @classmethod
    def from_hf(cls, config: Mapping[str, object], source: str, family: str) -> Self | None:
        """Read the keys of a multimodal config.json; return None if there is no `audio_config`.

        Raises ModelError, which names `source` and the key.
        """
        if config.get("audio_config") is None:
            return None
        outer = Keys(config, source, family)
        keys = outer.inner("audio_config")
        for key, only in (
            ("model_type", "gemma3n_audio"),
            ("sscp_conv_kernel_size", _KERNEL),
            ("sscp_conv_stride_size", _STRIDE),
            ("rms_norm_eps", _EPS),
        ):
            if _plain(keys.get(key, only)) != only:
                raise keys.error(key, f"is {shown(keys.get(key))}; only {only} can be run")
        if keys.number("gradient_clipping", _CLIPPING) < _CLIPPING:
            raise keys.error(
                "gradient_clipping", f"is {shown(keys.get('gradient_clipping'))}; nothing is clipped here"
            )
        wide, narrow = _channels(keys)
        built = cls(
            hidden_size=keys.size("hidden_size", 1536),
            input_feat_size=keys.size("input_feat_size", 128),
            conf_num_hidden_layers=keys.count("conf_num_hidden_layers", 12, most=MOST_LAYERS),
            conf_num_attention_heads=keys.count("conf_num_attention_heads", 8),
            conf_attention_chunk_size=keys.count("conf_attention_chunk_size", 12),
            conf_attention_context_left=keys.count("conf_attention_context_left", 13, most=_MOST_CONTEXT),
            conf_attention_context_right=keys.count("conf_attention_context_right", 0, least=0, most=_MOST_CONTEXT),
            conf_attention_logit_cap=keys.number("conf_attention_logit_cap", 50.0),
            conf_conv_kernel_size=keys.count("conf_conv_kernel_size", 5),
            conf_reduction_factor=keys.count("conf_reduction_factor", 4),
            conf_residual_weight=keys.number("conf_residual_weight", 0.5),
            sscp_conv_channel_size=(wide, narrow),
            sscp_conv_group_norm_eps=keys.number("sscp_conv_group_norm_eps", 1e-3),
            rms_norm_eps=keys.number("rms_norm_eps", _EPS),
            vocab_size=keys.count("vocab_size", 128),
            vocab_offset=keys.count("vocab_offset", 262_272),
            tokens=MediumTokens(
                begin=outer.count("boa_token_id", 256_000),
                soft=outer.count("audio_token_id", 262_273),
                end=outer.count("eoa_token_id", 262_272),
                count=outer.count("audio_soft_tokens_per_image", 188),
            ),
        )
        if built.hidden_size > _MOST_HIDDEN:
            raise keys.error("hidden_size", f"is {built.hidden_size}; at most {_MOST_HIDDEN} can be run")
        heads, left = built.conf_num_attention_heads, built.hidden_size % built.conf_num_attention_heads
        if left or built.head_dim % 4:
            raise keys.error("conf_num_attention_heads", f"is {heads}, which does not make heads that can be run")
        if wide % 4 or narrow % 4 or built.subsampled % BLOCK:
            raise keys.error("sscp_conv_channel_size", f"is {[wide, narrow]}, which cannot be run")
        return built

    def to_hf(self) -> dict[str, object]:
        """Return the keys of a multimodal config.json that `from_hf` and transformers read, without `text_config`."""
        audio: dict[str, object] = {"model_type": "gemma3n_audio"} | asdict(self)
        del audio["tokens"]
        return {
            "audio_config": audio | {"sscp_conv_channel_size": list(self.sscp_conv_channel_size)},
            "boa_token_id": self.tokens.begin,
            "audio_token_id": self.tokens.soft,
            "eoa_token_id": self.tokens.end,
            "audio_soft_tokens_per_image": self.tokens.count,
        }

    def summary(self) -> dict[str, str]:
        """Return what people want to know of the shape, by name."""
        seconds = self.most_frames / FRAMES_PER_SECOND
        return {
            "sounds": f"up to {seconds:.0f} seconds become {self.tokens.count} tokens, in "
            f"{self.conf_num_hidden_layers} layers of {self.hidden_size}"
        }

    @property
    def head_dim(self) -> int:
        """Return the size of a head."""
        return self.hidden_size // self.conf_num_attention_heads

    @property
    def past(self) -> int:
        """Return how many frames before itself a frame attends to."""
        return self.conf_attention_context_left - 1

    @property
    def subsampled(self) -> int:
        """Return the numbers of a frame that the convolutions make."""
        return -(-self.input_feat_size // 4) * self.sscp_conv_channel_size[1]

    @property
    def frames_per_token(self) -> int:
        """Return how many frames become one token: two convolutions halve them, and of the rest one in some stays."""
        return 4 * self.conf_reduction_factor

    @property
    def most_frames(self) -> int:
        """Return the frames of the longest sound that fits into its tokens."""
        return self.tokens.count * self.frames_per_token

    def tokens_of(self, frames: int) -> int:
        """Return how many tokens so many frames become; what is left of a sound's tokens is filled up."""
        return -(-frames // self.frames_per_token)


def _plain(value: object) -> object:
    """Return lists for tuples, which other writers of configurations have."""
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _channels(keys: Keys) -> tuple[int, int]:
    if keys.get("sscp_conv_channel_size") is None:
        return _CHANNELS[0], _CHANNELS[1]
    wide, narrow = keys.counts("sscp_conv_channel_size", 2)
    return wide, narrow


def tensors(config: UsmConfig, text_hidden_size: int) -> list[TensorSpec]:
    """Return the table of the encoder and its embedder, in the order in which they are used."""
    hidden, wide = config.hidden_size, _EXPANSION * config.hidden_size
    first, second = config.sscp_conv_channel_size

    def spec(name: str, gguf: str, shape: tuple[int, ...], kind: Kind = Kind.MATRIX) -> TensorSpec:
        return TensorSpec(name, gguf, shape, kind, tower=True)

    table = []
    for index, (before, after) in enumerate(((1, first), (first, second))):
        name, gguf = f"{_SUBSAMPLING}conv_{index}.", f"a.conv1d.{index}."
        table += [
            spec(f"{name}conv.weight", f"{gguf}weight", (after, before, 3, 3), Kind.TABLE),
            spec(f"{name}norm.weight", f"{gguf}norm.weight", (after,), Kind.NORM),
        ]
    table.append(spec(_INPUT, "a.pre_encode.out.weight", (hidden, config.subsampled)))
    taps = hidden, 1, config.conf_conv_kernel_size
    for layer in range(config.conf_num_hidden_layers):
        prefix, number = _layer(layer), f"a.blk.{layer}."
        table += [
            spec(prefix + name, f"{number}{gguf}.weight", shape, kind)
            for name, gguf, shape, kind in (
                ("ffw_layer_start.pre_layer_norm.weight", "ffn_norm", (hidden,), Kind.NORM),
                ("ffw_layer_start.ffw_layer_1.weight", "ffn_up", (wide, hidden), Kind.MATRIX),
                ("ffw_layer_start.ffw_layer_2.weight", "ffn_down", (hidden, wide), Kind.MATRIX),
                ("ffw_layer_start.post_layer_norm.weight", "ffn_post_norm", (hidden,), Kind.NORM),
                ("attention.pre_attn_norm.weight", "ln1", (hidden,), Kind.NORM),
                ("attention.attn.q_proj.weight", "attn_q", (hidden, hidden), Kind.MATRIX),
                ("attention.attn.k_proj.weight", "attn_k", (hidden, hidden), Kind.MATRIX),
                ("attention.attn.v_proj.weight", "attn_v", (hidden, hidden), Kind.MATRIX),
                ("attention.attn.per_dim_scale", "per_dim_scale", (config.head_dim,), Kind.NORM),
                (f"{_POSITIONS}.weight", "linear_pos", (hidden, hidden), Kind.MATRIX),
                ("attention.post.weight", "attn_out", (hidden, hidden), Kind.MATRIX),
                ("attention.post_norm.weight", "ln2", (hidden,), Kind.NORM),
                ("lconv1d.pre_layer_norm.weight", "conv_norm", (hidden,), Kind.NORM),
                ("lconv1d.linear_start.weight", "conv_pw1", (2 * hidden, hidden), Kind.MATRIX),
                ("lconv1d.depthwise_conv1d.weight", "conv_dw", taps, Kind.DEPTHWISE),
                ("lconv1d.conv_norm.weight", "norm_conv", (hidden,), Kind.NORM),
                ("lconv1d.linear_end.weight", "conv_pw2", (hidden, hidden), Kind.MATRIX),
                ("ffw_layer_end.pre_layer_norm.weight", "ffn_norm_1", (hidden,), Kind.NORM),
                ("ffw_layer_end.ffw_layer_1.weight", "ffn_up_1", (wide, hidden), Kind.MATRIX),
                ("ffw_layer_end.ffw_layer_2.weight", "ffn_down_1", (hidden, wide), Kind.MATRIX),
                ("ffw_layer_end.post_layer_norm.weight", "ffn_post_norm_1", (hidden,), Kind.NORM),
                ("norm.weight", "layer_pre_norm", (hidden,), Kind.NORM),
            )
        ]
    embedder = MultimodalEmbedder.tensors(multimodal_embedder.AUDIO, config.vocab_size, hidden, text_hidden_size)
    return [*table, *embedder]


_POSITIONS = "attention.attn.relative_position_embedding.pos_proj"


def _layer(index: int) -> str:
    return f"{TOWER}conformer.{index}."


@dataclass(frozen=True)
class FeedForward:
    """Half a feed-forward network. `post_layer_norm` has the weight of the residual in it."""

    pre_layer_norm: Norm
    ffw_layer_1: Linear
    ffw_layer_2: Linear
    post_layer_norm: Norm


@dataclass(frozen=True)
class Layer:
    """One conformer block."""

    ffw_layer_start: FeedForward
    pre_attn_norm: Norm
    qkv_proj: Linear
    attention: RelativeAttention
    post: Linear
    post_norm: Norm
    pre_conv_norm: Norm
    linear_start: Linear
    convolution: LightConvolution
    linear_end: Linear
    ffw_layer_end: FeedForward
    norm: Norm


class Usm(Tower):
    """An encoder with its embedder and their weights."""

    subsampling: list[Subsampling]
    input_projection: Linear
    layers: list[Layer]
    embedder: MultimodalEmbedder

    def __init__(self, config: UsmConfig) -> None:
        self.config, self.tokens = config, config.tokens
        self.hard = range(config.vocab_offset, config.vocab_offset + config.vocab_size)

    @classmethod
    async def load(cls, config: UsmConfig, loader: Loader) -> Usm:
        """Load the weights, in the order of the table."""
        model = cls(config)
        model.subsampling = []
        for index, channels in enumerate(((1, config.sscp_conv_channel_size[0]), config.sscp_conv_channel_size)):
            name = f"{_SUBSAMPLING}conv_{index}."
            model.subsampling.append(
                Subsampling(
                    weight=await loader.derived(_channels_last, f"{name}conv.weight"),
                    norm=await loader.vectors(f"{name}norm.weight"),
                    channels=channels,
                    eps=config.sscp_conv_group_norm_eps,
                )
            )
        model.input_projection = await loader.linear(_INPUT)
        model.layers = [
            await model._load_layer(loader, _layer(index)) for index in range(config.conf_num_hidden_layers)
        ]
        model.embedder = await MultimodalEmbedder.load(loader, multimodal_embedder.AUDIO, config.rms_norm_eps)
        return model

    async def _load_layer(self, loader: Loader, prefix: str) -> Layer:
        config = self.config

        async def norm(name: str, factor: float = 1.0) -> Norm:
            loaded = await loader.norm(f"{prefix}{name}.weight", config.rms_norm_eps)
            return Norm(loaded.weight * np.float32(factor), loaded.eps)

        async def linear(*names: str) -> Linear:
            return await loader.linear(*(f"{prefix}{name}.weight" for name in names))

        async def feed_forward(name: str) -> FeedForward:
            return FeedForward(
                pre_layer_norm=await norm(f"{name}.pre_layer_norm"),
                ffw_layer_1=await linear(f"{name}.ffw_layer_1"),
                ffw_layer_2=await linear(f"{name}.ffw_layer_2"),
                post_layer_norm=await norm(f"{name}.post_layer_norm", config.conf_residual_weight),
            )

        return Layer(
            ffw_layer_start=await feed_forward("ffw_layer_start"),
            pre_attn_norm=await norm("attention.pre_attn_norm"),
            qkv_proj=await linear(*(f"attention.attn.{which}_proj" for which in "qkv")),
            attention=RelativeAttention(
                heads=config.conf_num_attention_heads,
                head_dim=config.head_dim,
                past=config.past,
                future=config.conf_attention_context_right,
                cap=config.conf_attention_logit_cap,
                scale=await loader.derived(_query_scale, f"{prefix}attention.attn.per_dim_scale"),
                position=await loader.derived(self._positions, f"{prefix}{_POSITIONS}.weight"),
            ),
            post=await linear("attention.post"),
            post_norm=await norm("attention.post_norm"),
            pre_conv_norm=await norm("lconv1d.pre_layer_norm"),
            linear_start=await linear("lconv1d.linear_start"),
            convolution=LightConvolution(
                weight=await loader.depthwise(f"{prefix}lconv1d.depthwise_conv1d.weight"),
                taps=config.conf_conv_kernel_size,
                norm=await norm("lconv1d.conv_norm"),
            ),
            linear_end=await linear("lconv1d.linear_end"),
            ffw_layer_end=await feed_forward("ffw_layer_end"),
            norm=await norm("norm"),
        )

    def _positions(self, projection: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what is added to a key, by how far it is from the query: the projection of sines and cosines."""
        half = self.config.hidden_size // 2
        places = np.arange(self.config.past, -self.config.conf_attention_context_right - 1, -1)
        angles = places[:, None] * _TIMESCALES ** (-np.arange(half) / max(half - 1, 1))
        waves = np.concatenate((np.sin(angles), np.cos(angles)), axis=1)
        return (waves @ projection.astype(np.float64).T).astype(np.float32)

    def patches(self, data: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the frames of a sound, (frames, input_feat_size), as they are.

        Raises RequestError if there are none, or more than the encoder reads.
        """
        config = self.config
        if data.ndim != 2 or data.shape[1] != config.input_feat_size:
            raise RequestError(
                f"a sound is an array of the shape {data.shape}; the model reads log-mel frames of "
                f"{config.input_feat_size} bands"
            )
        if not 1 <= len(data) <= config.most_frames:
            raise RequestError(
                f"a sound has {len(data):,} log-mel frames, and the model reads 1 to {config.most_frames:,} of them; "
                "give it a longer sound, or cut it into several"
            )
        return data

    def forward(self, step: EncoderStep) -> Value:
        """Take the log-mel frames of a sound through the layers and the embedder; return all of its tokens.

        Those after the sound's own, `config.tokens_of(frames)`, have the embedding of the last id in `hard`.
        """
        x = self.embedder.soft(step, self.encoded(step))
        if x.rows == self.tokens.count:
            return x
        return conformer.fill(step, x, self.embedder.hard(step), self.tokens.count)

    def encoded(self, step: EncoderStep) -> Value:
        """Take the log-mel frames of a sound through the layers; return float32 (own tokens, hidden size)."""
        x = step.patches
        for sampling in self.subsampling:
            x = conformer.subsample(step, sampling, x)
        x = step.linear(self.input_projection, x)
        for layer in self.layers:
            x = self._through(step, layer, x)
            step.pause()
        return conformer.every(step, x, self.config.conf_reduction_factor)

    def hard_rows(self, step: EncoderStep) -> Value:
        """Return the vectors of the ids `hard`, float32 (vocab_size, hidden size of the text)."""
        return self.embedder.hard(step)

    def _through(self, step: EncoderStep, layer: Layer, x: Value) -> Value:
        """Take float32 `x` through a layer."""
        start, end = layer.ffw_layer_start, layer.ffw_layer_end
        h = step.rms_norm(x, start.pre_layer_norm)
        y = self._feed_forward(step, start, h)
        h = conformer.add_norm(step, x, y, start.post_layer_norm, layer.pre_attn_norm)
        y = step.linear(layer.post, conformer.attention(step, layer.attention, step.linear(layer.qkv_proj, h)))
        h = conformer.add_norm(step, x, y, layer.post_norm, layer.pre_conv_norm)
        h = conformer.light_convolution(step, layer.convolution, step.linear(layer.linear_start, h))
        h = conformer.add_norm(step, x, step.linear(layer.linear_end, h), None, end.pre_layer_norm)
        y = self._feed_forward(step, end, h)
        return conformer.add_norm(step, x, y, end.post_layer_norm, layer.norm, half=False)

    def _feed_forward(self, step: EncoderStep, network: FeedForward, h: Value) -> Value:
        return step.linear(network.ffw_layer_2, conformer.silu(step, step.linear(network.ffw_layer_1, h)))


def _channels_last(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a convolution's weights with the channels that it reads and those that it makes last."""
    return weight.transpose(2, 3, 1, 0)


def _query_scale(per_dim_scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what queries are multiplied by: with a scale of 0 everywhere, it is that of any attention."""
    factor = len(per_dim_scale) ** -0.5 / math.log(2)
    return np.asarray(factor * np.logaddexp(0, per_dim_scale), np.float32)
