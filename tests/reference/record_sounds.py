"""Record sounds.npz: log-mel features of the sounds of tests/sounds.py, by transformers' feature extractor.

    python -m tests.reference.record_sounds

`<name>_frames` says how many frames there are, and `<name>` has every fifth of them, float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from transformers import Gemma3nAudioFeatureExtractor

from tests.sounds import SPEECH, made


def main() -> None:
    """Write the file beside this one."""
    extractor = Gemma3nAudioFeatureExtractor()
    recorded: dict[str, Any] = {}
    for name, sound in (made() | {"speech": soundfile.read(SPEECH, dtype="float32")[0]}).items():
        [features] = extractor(sound, return_tensors="np")["input_features"]
        recorded |= {f"{name}_frames": np.array(len(features)), name: features[::5].astype(np.float32)}
    np.savez_compressed(Path(__file__).parent / "sounds.npz", **recorded)


if __name__ == "__main__":
    main()
