"""What a step of decode is made of, for a whole Gemma 3 1B: counted on a device that only keeps count."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_wgpu.engine.runner import Draw, Row, Runner
from gemma_wgpu.gpu.device import Adapter, AdapterInfo, Buffer, Constants, Data, Dispatch, Limits, Program
from gemma_wgpu.gpu.ledger import Ledger
from gemma_wgpu.models import gemma3n, gemma4
from gemma_wgpu.models.gemma3 import FAMILY, Gemma3, Gemma3Config, tensors
from gemma_wgpu.models.spec import Family, Kind
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.options import Options
from gemma_wgpu.tokens.tokenizer import Tokenizer
from gemma_wgpu.weights.checkpoint import Tensor, Weights
from gemma_wgpu.weights.upload import Upload
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


class Blank(Tensor):
    """A matrix without weights."""

    def __init__(self, name: str, shape: tuple[int, int], layout: Layout) -> None:
        self.name, self.shape, self._layout = name, shape, layout

    @property
    def layout(self) -> Layout:
        return self._layout

    async def words(self, start: int, stop: int) -> AsyncIterator[tuple[int, Data, Data]]:
        raise AssertionError("there are none")
        yield

    async def stay(self) -> None:
        raise AssertionError("there are none")

    def fetch(self, numbers: Sequence[int]) -> Awaitable[NDArray[np.float32]]:
        raise AssertionError("there are none")


class Blanks(Weights):
    """The 1B in int4, its embedding in int8."""

    name, family, config, quantization, reports_progress = "1b", FAMILY, SHAPE, "int4", False
    place = "nowhere"

    def tensor(self, name: str) -> Tensor:
        spec = self.table[name]
        return Blank(name, spec.stored_shape, Layout.INT8 if spec.kind == Kind.EMBEDDING else Layout.INT4)

    async def vector(self, name: str) -> NDArray[np.float32]:
        return np.ones(self.table[name].shape, np.float32)

    def tokenizer(self) -> Tokenizer:
        raise AssertionError("there is none")

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


def counting(kind: str) -> Counting:
    """A device of this kind."""
    limits = Limits(1 << 31, 1 << 31, 8, 1 << 15, 256, 65535)
    return Counting(Adapter(AdapterInfo("", "", "", "", "Vulkan", kind), limits, frozenset({"shader-f16"})))


@pytest.fixture(scope="module", params=["CPU", "DiscreteGPU"])
def runner(request: pytest.FixtureRequest) -> Runner:
    """Its buffers are of the size that one token takes, and its cache is full."""
    device = counting(request.param)
    model = asyncio.run(Gemma3.load(SHAPE, Upload(device, Blanks(), lambda _: None, empty=True)))
    runner = Runner(device, model, half=True, context_length=CONTEXT, prefill_chunk=1)
    runner.fill()
    return runner


# The shapes of both E2B, as far as they are not the defaults of their configurations.
E2B: dict[str, tuple[Family, dict[str, object], int]] = {
    "gemma3n": (
        gemma3n.FAMILY,
        {"num_hidden_layers": 30, "intermediate_size": 8192, "num_kv_shared_layers": 10},
        452,
    ),
    "gemma4": (
        gemma4.FAMILY,
        {
            "hidden_size": 1536,
            "hidden_size_per_layer_input": 256,
            "intermediate_size": 6144,
            "num_hidden_layers": 35,
            "layer_types": ["sliding_attention" if (i + 1) % 5 else "full_attention" for i in range(35)],
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 20,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 30.0,
        },
        296,
    ),
}


@pytest.mark.parametrize("name", E2B)
def test_dispatches_of_others(name: str) -> None:
    of, hf, most = E2B[name]

    class Others(Blanks):
        family, config = of, of.config.from_hf({"model_type": f"{name}_text"} | hf)

    device = counting("DiscreteGPU")
    model = asyncio.run(of.load(Others.config, Upload(device, Others(), lambda _: None, empty=True)))
    runner = Runner(device, model, half=True, context_length=CONTEXT, prefill_chunk=1)
    assert runner.decode_dispatches <= most
    cached = {spec.window for spec in model.caches}
    assert cached == {None, 512}
    assert sum(spec.layers for spec in model.caches) == Others.config.num_hidden_layers


def dispatches(runner: Runner) -> list[Dispatch]:
    return [dispatch for program in runner.decode_programs() for dispatch in program.dispatches]


def weight_bytes(runner: Runner) -> int:
    layouts = {Kind.EMBEDDING: Layout.INT8, Kind.MATRIX: Layout.INT4}
    matrices = sum(layouts[spec.kind].nbytes(*spec.stored_shape) for spec in tensors(SHAPE) if spec.kind.is_matrix)
    return matrices + runner.norm_bytes


def test_dispatches(runner: Runner) -> None:
    assert runner.decode_dispatches == len(dispatches(runner)) <= 143
    layers, head, sample = (program.dispatches for program in runner.decode_programs())
    assert len(layers) - 1 <= 6 * LAYERS
    assert len(head) + len(sample) <= 5


@pytest.mark.parametrize("position", [0, 511, 512, CONTEXT - 1])
def test_bytes(runner: Runner, position: int) -> None:
    """All that a step's dispatches are given to read is hardly more than the weights and the cache, once."""
    cache = runner.cache
    caches: dict[Buffer, int] = {}
    for index, spec in enumerate(cache.specs):
        seen = min(cache.window(spec), position + 1) * cache.row_bytes(index)
        caches |= {cache.keys(index): seen, cache.values(index): seen}
    total = weight_bytes(runner) + sum(caches.values())
    given = 0
    for dispatch in dispatches(runner):
        for buffer in dispatch.bindings:
            if buffer in caches:
                given += caches[buffer]
            elif buffer.label.startswith("rope"):
                given += 2 * SHAPE.head_dim  # of which a step reads a row
            elif dispatch.pipeline.label == "embed":
                given += 4 * SHAPE.hidden_size
            else:
                given += buffer.size
    assert total < given <= 1.05 * total


def test_every_weight_is_bound_once(runner: Runner) -> None:
    model = runner.model
    assert isinstance(model, Gemma3)
    matrices = [
        m for layer in model.layers for m in (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj)
    ]
    bound = [buffer for d in dispatches(runner) if d.pipeline.label != "embed" for buffer in d.bindings]
    for part in (part for matrix in (*matrices, model.head) for part in matrix.parts):
        assert bound.count(part.quants) == bound.count(part.scales) == 1


def test_a_prompt_and_a_batch_share_their_memory(runner: Runner) -> None:
    """Steps of other kinds take the same scratch memory, since one runs at a time."""
    before = runner.scratch_bytes
    lease = runner.begin([1], 0)
    runner.finish_programs(lease, 1, Draw(Options(), 0))
    assert runner.scratch_bytes == before
    runner.set_rows([Row(lease, 1, Draw(Options(), 0))])
    runner.step_programs()
    assert runner.scratch_bytes == before
    lease.end("it was counted")
