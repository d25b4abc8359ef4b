"""What a step of decode is made of, for a whole Gemma 3 1B: counted on a device that only keeps count."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_wgpu.engine.model import Model
from gemma_wgpu.gpu.device import Adapter, AdapterInfo, Buffer, Constants, Dispatch, Limits, Program
from gemma_wgpu.gpu.ledger import Ledger
from gemma_wgpu.models.config import Gemma3Config
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.weights.checkpoint import EMBEDDING, Source, matrix_shapes, norm_shapes
from tests.reference.random_1b import CONFIG

LAYERS = 26
SHAPE = Gemma3Config.from_hf(
    CONFIG
    | {
        "vocab_size": 262144,
        "num_hidden_layers": LAYERS,
        "layer_types": ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(LAYERS)],
    }
)
CONTEXT = 4096


class Recorded(Program):
    def __init__(self, dispatches: Sequence[Dispatch]) -> None:
        self.dispatches = dispatches


class Counting(Ledger):
    """Programs are recorded too."""

    def _create_pipeline(self, label: str, source: str, constants: Constants) -> Any:
        return None

    def record(self, dispatches: Sequence[Dispatch]) -> Program:
        return Recorded(dispatches)

    async def _nothing(self) -> NDArray[np.uint8]:
        return np.zeros(4, np.uint8)

    def read(
        self, buffer: Buffer, offset: int = 0, size: int | None = None, *, after: Sequence[Program] = ()
    ) -> Awaitable[NDArray[np.uint8]]:
        return self._nothing()


class Blank(Source):
    """A matrix without weights."""

    def __init__(self, name: str) -> None:
        self.name, self.shape = name, matrix_shapes(SHAPE)[name]

    @property
    def layout(self) -> Layout:
        return Layout.INT8 if self.name == EMBEDDING else Layout.INT4

    async def words(self, start: int, stop: int) -> AsyncIterator[tuple[int, Any, Any]]:
        for nothing in ():
            yield nothing


class Blanks:
    config, quantization = SHAPE, "int4"

    def tensor(self, name: str) -> Source:
        return Blank(name)

    async def norm_factors(self, name: str) -> NDArray[np.float32]:
        return np.ones(norm_shapes(SHAPE)[name], np.float32)

    def release(self) -> None:
        pass


@pytest.fixture(scope="module", params=["CPU", "DiscreteGPU"])
def model(request: pytest.FixtureRequest) -> Model:
    """Its buffers are of the size that one token takes."""
    info = AdapterInfo("", "", "", "", "Vulkan", request.param)
    limits = Limits(1 << 31, 1 << 31, 8, 1 << 15, 256, 65535)
    device = Counting(Adapter(info, limits, frozenset({"shader-f16"})))
    model = Model(device, SHAPE, half=True, context_length=CONTEXT, prefill_chunk=1)
    model.allocate()
    asyncio.run(model.load(Blanks(), lambda _: None))  # type: ignore[arg-type]
    return model


def dispatches(model: Model) -> list[Dispatch]:
    return [dispatch for program in model.decode_programs for dispatch in program.dispatches]


def test_dispatches(model: Model) -> None:
    assert model.decode_dispatches == len(dispatches(model)) <= 165
    layers = model.decode_programs[0].dispatches[1:]
    assert len(layers) <= 6 * LAYERS
    head = sum(len(program.dispatches) for program in model.decode_programs[1:])
    assert head <= 5


@pytest.mark.parametrize("position", [0, 511, 512, CONTEXT - 1])
def test_bytes(model: Model, position: int) -> None:
    """All that a step's dispatches are given to read is hardly more than the weights and the cache, once."""
    caches = {buffer: model.layers[i].attention for i, pair in enumerate(model.caches) for buffer in pair}
    cache = sum(min(shape.window, position + 1) * model.slot_bytes for shape in caches.values())
    given = 0
    for dispatch in dispatches(model):
        for buffer in dispatch.bindings:
            if buffer in caches:
                given += min(caches[buffer].window, position + 1) * model.slot_bytes
            elif buffer is model.tokens or buffer.label.startswith("rope"):
                given += 2 * SHAPE.head_dim  # of which a step reads a row
            elif dispatch.pipeline.label == "embed":
                given += 4 * SHAPE.hidden_size
            else:
                given += buffer.size
    assert model.weight_bytes + cache < given <= 1.05 * (model.weight_bytes + cache)


def test_every_weight_is_bound_once(model: Model) -> None:
    parts = [
        part for layer in model.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down) for part in m.parts
    ]
    bound = [buffer for d in dispatches(model) if d.pipeline.label != "embed" for buffer in d.bindings]
    for part in [*parts, *model.embedding.parts]:
        assert bound.count(part.quants) == bound.count(part.scales) == 1
