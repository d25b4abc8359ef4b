"""The seam between the model and the platform's GPU. This file alone knows which platforms there are."""

import sys

from gemma_wgpu.gpu.device import Device


async def open_device() -> Device:
    """The most powerful GPU of this platform, opened. Raises DeviceError where there is none."""
    if sys.platform == "emscripten":
        from gemma_wgpu.gpu.browser import open_browser

        return await open_browser()
    from gemma_wgpu.gpu.native import open_native

    return open_native()


def open_device_sync() -> Device:
    """`open_device`, blocking. Raises DeviceError also where the platform cannot block."""
    if sys.platform == "emscripten":
        from gemma_wgpu.gpu.browser import block_on

        return block_on(open_device())
    from gemma_wgpu.gpu.native import open_native

    return open_native()
