"""The seam between the model and the platform's GPU. This file alone knows which platforms there are."""

import sys

from gemma_wgpu.fetch.store import Cache, Folder
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


def hosted_folder(name: str) -> Folder | None:
    """The folder at a web address, on a platform that holds models itself. None for other names, and elsewhere."""
    if sys.platform == "emscripten":
        from gemma_wgpu.fetch.browser_store import open_folder

        return open_folder(name)
    return None


def model_cache() -> Cache:
    """The models that this platform keeps of those that came over the network."""
    if sys.platform == "emscripten":
        from gemma_wgpu.fetch.browser_store import BrowserCache

        return BrowserCache()
    from gemma_wgpu.fetch.download import Downloads

    return Downloads()
