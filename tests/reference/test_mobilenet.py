"""The small MobileNetV5 of mobilenet.py against timm and transformers: an image in between, and the features."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_wgpu.gpu.device import Device
from gemma_wgpu.gpu.native import open_native
from gemma_wgpu.models.mobilenet_v5 import MobileNetV5
from gemma_wgpu.ops import convolution
from gemma_wgpu.ops.encoder import EncoderStep
from gemma_wgpu.ops.launch import Value
from gemma_wgpu.ops.tuning import Tuning
from gemma_wgpu.weights.upload import Upload
from tests.held import Held
from tests.reference.golden import FOLDER, largest_error
from tests.reference.mobilenet import CONFIG, TABLE, pixels, weights
from tests.towers import computed, features

Report = Callable[[str], None]
Floats = NDArray[np.float32]

with np.load(FOLDER / "mobilenet.npz") as _recorded:
    RECORDED: dict[str, Floats] = dict(_recorded)

# Of the largest number. Float32 alone comes to 1e-6.
F32 = 1e-5
F16 = 3e-3

# Kernels as GPUs have them, though these run on a CPU: they are compiled in half the time.
TUNING = Tuning(16, cpu=False)

both_images = pytest.mark.parametrize("image", [0, 1])


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    device = open_native()
    yield device
    device.close()


@pytest.fixture(scope="module")
def tower(device: Device) -> MobileNetV5:
    return device.wait(MobileNetV5.load(CONFIG, Upload(device, Held(TABLE, weights()), lambda nbytes: None)))


def error(ours: Floats, expected: Floats) -> float:
    return largest_error(ours, expected) / float(np.abs(expected).max())


@both_images
def test_images_in_between(device: Device, tower: MobileNetV5, image: int, report: Report) -> None:
    def last(step: EncoderStep) -> Value:
        return tower.images(step)[-1].x

    apart = error(computed(device, last, tower.patches(pixels()[image]), tuning=TUNING), RECORDED["last"][image])
    report(f"{apart:.1e} of the largest")
    assert apart < F32


@both_images
def test_features(device: Device, tower: MobileNetV5, image: int, report: Report) -> None:
    apart = error(features(device, tower, pixels()[image], half=False, tuning=TUNING), RECORDED["features"][image])
    report(f"{apart:.1e} of the largest")
    assert apart < F32


@both_images
def test_f16_features(device: Device, tower: MobileNetV5, image: int, report: Report) -> None:
    apart = error(features(device, tower, pixels()[image], half=True, tuning=TUNING), RECORDED["features"][image])
    report(f"{apart:.1e} of the largest")
    assert apart < F16


def test_f16_range(device: Device, report: Report) -> None:
    """Images that float16 cannot hold are kept: what follows norms them, so the features are the same."""
    large = {
        name: values * np.float32(2**15) if "blocks.0." in name and name.endswith("bn2.weight") else values
        for name, values in weights().items()
    }
    tower = device.wait(MobileNetV5.load(CONFIG, Upload(device, Held(TABLE, large), lambda nbytes: None)))

    def first(step: EncoderStep) -> Value:
        return tower.images(step)[0].x

    assert np.abs(computed(device, first, tower.patches(pixels()[0]), tuning=TUNING)).max() > np.finfo(np.float16).max
    apart = error(features(device, tower, pixels()[0], half=True, tuning=TUNING), RECORDED["features"][0])
    report(f"{apart:.1e} of the largest")
    assert apart < F16


def test_bands(device: Device, tower: MobileNetV5, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that are made in bands of one row are the same."""
    whole = features(device, tower, pixels()[0], half=False, tuning=TUNING)
    monkeypatch.setattr(convolution, "BAND_BYTES", 1)
    assert np.array_equal(features(device, tower, pixels()[0], half=False, tuning=TUNING), whole)


def test_hard_rows(device: Device, tower: MobileNetV5) -> None:
    assert (
        error(computed(device, tower.hard_rows, np.zeros((1, 1), np.float32), tuning=TUNING), RECORDED["hard"]) < F32
    )
    assert tower.hard == range(500, 505)
