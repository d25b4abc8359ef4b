"""The platform that models come to: in a browser they are held and kept outside of Python, elsewhere in files."""

from __future__ import annotations

import sys

from gemma_wgpu.fetch.store import Cache
from gemma_wgpu.weights.hosted import WebFolder


def web_folder(name: str) -> WebFolder | None:
    """Return the folder at a web address, if this platform holds models itself; None for another name.

    Raises ModelError if the address is not one.
    """
    if sys.platform == "emscripten":
        from gemma_wgpu.fetch.browser_store import open_folder

        return open_folder(name)
    return None


def model_cache() -> Cache:
    """Return the models that came over the network and are kept on this platform."""
    if sys.platform == "emscripten":
        from gemma_wgpu.fetch.browser_store import BrowserCache

        return BrowserCache()
    from gemma_wgpu.fetch.download import Downloads

    return Downloads()
