from pathlib import Path
from typing import Any

import pytest

from gemma_wgpu.gpu.device import Device
from tests.kernels.cases import KERNELS

SHADERS = Path(__file__).parents[2] / "shaders"


def name(case: Any) -> str:
    if isinstance(case, str):
        return case
    fields = (f"{key}={getattr(value, 'name', value)}" for key, value in vars(case).items())
    return ",".join(fields).replace(" ", "")


@pytest.mark.parametrize(
    ("kernel", "case"), [(kernel, case) for kernel, module in KERNELS.items() for case in module.CASES], ids=name
)
def test_kernel(device: Device, kernel: str, case: Any) -> None:
    before = device.allocated
    device.wait(KERNELS[kernel].check(device, case))
    assert device.allocated == before


def test_every_kernel_is_checked_in_both_precisions() -> None:
    kernels = {
        path.name.split(".")[0] for path in SHADERS.glob("*.wgsl") if "fn main(" in path.read_text(encoding="utf-8")
    }
    assert set(KERNELS) == kernels
    for kernel, module in KERNELS.items():
        assert {case.half for case in module.CASES} == {False, True}, kernel
