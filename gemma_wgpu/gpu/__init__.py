"""The seam between the model and the platform's GPU."""

from gemma_wgpu.gpu.device import Device


async def open_device() -> Device:
    """The most powerful GPU of this platform, opened. Raises DeviceError where there is none."""
    from gemma_wgpu.gpu.native import open_native

    return open_native()
