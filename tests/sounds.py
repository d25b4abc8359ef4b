"""Sounds that tests make, float32 at 16,000 samples a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RATE = 16_000
SPEECH = Path(__file__).parent / "data" / "speech.flac"  # espeak-ng says a sentence

# Around multiples of 128 and of 160 samples, and where one more frame of 513 samples begins to fit.
LENGTHS = (
    *(513, 639, 640, 641, 672, 673, 767, 768, 769, 800, 801, 833, 896, 897, 992, 993, 1280, 1281),
    *(15_999, 16_000, 16_001, 479_999, 480_000),
)


def lasting(samples: int) -> NDArray[np.float32]:
    """Return noise of so many samples."""
    return np.resize(made()["noise"], samples)


def made() -> dict[str, NDArray[np.float32]]:
    """Return a tone, a sweep, silence and noise, of lengths that are no multiples of anything."""
    at = np.arange(2 * RATE) / RATE
    noise = np.random.Generator(np.random.PCG64(15)).standard_normal(RATE + 4321)
    sounds = {
        "tone": 0.4 * np.sin(2 * np.pi * 440 * at[: RATE + 333]),
        "sweep": 0.3 * np.sin(2 * np.pi * (50 + 1900 * at) * at),
        "silence": np.zeros(RATE // 2 + 1),
        "noise": 0.1 * noise,
    }
    return {name: sound.astype(np.float32) for name, sound in sounds.items()}
