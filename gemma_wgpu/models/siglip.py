"""SigLIP's vision tower (arXiv 2303.15343) and the projector that Gemma 3 puts behind it.

The tower is a plain transformer over an image's patches. The projector averages neighbouring patches, norms the
averages and projects them into the space of the language model's embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.models.keys import MOST_LAYERS, Keys, shown
from gemma_wgpu.models.spec import Kind, Loader, TensorSpec, VisionModel
from gemma_wgpu.ops.encoder import EncoderStep, LayerNorm
from gemma_wgpu.ops.launch import Operand, Value
from gemma_wgpu.ops.linear import Linear
from gemma_wgpu.ops.step import Norm
from gemma_wgpu.tokens.chat import MediumTokens

TOWER = "vision_tower.vision_model."
PROJECTOR = "multi_modal_projector."
_PROJECTION = f"{PROJECTOR}mm_input_projection_weight"
_SOFT_NORM = f"{PROJECTOR}mm_soft_emb_norm.weight"
_POST_NORM = f"{TOWER}post_layernorm"
_PATCH = f"{TOWER}embeddings.patch_embedding"
_POSITION = f"{TOWER}embeddings.position_embedding.weight"

_MOST_PATCHES = 1 << 16
_CLIP = "clip.vision."


@dataclass(frozen=True)
class SiglipConfig:
    """The shape of a tower. Names, meanings and defaults are those of Hugging Face's SiglipVisionConfig.

    `tokens` says how an image stands in a prompt.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
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
        model_type = keys.get("model_type", "siglip_vision_model")
        if model_type != "siglip_vision_model":
            raise keys.error("model_type", f"is {shown(model_type)}; only siglip_vision_model can be run")
        activation = keys.get("hidden_act", "gelu_pytorch_tanh")
        if activation != "gelu_pytorch_tanh":
            raise keys.error("hidden_act", f"is {shown(activation)}; SigLIP has gelu_pytorch_tanh")
        if keys.get("num_channels", 3) != 3:
            raise keys.error("num_channels", f"is {shown(keys.get('num_channels'))}; images have 3 colours")
        built = cls(
            hidden_size=keys.count("hidden_size", 768),
            intermediate_size=keys.count("intermediate_size", 3072),
            num_hidden_layers=keys.count("num_hidden_layers", 12, most=MOST_LAYERS),
            num_attention_heads=keys.count("num_attention_heads", 12),
            image_size=keys.count("image_size", 224),
            patch_size=keys.count("patch_size", 16),
            layer_norm_eps=keys.number("layer_norm_eps", 1e-6),
            tokens=MediumTokens(
                begin=outer.count("boi_token_index", 255_999),
                soft=outer.count("image_token_index", 262_144),
                end=outer.count("eoi_token_index", 256_000),
                count=outer.count("mm_tokens_per_image", 256),
            ),
        )
        if not built.fits(built.tokens.count):
            raise outer.error(
                "mm_tokens_per_image", f"is {built.tokens.count}, which {built.patches} patches do not average to"
            )
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size")
        return built._checked(keys, *names)

    def to_hf(self, text_config: Mapping[str, object]) -> dict[str, object]:
        """Return the keys of a multimodal config.json that `from_hf` and transformers read."""
        vision_config = {"model_type": "siglip_vision_model"} | asdict(self) | {"vision_use_head": False}
        del vision_config["tokens"]
        return {
            "text_config": text_config,
            "vision_config": vision_config,
            "boi_token_index": self.tokens.begin,
            "image_token_index": self.tokens.soft,
            "eoi_token_index": self.tokens.end,
            "mm_tokens_per_image": self.tokens.count,
        }

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], source: str, family: str) -> Self:
        """Read the metadata of a projector's GGUF file, in which the tokens are Gemma 3's.

        Raises ModelError, which names `source` and the key.
        """
        keys = Keys(metadata, source, family)
        grid = keys.count(f"{_CLIP}image_size") // keys.count(f"{_CLIP}patch_size")
        factor = keys.count(f"{_CLIP}projector.scale_factor", 4)
        built = cls(
            hidden_size=keys.count(f"{_CLIP}embedding_length"),
            intermediate_size=keys.count(f"{_CLIP}feed_forward_length"),
            num_hidden_layers=keys.count(f"{_CLIP}block_count", most=MOST_LAYERS),
            num_attention_heads=keys.count(f"{_CLIP}attention.head_count"),
            image_size=keys.count(f"{_CLIP}image_size"),
            patch_size=keys.count(f"{_CLIP}patch_size"),
            layer_norm_eps=keys.number(f"{_CLIP}attention.layer_norm_epsilon", 1e-6),
            tokens=MediumTokens(255_999, 262_144, 256_000, (grid // factor) ** 2),
        )
        if grid % factor:
            raise keys.error(f"{_CLIP}projector.scale_factor", f"is {factor}, which does not divide {grid} patches")
        names = ("embedding_length", "feed_forward_length", "attention.head_count", "image_size", "patch_size")
        return built._checked(keys, *(f"{_CLIP}{name}" for name in names))

    def _checked(self, keys: Keys, hidden: str, inner: str, heads: str, image: str, patch: str) -> Self:
        """Raise ModelError for a shape that the kernels cannot run."""
        head_dim, left = divmod(self.hidden_size, self.num_attention_heads)
        if self.hidden_size % 32:
            raise keys.error(hidden, f"is {self.hidden_size}; only multiples of 32 can be run")
        if self.intermediate_size % 4:
            raise keys.error(inner, f"is {self.intermediate_size}; only multiples of 4 can be run")
        if left or head_dim % 4 or head_dim > 512:
            raise keys.error(heads, f"is {self.num_attention_heads}, which does not make heads that can be run")
        if self.image_size % self.patch_size or self.patches > _MOST_PATCHES:
            raise keys.error(image, f"is {self.image_size}, which {patch} {self.patch_size} does not divide well")
        return self

    def summary(self) -> dict[str, str]:
        """Return what people want to know of the shape, by name."""
        return {
            "images": f"{self.image_size} x {self.image_size} pixels in {self.patches:,} patches become "
            f"{self.tokens.count} tokens, in {self.num_hidden_layers} layers of {self.hidden_size}"
        }

    @property
    def head_dim(self) -> int:
        """Return the size of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def grid(self) -> int:
        """Return the patches along a side of an image."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Return the patches of an image."""
        return self.grid**2

    def fits(self, tokens: int) -> bool:
        """Say whether the patches can be averaged into so many tokens: whole squares of each other."""
        side = math.isqrt(tokens)
        return side**2 == tokens and side > 0 and self.grid % side == 0


def tensors(config: SiglipConfig, text_hidden_size: int) -> list[TensorSpec]:
    """Return the table of the tower and its projector, in the order in which they are used."""
    hidden, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size

    def spec(name: str, gguf: str, shape: tuple[int, ...], kind: Kind, *, transposed: bool = False) -> TensorSpec:
        return TensorSpec(name, gguf, shape, kind, transposed=transposed, tower=True)

    def norm(name: str, gguf: str) -> list[TensorSpec]:
        return [
            spec(f"{name}.weight", f"{gguf}.weight", (hidden,), Kind.NORM),
            spec(f"{name}.bias", f"{gguf}.bias", (hidden,), Kind.BIAS),
        ]

    def linear(shape: tuple[int, int], *names: tuple[str, str]) -> list[TensorSpec]:
        weights = [spec(f"{name}.weight", f"{gguf}.weight", shape, Kind.MATRIX) for name, gguf in names]
        return weights + [spec(f"{name}.bias", f"{gguf}.bias", shape[:1], Kind.BIAS) for name, gguf in names]

    table = [
        spec(f"{_PATCH}.weight", "v.patch_embd.weight", (hidden, 3, patch, patch), Kind.CONVOLUTION),
        spec(f"{_PATCH}.bias", "v.patch_embd.bias", (hidden,), Kind.BIAS),
        spec(_POSITION, "v.position_embd.weight", (config.patches, hidden), Kind.TABLE),
    ]
    for layer in range(config.num_hidden_layers):
        name, gguf = _layer(layer), f"v.blk.{layer}."
        projections = (("q_proj", "attn_q"), ("k_proj", "attn_k"), ("v_proj", "attn_v"))
        table += [
            *norm(f"{name}layer_norm1", f"{gguf}ln1"),
            *linear((hidden, hidden), *((f"{name}self_attn.{hf}", gguf + short) for hf, short in projections)),
            *linear((hidden, hidden), (f"{name}self_attn.out_proj", f"{gguf}attn_out")),
            *norm(f"{name}layer_norm2", f"{gguf}ln2"),
            *linear((inner, hidden), (f"{name}mlp.fc1", f"{gguf}ffn_up")),
            *linear((hidden, inner), (f"{name}mlp.fc2", f"{gguf}ffn_down")),
        ]
    return [
        *table,
        *norm(_POST_NORM, "v.post_ln"),
        spec(_SOFT_NORM, "mm.soft_emb_norm.weight", (hidden,), Kind.NORM_PLUS_ONE),
        spec(_PROJECTION, "mm.input_projection.weight", (hidden, text_hidden_size), Kind.MATRIX, transposed=True),
    ]


def _layer(index: int) -> str:
    return f"{TOWER}encoder.layers.{index}."


@dataclass(frozen=True)
class Layer:
    """One transformer block: two norms, an attention and a feed-forward network, all with biases."""

    layer_norm1: LayerNorm
    qkv_proj: Linear
    out_proj: Linear
    layer_norm2: LayerNorm
    fc1: Linear
    fc2: Linear


class Siglip(VisionModel):
    """A tower with its projector and their weights."""

    patch_embedding: Linear
    position_embedding: Operand
    layers: list[Layer]
    post_layernorm: LayerNorm
    soft_norm: Norm
    projection: Linear

    def __init__(self, config: SiglipConfig) -> None:
        self.config, self.tokens = config, config.tokens
        self.image_size, self.patch_size, self.grid = config.image_size, config.patch_size, config.grid

    @classmethod
    async def load(cls, config: SiglipConfig, loader: Loader, *, eps: float) -> Siglip:
        """Load the weights, in the order of the table; `eps` is that of the projector's norm."""
        model = cls(config)

        async def norm(name: str) -> LayerNorm:
            return await loader.layer_norm(f"{name}.weight", f"{name}.bias", config.layer_norm_eps)

        async def linear(*names: str) -> Linear:
            return await loader.linear(*(f"{n}.weight" for n in names), biases=[f"{n}.bias" for n in names])

        model.patch_embedding = await linear(_PATCH)
        model.position_embedding = await loader.vectors(_POSITION)
        model.layers = []
        for index in range(config.num_hidden_layers):
            name = _layer(index)
            model.layers.append(
                Layer(
                    layer_norm1=await norm(f"{name}layer_norm1"),
                    qkv_proj=await linear(*(f"{name}self_attn.{which}_proj" for which in "qkv")),
                    out_proj=await linear(f"{name}self_attn.out_proj"),
                    layer_norm2=await norm(f"{name}layer_norm2"),
                    fc1=await linear(f"{name}mlp.fc1"),
                    fc2=await linear(f"{name}mlp.fc2"),
                )
            )
        model.post_layernorm = await norm(_POST_NORM)
        model.soft_norm = await loader.norm(_SOFT_NORM, eps)
        model.projection = await loader.linear(_PROJECTION)
        return model

    def patches(self, data: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the patches of an image (3, image_size, image_size), row by row: (grid^2, 3 * patch_size^2)."""
        grid, size = self.grid, self.patch_size
        return data.reshape(3, grid, size, grid, size).transpose(1, 3, 0, 2, 4).reshape(grid * grid, -1)

    def forward(self, step: EncoderStep) -> Value:
        """Take an image's patches through the layers and the projector (Gemma 3 report, section 2)."""
        heads, scale = self.config.num_attention_heads, self.config.head_dim**-0.5
        x = step.add(step.linear(self.patch_embedding, step.patches), self.position_embedding)
        for layer in self.layers:
            h = step.linear(layer.qkv_proj, step.layer_norm(x, layer.layer_norm1))
            x = step.add(x, step.linear(layer.out_proj, step.attention(h, heads, scale=scale)))
            h = step.linear(layer.fc1, step.layer_norm(x, layer.layer_norm2))
            x = step.add(x, step.linear(layer.fc2, step.gelu(h)))
            step.pause()
        h = step.layer_norm(x, self.post_layernorm, half=False)
        h = step.average_pool(h, self.grid // math.isqrt(self.tokens.count))
        return step.linear(self.projection, step.rms_norm(h, self.soft_norm))
