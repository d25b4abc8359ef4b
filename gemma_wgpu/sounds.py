"""Sounds as people have them, made into the log-mel features that Gemma 3n's audio encoder takes.

A sound is float32 of shape (samples,) at 16,000 samples a second, from -1 to 1.
"""

from __future__ import annotations

import wave
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import RequestError
from gemma_wgpu.sources import file_bytes

RATE = 16_000
"""Samples a second."""
MOST_SECONDS = 30
MOST_RATE = 768_000
MOST_CHANNELS = 64

BINS = 128
"""Numbers that a frame of features has."""
_FRAME, _HOP, _FFT = 512, 160, 1024  # samples: 32 ms every 10 ms
_MULTIPLE = 128  # samples, of which the reference makes every sound a multiple
_LOWEST, _HIGHEST = 125.0, 7600.0  # Hz
_PREEMPHASIS = 0.97
_FLOOR = 1e-5

_SOUND = "the sound"
_TAKEN = (
    "the bytes of an audio file, a path, a data: URI, an array of samples at 16,000 a second, or such an array and "
    "its rate: (array, rate)"
)
_INTEGERS = {np.dtype(np.int16): 2.0**15, np.dtype(np.int32): 2.0**31}

Samples = NDArray[np.float32]


def opened(source: object, *, files: bool = True) -> Samples:
    """Return a sound, float32 (samples,): the mean of its channels, at RATE samples a second.

    `source` is the bytes of an audio file, a path (str or Path), a data: URI (str), an array of samples at RATE, or
    such an array and its rate, (array, rate). An array has the shape (samples,) or (samples, channels), and the type
    float (from -1 to 1), int16 or int32. Without `files`, paths are refused. WAV files with whole numbers are read
    everywhere. Natively, other WAV files, FLAC, Ogg and MP3 are read too.

    Raises RequestError, whose sentence begins with the path or with "the sound", if `source` is something else, is
    damaged, is empty, or is longer than MOST_SECONDS.
    """
    if isinstance(source, np.ndarray):
        samples, rate, name = source, RATE, _SOUND
    elif isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], np.ndarray):
        (samples, rate), name = source, _SOUND
    else:
        data, name = file_bytes(source, "sound", _TAKEN, files=files)
        samples, rate = _decoded(data, name)
    return _checked(_resampled(_mono(samples, name), rate, name), name)


def log_mel(sound: Samples) -> NDArray[np.float32]:
    """Return the features of a sound of at least a frame: float32 (frames, BINS).

    They are the logarithms of the magnitudes of the mel bands, as Gemma3nAudioFeatureExtractor of transformers has
    them for a sound alone: frames of 32 ms every 10 ms, with preemphasis inside of each.
    """
    padded = np.pad(sound.astype(np.float32), (0, -len(sound) % _MULTIPLE))
    # A frame has a sample more than it uses, as in the reference, which decides how many frames there are.
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FRAME + 1)[::_HOP, :-1]
    emphasized = np.concatenate(
        (frames[:, :1] * np.float32(1 - _PREEMPHASIS), frames[:, 1:] - np.float32(_PREEMPHASIS) * frames[:, :-1]), 1
    )
    magnitudes = np.abs(np.fft.rfft(emphasized * _window(), _FFT))
    features: NDArray[np.float32] = np.log(np.maximum(magnitudes @ _bands(), _FLOOR)).astype(np.float32)
    return features


def features_of(source: object, *, files: bool = True) -> NDArray[np.float32]:
    """Return the log-mel features of a sound, float32 (frames, BINS); a float array of that shape has them already.

    `source` and `files` are as in `opened`. Raises RequestError as it does.
    """
    if isinstance(source, np.ndarray) and source.ndim == 2 and source.shape[1] == BINS:
        features = source.astype(np.float32)
        if not len(features) or not np.isfinite(features).all():
            raise RequestError(f"{_SOUND} has no frames, or features that are not finite numbers")
        return features
    return log_mel(opened(source, files=files))


def _decoded(data: bytes, name: str) -> tuple[NDArray[Any], int]:
    """Return the samples of an audio file, (samples, channels), and their rate."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        try:
            return _wave(data)
        except (wave.Error, EOFError, ValueError, RuntimeError):
            pass  # it may have floats, which a library reads
    try:
        import soundfile
    except ImportError:
        raise RequestError(
            f"{name}: only WAV files of 16 bits can be read here; convert it to one, or install soundfile"
        ) from None
    try:
        samples, rate = soundfile.read(BytesIO(data), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError) as error:
        raise RequestError(f"{name}: this is no sound that can be read; give WAV, FLAC, Ogg or MP3") from error
    return samples, rate


def _wave(data: bytes) -> tuple[NDArray[Any], int]:
    """Return the samples of a WAV file of 8, 16 or 32 bits, and their rate. Raises what `wave` raises."""
    with wave.open(BytesIO(data)) as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        frames = file.readframes(file.getnframes())
    if width not in (1, 2, 4):
        raise ValueError("it has samples of another width")
    whole = len(frames) // (width * channels) * width * channels
    if width == 1:
        levels = np.frombuffer(frames[:whole], np.uint8).astype(np.float32)
        return ((levels - 128) / 128).reshape(-1, channels), rate
    return np.frombuffer(frames[:whole], "<i2" if width == 2 else "<i4").reshape(-1, channels), rate


def _mono(samples: NDArray[Any], name: str) -> Samples:
    """Return the mean of the channels, float32."""
    if samples.ndim not in (1, 2) or not (samples.dtype in _INTEGERS or np.issubdtype(samples.dtype, np.floating)):
        raise RequestError(
            f"{name} is a {samples.dtype} array of shape {samples.shape}; an array must be float, int16 or int32 of "
            "shape (samples,) or (samples, channels)"
        )
    if samples.ndim == 2 and not 1 <= samples.shape[1] <= MOST_CHANNELS:
        raise RequestError(f"{name} has {samples.shape[1]:,} channels; 1 to {MOST_CHANNELS} can be read")
    mono = samples.astype(np.float64) if samples.ndim == 1 else samples.mean(axis=1, dtype=np.float64)
    return (mono / _INTEGERS.get(samples.dtype, 1.0)).astype(np.float32)


def _resampled(sound: Samples, rate: object, name: str) -> Samples:
    """Return a sound at RATE, by its spectrum: nothing of it is above half the lower rate, and nothing is shifted."""
    if not isinstance(rate, int | np.integer) or not 1000 <= rate <= MOST_RATE:
        raise RequestError(f"{name} has {rate!r} samples a second; 1,000 to {MOST_RATE:,} can be read")
    _check_length(len(sound), int(rate), name)
    if rate == RATE:
        return sound
    count = -(-len(sound) * RATE // int(rate))
    # Silence after the sound keeps its end out of its beginning: a spectrum is that of something that repeats.
    seconds = -(-len(sound) // int(rate)) + 1
    spectrum = np.fft.rfft(sound, seconds * int(rate))
    kept = min(len(spectrum), seconds * RATE // 2 + 1)
    scaled = spectrum[:kept] * (RATE / int(rate))
    return np.fft.irfft(scaled, seconds * RATE)[:count].astype(np.float32)


def _check_length(samples: int, rate: int, name: str) -> None:
    if not samples:
        raise RequestError(f"{name} has no samples; give a sound of up to {MOST_SECONDS} seconds")
    if samples > MOST_SECONDS * rate:
        raise RequestError(
            f"{name} has {samples / rate:,.1f} seconds, more than the {MOST_SECONDS} that the model hears at once; "
            "cut it into parts"
        )


def _checked(sound: Samples, name: str) -> Samples:
    """Return a sound with whole frames: one that is shorter ends in silence."""
    if not np.isfinite(sound).all():
        raise RequestError(f"{name} has samples that are not finite numbers; give numbers from -1 to 1")
    return np.pad(sound, (0, max(_FRAME + 1 - len(sound), 0)))


@cache
def _window() -> NDArray[np.float32]:
    """Return a periodic Hann window."""
    at = np.arange(_FRAME, dtype=np.float32)
    return (0.5 * (1 - np.cos(2 * np.pi * at / _FRAME))).astype(np.float32)


@cache
def _bands() -> NDArray[np.float64]:
    """Return the triangles of the mel bands, (FFT / 2 + 1, BINS), whose corners are evenly spaced on HTK's scale."""
    low, high = (2595 * np.log10(1 + hertz / 700) for hertz in (_LOWEST, _HIGHEST))
    corners = 700 * (10 ** (np.linspace(low, high, BINS + 2) / 2595) - 1)
    hertz = np.arange(_FFT // 2 + 1, dtype=np.float32)[:, None] * (RATE / _FFT)
    rising = (hertz - corners[:-2]) / np.diff(corners)[:-1]
    falling = (corners[2:] - hertz) / np.diff(corners)[1:]
    return np.maximum(np.minimum(rising, falling), 0)
