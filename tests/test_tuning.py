"""Which kernels an adapter gets: measured once, kept, and overridden."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import gemma_wgpu.ops.tuner
from gemma_wgpu.errors import RequestError
from gemma_wgpu.gpu import open_device_sync
from gemma_wgpu.gpu.device import Device
from gemma_wgpu.ops.tuner import candidates, chosen, tuned, variants
from gemma_wgpu.ops.tuning import Tuning, usual_tuning


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    device = open_device_sync()
    yield device
    device.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("GEMMA_WGPU_TUNING")
    monkeypatch.setenv("GEMMA_WGPU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_measured_once(device: Device, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = device.allocated
    assert chosen(device) is None
    tuning = device.wait(tuned(device))
    assert tuning in candidates(device).values()
    assert device.allocated == before
    assert list(json.loads((cache / "tuning.json").read_text()).values()) == [str(tuning)]
    monkeypatch.setattr(gemma_wgpu.ops.tuner, "_seconds", None)  # would fail if it were called again
    assert device.wait(tuned(device)) == chosen(device) == tuning


def test_the_fastest_is_taken(device: Device, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fastest = list(candidates(device).values())[-1]

    async def seconds(_: Device, tuning: Tuning) -> float:
        return 1.0 if tuning == fastest else 2.0

    monkeypatch.setattr(gemma_wgpu.ops.tuner, "_seconds", seconds)
    assert device.wait(tuned(device)) == fastest


def test_another_driver_is_another_gpu(device: Device, cache: Path) -> None:
    tuning = device.wait(tuned(device))
    updated = SimpleNamespace(info=replace(device.info, driver="newer"), features=device.features)
    assert chosen(device) == tuning
    assert chosen(updated) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', '{"1 llvmpipe": "lanes=999"}'])
def test_a_damaged_cache_is_measured_anew(device: Device, cache: Path, content: str) -> None:
    cache.mkdir()
    (cache / "tuning.json").write_text(content)
    assert chosen(device) is None
    assert device.wait(tuned(device)) == chosen(device)


def test_without_a_place_to_keep_it(device: Device, cache: Path) -> None:
    cache.write_text("a file, not a folder")
    assert device.wait(tuned(device)) in candidates(device).values()


def test_the_environment_decides(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, tuning in variants(device).items():
        monkeypatch.setenv("GEMMA_WGPU_TUNING", name)
        assert chosen(device) == tuning
    monkeypatch.setenv("GEMMA_WGPU_TUNING", "off")
    assert chosen(device) == usual_tuning(device.info, device.features)
    monkeypatch.setenv("GEMMA_WGPU_TUNING", "fast")
    with pytest.raises(RequestError, match="^GEMMA_WGPU_TUNING is 'fast'; .* 'off' or one of 'lanes="):
        chosen(device)


def test_where_there_is_no_choice(device: Device, cache: Path) -> None:
    plain = SimpleNamespace(info=replace(device.info, type="CPU"), features=frozenset())
    assert chosen(plain) == Tuning(1, cpu=False)  # type: ignore[arg-type]


def test_kinds_of_gpus(device: Device) -> None:
    gpu = SimpleNamespace(info=replace(device.info, type="DiscreteGPU"), features=frozenset({"subgroups"}))
    assert list(candidates(gpu)) == ["lanes=16", "lanes=4", "lanes=8", "lanes=32"]  # type: ignore[arg-type]
    assert set(candidates(gpu)) < set(variants(device))  # type: ignore[arg-type]  # what a GPU runs can be run here
    cpu = replace(device.info, type="CPU")
    assert usual_tuning(cpu, frozenset({"subgroups"})) == Tuning(1, cpu=True)
    assert usual_tuning(cpu, frozenset()) == Tuning(1, cpu=False)
    assert usual_tuning(replace(cpu, backend="WebGPU"), frozenset({"subgroups"})) == Tuning(1, cpu=False)
