"""Sounds at web addresses."""

from __future__ import annotations

from gemma_wgpu.fetch.media import fetch_bytes


def fetch_sound(url: str, *, private: bool = False) -> bytes:
    """Return the bytes at a web address, which begins with http:// or https://. They may be no sound.

    Without `private`, addresses of private networks are refused. Raises RequestError as `fetch_bytes` does.
    """
    return fetch_bytes(url, "sound", "audio/*", private=private)
