"""The small audio encoder of usm.py against transformers: short sounds, and some that are longer than a chunk."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_wgpu.gpu.device import Device
from gemma_wgpu.gpu.native import open_native
from gemma_wgpu.models.usm import Usm
from gemma_wgpu.ops.tuning import Tuning
from gemma_wgpu.weights.upload import Upload
from tests.held import Held
from tests.reference.golden import FOLDER, largest_error
from tests.reference.usm import CONFIG, LENGTHS, TABLE, sound, weights
from tests.towers import computed, features

Report = Callable[[str], None]

with np.load(FOLDER / "usm.npz") as _recorded:
    RECORDED: dict[str, NDArray[np.float32]] = dict(_recorded)

# Of the largest number. In float16 the attention's scores, which are large here, are off by what rounding does to the
# frames that they are computed from.
F32 = 1e-5
F16 = 1e-2

# Kernels as GPUs have them, though these run on a CPU: they are compiled in half the time.
TUNING = Tuning(16, cpu=False)

every_length = pytest.mark.parametrize("frames", LENGTHS)


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    device = open_native()
    yield device
    device.close()


@pytest.fixture(scope="module")
def tower(device: Device) -> Usm:
    return device.wait(Usm.load(CONFIG, Upload(device, Held(TABLE, weights()), lambda _: None)))


def error(ours: NDArray[np.float32], name: str) -> float:
    return largest_error(ours, RECORDED[name]) / float(np.abs(RECORDED[name]).max())


@every_length
def test_encoded(device: Device, tower: Usm, frames: int, report: Report) -> None:
    apart = error(computed(device, tower.encoded, sound(frames), tuning=TUNING), f"encoded_{frames}")
    report(f"{apart:.1e} of the largest")
    assert apart < F32


@every_length
def test_features(device: Device, tower: Usm, frames: int, report: Report) -> None:
    ours = features(device, tower, sound(frames), half=False, tuning=TUNING)
    apart = error(ours, f"features_{frames}")
    report(f"{apart:.1e} of the largest")
    assert apart < F32
    own = CONFIG.tokens_of(frames)
    assert own == len(RECORDED[f"encoded_{frames}"])
    assert (ours[own:] == ours[-1]).all()


@every_length
def test_f16_features(device: Device, tower: Usm, frames: int, report: Report) -> None:
    apart = error(features(device, tower, sound(frames), half=True, tuning=TUNING), f"features_{frames}")
    report(f"{apart:.1e} of the largest")
    assert apart < F16


def test_hard_rows(device: Device, tower: Usm) -> None:
    assert error(computed(device, tower.hard_rows, sound(1), tuning=TUNING), "hard") < F32
    assert tower.hard == range(500, 505)


def test_the_lengths_tell_something() -> None:
    """A sound ends within a chunk of 12, just behind one, and fills all tokens."""
    quarters = [-(-frames // 4) for frames in LENGTHS]
    assert [quarter // CONFIG.conf_attention_chunk_size for quarter in quarters] == [0, 1, 3]
    assert quarters[1] % CONFIG.conf_attention_chunk_size == 1
    assert [CONFIG.tokens_of(frames) for frames in LENGTHS] == [1, 4, CONFIG.tokens.count]
