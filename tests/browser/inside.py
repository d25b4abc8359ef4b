"""What the tests call inside the browser, where there is neither pytest nor anything but numpy."""

from __future__ import annotations

from gemma_wgpu.gpu import open_device
from gemma_wgpu.gpu.device import Device
from tests.kernels.cases import KERNELS

_devices: list[Device] = []


async def shared_device() -> Device:
    """The device that the checks of the kernels share."""
    if not _devices:
        _devices.append(await open_device())
    return _devices[0]


async def check_kernel(kernel: str, case: int) -> None:
    """As test_kernel does natively."""
    device, module = await shared_device(), KERNELS[kernel]
    before = device.allocated
    await module.check(device, module.CASES[case])
    assert device.allocated == before
