"""The seam between the model and the platform's GPU. Nothing above it knows which platform it is on."""

import sys

from gemma_wgpu.gpu.device import Device


async def open_device() -> Device:
    """Open the most powerful GPU of this platform. Raises DeviceError if there is none."""
    if sys.platform == "emscripten":
        from gemma_wgpu.gpu.browser import open_browser

        return await open_browser()
    from gemma_wgpu.gpu.native import open_native

    return open_native()


def open_device_sync() -> Device:
    """Do what `open_device` does, blocking. Raises DeviceError also if the platform cannot block."""
    if sys.platform == "emscripten":
        from gemma_wgpu.gpu.browser import block_on

        return block_on(open_device())
    from gemma_wgpu.gpu.native import open_native

    return open_native()
