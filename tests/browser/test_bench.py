"""The benchmark runs in the browser as it does natively, on the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

import gemma_wgpu
from gemma_wgpu.bench.run import Shape, bench
from tests.browser.conftest import Chromium
from tests.host import Host

SHAPES = [Shape(40, 12), Shape(0, 8, 100)]


def test_a_benchmark(chromium: Chromium, host: Host, small_model: Path) -> None:
    with gemma_wgpu.load(small_model, precision="f32") as gemma:
        native = gemma.device.wait(bench(gemma, SHAPES, repetitions=1))
    shapes = [vars(shape) for shape in SHAPES]
    code = f"from tests.browser.inside import benchmark; await benchmark({host.url!r}, {shapes!r})"
    report = json.loads(chromium.run(code))
    for result, expected in zip(report["results"], native.results, strict=True):
        assert result["shape"] == vars(expected.shape)
        assert [run["ids"] for run in result["runs"]] == [run.ids for run in expected.runs]
        assert {run["cached"] for run in result["runs"]} == {expected.shape.depth}
        assert result["decode_bytes"] == expected.decode_bytes
        assert sum(kernel["dispatches"] for kernel in result["decode_kernels"]) == report["dispatches_per_token"]
    assert report["adapter"]["backend"] == "WebGPU"
    assert report["bandwidth"] > 1e6
    assert 0 < report["host"]["alone"]["median"] < 10
