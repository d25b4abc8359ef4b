"""Sounds as people have them, made into the log-mel features that Gemma 3n's audio encoder takes.

A sound is float32 of shape (samples,) at 16,000 samples a second, from -1 to 1.
"""

from __future__ import annotations

import math
import wave
from contextlib import suppress
from functools import cache
from io import BytesIO
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import RequestError
from gemma_wgpu.sources import MOST_BYTES, file_bytes

RATE = 16_000
"""Samples a second."""
MOST_SECONDS = 30
"""A sound may be so long. Longer ones are refused before they are decoded."""
LEAST_RATE, MOST_RATE = 1000, 192_000
"""The samples a second that a sound may have when it comes."""
MOST_CHANNELS = 8
"""A sound may have so many channels. With MOST_RATE, it takes 184 MB at most when it is decoded."""

BINS = 128
"""Numbers that a frame of features has."""
_FRAME, _HOP, _FFT = 512, 160, 1024  # samples: 32 ms every 10 ms
MOST_FRAMES = (MOST_SECONDS * RATE - _FRAME - 1) // _HOP + 1
"""Frames that the features of the longest sound have."""
_MULTIPLE = 128  # samples, of which the reference makes every sound a multiple
_LOWEST, _HIGHEST = 125.0, 7600.0  # Hz
_PREEMPHASIS = 0.97
_FLOOR = 1e-5
_LOUDEST = 16.0  # Decoders overshoot 1 a little; numbers of 16 bits that became floats are far above it.
_UNKNOWN = 1 << 62  # A file whose header tells no length seems to have more samples than this.

_SOUND = "the sound"
_KINDS = "WAV, FLAC, Ogg or MP3"
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
    everywhere; other WAV files, FLAC, Ogg (Vorbis or Opus) and MP3 where soundfile is installed. A sound that is
    shorter than one frame of features ends in silence.

    Raises RequestError, whose sentence begins with the path or with "the sound", if `source` is something else, is
    damaged, is empty, is longer than MOST_SECONDS, or is outside of LEAST_RATE, MOST_RATE or MOST_CHANNELS; or if
    soundfile is needed and not installed.
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
    """Return the features of a sound as `opened` returns it: float32 (frames, BINS). None of the frames is padding.

    They are the logarithms of the magnitudes of the mel bands, as Gemma3nAudioFeatureExtractor of transformers has
    them for a sound alone: frames of 32 ms every 10 ms, with preemphasis inside of each. The arithmetic is in float32
    as there, so what is a millionth of the loudest band of its frame or less is mostly rounding.
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

    `source` and `files` are as in `opened`. Raises RequestError as it does, and for features that are not finite or
    more than MOST_FRAMES.
    """
    if not (isinstance(source, np.ndarray) and source.shape[1:] == (BINS,) and _has_floats(source)):
        return log_mel(opened(source, files=files))
    with np.errstate(over="ignore"):
        features = source.astype(np.float32)
    if not 1 <= len(features) <= MOST_FRAMES:
        raise RequestError(f"{_SOUND} has {len(features):,} frames of features; there can be 1 to {MOST_FRAMES:,}")
    if not np.isfinite(features).all():
        raise RequestError(f"{_SOUND} has features that are not finite numbers")
    return features


def _decoded(data: bytes, name: str) -> tuple[NDArray[Any], int]:
    """Return the samples of an audio file, (samples, channels), and their rate."""
    if not _is_known(data):
        raise RequestError(f"{name}: this is no sound of a kind that can be read; give {_KINDS}")
    if data[:4] == b"RIFF":
        # Where `wave` fails, the file may have floats or compressed samples, which soundfile reads.
        with suppress(wave.Error, EOFError, RuntimeError):
            return _wave(data, name)
    soundfile = _soundfile(name)
    try:
        with soundfile.SoundFile(BytesIO(data)) as file:
            if file.frames >= _UNKNOWN:
                raise RequestError(f"{name}: it does not say how long it is; save it again as WAV")
            _check_form(file.frames, file.channels, file.samplerate, name)
            return file.read(dtype="float32", always_2d=True), file.samplerate
    except RequestError:
        raise
    except Exception as error:  # soundfile raises errors of several kinds when a file is damaged
        why = " ".join(str(getattr(error, "error_string", error)).split())[:200] or type(error).__name__
        raise RequestError(f"{name}: it cannot be decoded ({why}); save it again as WAV") from error


def _is_known(data: bytes) -> bool:
    """Say whether bytes begin like a file of _KINDS. What else soundfile can read is not wanted of strangers."""
    if data[:4] in (b"RIFF", b"RF64"):
        return data[8:12] == b"WAVE"
    # An MP3 file begins with tags or with a frame: eleven bits of a pattern, two of a version, and two of layer III.
    frame = len(data) > 1 and data[0] == 0xFF and data[1] & 0xE6 == 0xE2
    return frame or data.startswith((b"fLaC", b"OggS", b"ID3"))


def _soundfile(name: str) -> ModuleType:
    """Return the module soundfile. Raises RequestError if it, or the library that it stands on, is not there."""
    try:
        import soundfile
    except (ImportError, OSError):
        raise RequestError(
            f"{name}: only WAV files with whole numbers can be read without soundfile; pip install soundfile, or "
            "convert the file to WAV of 16 bits"
        ) from None
    module: ModuleType = soundfile
    return module


def _wave(data: bytes, name: str) -> tuple[NDArray[np.int32], int]:
    """Return the samples of a WAV file of whole numbers, scaled to 32 bits, and their rate.

    Raises what `wave` raises for other and damaged files, and RequestError for one that was cut off.
    """
    with wave.open(BytesIO(data)) as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        told = file.getnframes()
        numbers = file.readframes(told)
    if width > 4:
        raise wave.Error(f"its samples have {8 * width} bits")
    count = len(numbers) // (width * channels)
    _check_form(count, channels, rate, name)
    # A writer that cannot go back to the header of what it streams tells the greatest length there.
    if count < told and told * width * channels <= MOST_BYTES:
        raise RequestError(f"{name}: it ends after {count:,} of its {told:,} samples; give the whole file")
    parts = np.zeros((count * channels, 4), np.uint8)
    parts[:, 4 - width :] = np.frombuffer(numbers, np.uint8, count * channels * width).reshape(-1, width)
    if width == 1:
        parts[:, 3] ^= 0x80  # 8 bits have no sign: 128 is silence
    return parts.view("<i4").reshape(-1, channels), rate


def _has_floats(array: NDArray[Any]) -> bool:
    return np.issubdtype(array.dtype, np.floating)


def _mono(samples: NDArray[Any], name: str) -> Samples:
    """Return the mean of the channels, float32."""
    if samples.ndim not in (1, 2) or not (samples.dtype in _INTEGERS or _has_floats(samples)):
        raise RequestError(
            f"{name} is a {samples.dtype} array of shape {samples.shape}; an array must be float, int16 or int32 of "
            "shape (samples,) or (samples, channels)"
        )
    _check_channels(samples.shape[1] if samples.ndim == 2 else 1, name)
    with np.errstate(over="ignore", invalid="ignore"):
        mono = samples.astype(np.float64) if samples.ndim == 1 else samples.mean(axis=1, dtype=np.float64)
        return (mono / _INTEGERS.get(samples.dtype, 1.0)).astype(np.float32)


def _resampled(sound: Samples, rate: object, name: str) -> Samples:
    """Return a sound at RATE, by its spectrum: nothing of it is above half the lower rate, and nothing is shifted."""
    rate = _check_rate(rate, name)
    _check_length(len(sound), rate, name)
    if rate == RATE:
        return sound
    count = -(-len(sound) * RATE // rate)
    # Silence after the sound keeps its end out of its beginning: a spectrum is that of something that repeats.
    seconds = -(-len(sound) // rate) + 1
    spectrum = np.fft.rfft(sound, seconds * rate)
    kept = min(len(spectrum), seconds * RATE // 2 + 1)
    scaled = spectrum[:kept] * (RATE / rate)
    return np.fft.irfft(scaled, seconds * RATE)[:count].astype(np.float32)


def _check_form(samples: int, channels: int, rate: int, name: str) -> None:
    """Raise RequestError unless a file of so many samples in each channel is to be decoded."""
    _check_channels(channels, name)
    _check_length(samples, _check_rate(rate, name), name)


def _check_channels(channels: int, name: str) -> None:
    if not 1 <= channels <= MOST_CHANNELS:
        raise RequestError(f"{name} has {channels:,} channels; 1 to {MOST_CHANNELS} can be read")


def _check_rate(rate: object, name: str) -> int:
    """Return a rate that is in its range."""
    if not isinstance(rate, int | np.integer) or not LEAST_RATE <= rate <= MOST_RATE:
        shown = f"{rate:,}" if isinstance(rate, int | np.integer) else repr(rate)
        raise RequestError(
            f"{name} has {shown} samples a second; it must be a whole number from {LEAST_RATE:,} to {MOST_RATE:,}"
        )
    return int(rate)


def _check_length(samples: int, rate: int, name: str) -> None:
    if not samples:
        raise RequestError(f"{name} has no samples; give a sound of up to {MOST_SECONDS} seconds")
    if samples > MOST_SECONDS * rate:
        seconds = math.ceil(samples / rate * 100) / 100  # rounded up, so that it never seems to be within the limit
        raise RequestError(
            f"{name} has {seconds:,.2f} seconds, more than the {MOST_SECONDS} that the model hears at once; "
            "cut it into parts"
        )


def _checked(sound: Samples, name: str) -> Samples:
    """Return a sound with whole frames: one that is shorter ends in silence."""
    if not np.isfinite(sound).all():
        raise RequestError(f"{name} has samples that are not finite numbers; give numbers from -1 to 1")
    peak = float(np.abs(sound).max())
    if peak > _LOUDEST:
        raise RequestError(
            f"{name} has samples up to {peak:,.0f}; give numbers from -1 to 1, or divide those of 16 bits by 32,768"
        )
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
