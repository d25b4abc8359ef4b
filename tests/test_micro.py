"""The times of the kernels by themselves fit together. How fast they are does not matter here."""

import dataclasses

import pytest

from gemma_wgpu.bench.micro import Timings, time_kernels
from gemma_wgpu.bench.records import from_dict
from gemma_wgpu.errors import RequestError
from gemma_wgpu.gpu import open_device_sync
from gemma_wgpu.ops.tuning import usual_tuning
from gemma_wgpu.progress import Progress

TOKENS = 40


@pytest.fixture(scope="module")
def timings() -> Timings:
    device = open_device_sync()
    tuning = usual_tuning(device.info, device.features)
    told: list[Progress] = []
    found = device.wait(
        time_kernels(
            device,
            "gemma-3-270m",
            half=False,
            tuning=tuning,
            tokens=TOKENS,
            progress=told.append,
        )
    )
    assert device.allocated == 0
    for options in ({"model": "gemma-4", "tokens": 1}, {"model": "gemma-3-1b", "tokens": 0}):
        with pytest.raises(RequestError, match="gemma-4|tokens is 0"):
            device.wait(time_kernels(device, half=False, tuning=tuning, **options))  # type: ignore[arg-type]
    device.close()
    assert [(step.done, step.total, step.unit) for step in told] == [
        (n, len(told), "kernels") for n in range(len(told))
    ]
    assert [step.what for step in told] == [
        *(f"{timing.kernel}, {timing.shape}" for timing in found.kernels),
        "measuring bandwidth",
    ]
    return found


def test_what_is_moved_and_computed(timings: Timings) -> None:
    rows, cols = 4096, 640
    found = {(timing.kernel, timing.shape): timing for timing in timings.kernels}
    assert len(found) == len(timings.kernels)
    matvec = found["matvec", f"{rows}×{cols} int8"]
    assert matvec.operations == 2 * rows * cols
    assert matvec.nbytes == rows * cols + rows * cols // 32 * 2 + 4 * (rows + cols)
    assert found["matvec", f"{rows}×{cols} f16"].nbytes == pytest.approx(2 * rows * cols, rel=0.01)
    matmul = found["matmul", f"{rows}×{cols} int4, {TOKENS} tokens"]
    assert matmul.operations == TOKENS * matvec.operations
    assert matmul.nbytes == rows * cols // 2 + rows * cols // 32 * 2 + 4 * TOKENS * (rows + cols)
    attention = found["attention_decode", "512 positions"]
    assert attention.nbytes == 2 * 4 * 512 * 256
    assert attention.operations == 2 * 2 * 512 * 4 * 256
    prefill = found["attention_prefill", f"{TOKENS} tokens"]
    assert prefill.operations == 2 * 2 * 4 * 256 * TOKENS * (TOKENS + 1) // 2


def test_rates_follow(timings: Timings) -> None:
    for timing in timings.kernels:
        assert timing.seconds > 0
        assert timing.bandwidth * timing.seconds == pytest.approx(timing.nbytes)
        assert timing.rate * timing.seconds == pytest.approx(timing.operations)
    assert timings.bandwidth > 1e6


def test_json_and_back(timings: Timings) -> None:
    assert from_dict(Timings, dataclasses.asdict(timings)) == timings
