"""Record sounds.npz: log-mel features of the sounds of tests/sounds.py, by transformers' feature extractor.

    python -m tests.reference.record_sounds

`<name>_frames` says how many frames there are, and `<name>` has every fifth of them, float32. For the noise of each
of LENGTHS, `counts` has how many frames there are, and `ends` the last of them, float32 (lengths, 128).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from transformers import Gemma3nAudioFeatureExtractor

from tests.sounds import LENGTHS, SPEECH, lasting, made


def main() -> None:
    """Write the file beside this one."""
    extractor = Gemma3nAudioFeatureExtractor()
    recorded: dict[str, Any] = {}
    for name, sound in (made() | {"speech": soundfile.read(SPEECH, dtype="float32")[0]}).items():
        [features] = extractor(sound, return_tensors="np")["input_features"]
        recorded |= {f"{name}_frames": np.array(len(features)), name: features[::5].astype(np.float32)}
    found = [extractor(lasting(samples), return_tensors="np") for samples in LENGTHS]
    assert all(each["input_features_mask"].all() for each in found), "a frame of a sound alone is padding"
    recorded["counts"] = np.array([each["input_features"].shape[1] for each in found])
    recorded["ends"] = np.stack([each["input_features"][0, -1] for each in found])
    np.savez_compressed(Path(__file__).parent / "sounds.npz", **recorded)


if __name__ == "__main__":
    main()
