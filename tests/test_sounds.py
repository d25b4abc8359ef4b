"""Sounds: what people have becomes samples, and samples become the features that the reference's extractor makes."""

from __future__ import annotations

import base64
import wave
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from gemma_wgpu.errors import RequestError
from gemma_wgpu.sounds import BINS, RATE, features_of, log_mel, opened
from tests.sounds import SPEECH, made

with np.load(Path(__file__).parent / "reference" / "sounds.npz") as recorded:
    FEATURES: dict[str, NDArray[np.float32]] = dict(recorded)
NAMES = [*made(), "speech"]


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_the_reference(name: str) -> None:
    features = features_of(SPEECH if name == "speech" else made()[name])
    assert features.shape == (FEATURES[f"{name}_frames"], BINS)
    assert features.dtype == np.float32
    assert np.abs(features[::5] - FEATURES[name]).max() < 1e-4


def test_how_many_frames_there_are() -> None:
    """As many as fit, with a sample to spare, into what is filled up to a multiple of 128 samples."""
    for samples, frames in ((1, 1), (513, 1), (640, 1), (641, 2), (16_000, 97), (480_000, 2997)):
        assert len(features_of(np.zeros(samples, np.float32))) == frames


def wav(samples: NDArray[np.int16], rate: int, channels: int = 1) -> bytes:
    file = BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


def tone(rate: int, seconds: float = 0.5) -> NDArray[np.float64]:
    at = np.arange(round(rate * seconds)) / rate
    return 0.5 * np.sin(2 * np.pi * 440 * at) * np.sin(np.pi * at / seconds) ** 2


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (48_000, 2), (44_100, 1), (22_050, 2)])
def test_other_rates(rate: int, channels: int) -> None:
    """A tone at another rate is the tone at ours; of two channels, the mean is taken."""
    levels = np.round(tone(rate) * 32767).astype(np.int16)
    both = np.stack([levels, np.zeros_like(levels)], 1) if channels == 2 else levels
    expected = tone(RATE) / channels
    for source in (wav(both, rate, channels), (both, rate)):
        sound = opened(source)
        assert sound.shape == expected.shape
        assert np.abs(sound - expected).max() < 1e-3


def test_what_is_above_half_the_rate_is_left_out() -> None:
    at = np.arange(48_000) / 48_000
    assert np.abs(opened((np.sin(2 * np.pi * 11_000 * at) * np.sin(np.pi * at) ** 2, 48_000))).max() < 1e-3


@pytest.mark.parametrize(
    "kind",
    [
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "FLOAT"),
        ("WAV", "PCM_U8"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("MP3", "MPEG_LAYER_III"),
    ],
)
def test_files(kind: tuple[str, str], tmp_path: Path) -> None:
    path, samples = tmp_path / "sound", tone(RATE)
    soundfile.write(path, samples, RATE, format=kind[0], subtype=kind[1])
    data = path.read_bytes()
    for source in (path, str(path), data, "data:audio/x;base64," + base64.b64encode(data).decode()):
        sound = opened(source)
        spectrum = np.abs(np.fft.rfft(sound, RATE))
        assert np.argmax(spectrum) == 440
        assert spectrum[440] == pytest.approx(np.abs(np.fft.rfft(samples, RATE))[440], rel=0.02)
        if kind[0] not in ("OGG", "MP3"):
            assert np.abs(sound - samples).max() < 1e-2


def test_features_are_taken_as_they_are() -> None:
    features = log_mel(made()["tone"])
    assert np.array_equal(features_of(features), features)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros(0, np.float32), "the sound has no samples; give a sound of up to 30 seconds"),
        (wav(np.zeros(0, np.int16), 16_000), "the sound has no samples; give a sound of up to 30 seconds"),
        (
            np.zeros(480_001, np.float32),
            "the sound has 30.0 seconds, more than the 30 that the model hears at once; cut it into parts",
        ),
        (
            (np.zeros(400_000, np.float32), 8000),
            "the sound has 50.0 seconds, more than the 30 that the model hears at once; cut it into parts",
        ),
        (b"", "the sound: there is nothing in it; give a sound"),
        (b"no sound at all", "the sound: this is no sound that can be read; give WAV, FLAC, Ogg or MP3"),
        (
            wav(np.ones(99, np.int16), 16_000)[:30],
            "the sound: this is no sound that can be read; give WAV, FLAC, Ogg or MP3",
        ),
        (SPEECH.read_bytes()[:60], "the sound: this is no sound that can be read; give WAV, FLAC, Ogg or MP3"),
        (np.array([0.0, np.nan]), "the sound has samples that are not finite numbers; give numbers from -1 to 1"),
        ((np.zeros(9), 12), "the sound has 12 samples a second; 1,000 to 768,000 can be read"),
        ((np.zeros(9), "fast"), "the sound has 'fast' samples a second; 1,000 to 768,000 can be read"),
        (np.zeros((9, 65)), "the sound has 65 channels; 1 to 64 can be read"),
        (
            np.zeros(9, np.uint8),
            "the sound is a uint8 array of shape (9,); an array must be float, int16 or int32 of shape "
            "(samples,) or (samples, channels)",
        ),
        (
            7,
            "the sound is of type int; give the bytes of an audio file, a path, a data: URI, an array of "
            "samples at 16,000 a second, or such an array and its rate: (array, rate)",
        ),
        ("nowhere.wav", "nowhere.wav: there is no such file"),
        (
            "https://host/a.wav",
            "the sound is a web address, which has to be fetched first; give the bytes that "
            "gemma_wgpu.fetch.pictures.fetch_picture returns",
        ),
        ("data:audio/wav;base64,%%", "the sound: its data: URI is damaged"),
        (np.full((3, BINS), np.nan, np.float32), "the sound has no frames, or features that are not finite numbers"),
    ],
)
def test_what_is_no_sound(source: object, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        features_of(source)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_paths_can_be_refused() -> None:
    with pytest.raises(RequestError, match="only data: URIs are taken here"):
        opened(str(SPEECH), files=False)
