from collections.abc import Iterator

import pytest

from gemma_wgpu.gpu.device import Device
from gemma_wgpu.gpu.native import open_native


@pytest.fixture(scope="session")
def device() -> Iterator[Device]:
    device = open_native()
    yield device
    device.close()
