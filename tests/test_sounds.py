"""Sounds: what people have becomes samples, and samples become the features that the reference's extractor makes."""

from __future__ import annotations

import base64
import subprocess
import sys
import wave
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from gemma_wgpu.errors import RequestError
from gemma_wgpu.sounds import BINS, MOST_FRAMES, RATE, features_of, log_mel, opened
from tests.sounds import LENGTHS, SPEECH, lasting, made

with np.load(Path(__file__).parent / "reference" / "sounds.npz") as recorded:
    FEATURES: dict[str, NDArray[np.float32]] = dict(recorded)
NAMES = [*made(), "speech"]
KINDS = [
    *(("WAV", "PCM_U8"), ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "FLOAT"), ("WAV", "ULAW")),
    *(("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24")),
    *(("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")),
]
LOSSY = ("VORBIS", "OPUS", "MPEG_LAYER_III")


def assert_agree(features: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Check features against the reference's. A band may be off by a millionth of the loudest, beyond 1e-4.

    The reference computes in float32, so that quiet bands beside loud ones are rounding, which processors differ in.
    """
    bands = np.exp(expected.astype(np.float64))
    rounding = 1e-6 * bands.max(axis=1, keepdims=True) / bands
    assert features.shape == expected.shape
    assert (np.abs(features - expected) < 1e-4 + rounding).all()


def refusal(source: object, **options: bool) -> str:
    with pytest.raises(RequestError) as caught:
        features_of(source, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 400
    return sentence


def wav(samples: NDArray[np.int16], rate: int, channels: int = 1) -> bytes:
    file = BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


def encoded(samples: NDArray[Any], kind: tuple[str, str], rate: int = RATE) -> bytes:
    file = BytesIO()
    soundfile.write(file, samples, rate, format=kind[0], subtype=kind[1])
    return file.getvalue()


def tone(rate: int, seconds: float = 0.5) -> NDArray[np.float64]:
    at = np.arange(round(rate * seconds)) / rate
    return 0.5 * np.sin(2 * np.pi * 440 * at) * np.sin(np.pi * at / seconds) ** 2


def flac_of_length(samples: int) -> bytes:
    """Half a second of FLAC whose header says that there are so many samples; 0 stands for an unknown number."""
    data = bytearray(encoded(tone(RATE), ("FLAC", "PCM_16")))
    data[21] = (data[21] & 0xF0) | samples >> 32
    data[22:26] = (samples & 0xFFFF_FFFF).to_bytes(4, "big")
    return bytes(data)


# --- features ---


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_the_reference(name: str) -> None:
    features = features_of(SPEECH if name == "speech" else made()[name])
    assert features.shape == (FEATURES[f"{name}_frames"], BINS)
    assert features.dtype == np.float32
    assert_agree(features[::5], FEATURES[name])


def test_every_length_ends_as_in_the_reference() -> None:
    found = [log_mel(lasting(samples)) for samples in LENGTHS]
    assert [len(features) for features in found] == FEATURES["counts"].tolist()
    assert_agree(np.stack([features[-1] for features in found]), FEATURES["ends"])
    assert len(found[-1]) == MOST_FRAMES == 2997


@pytest.mark.parametrize("samples", [1, 100, 512])
def test_less_than_a_frame_ends_in_silence(samples: int) -> None:
    sound = opened(lasting(samples))
    assert np.array_equal(sound, np.pad(lasting(samples), (0, 513 - samples)))
    assert len(log_mel(sound)) == 1


def test_features_are_taken_as_they_are() -> None:
    features = log_mel(made()["tone"])
    assert np.array_equal(features_of(features), features)
    same = features_of(features.astype(np.float64))
    assert same.dtype == np.float32 and np.array_equal(same, features)


# --- what people have ---


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (48_000, 2), (44_100, 1), (22_050, 2)])
def test_other_rates(rate: int, channels: int) -> None:
    """A tone at another rate is the tone at ours; of two channels, the mean is taken."""
    levels = np.round(tone(rate) * 32767).astype(np.int16)
    both = np.stack([levels, np.zeros_like(levels)], 1) if channels == 2 else levels
    expected = tone(RATE) / channels
    for source in (wav(both, rate, channels), (both, rate), (both, np.int64(rate))):
        sound = opened(source)
        assert sound.shape == expected.shape and sound.dtype == np.float32
        assert np.abs(sound - expected).max() < 1e-3


def test_what_is_above_half_the_rate_is_left_out() -> None:
    at = np.arange(48_000) / 48_000
    assert np.abs(opened((np.sin(2 * np.pi * 11_000 * at) * np.sin(np.pi * at) ** 2, 48_000))).max() < 1e-3


def test_the_end_of_a_sound_is_not_heard_at_its_beginning() -> None:
    click = np.zeros(48_000)
    click[-20] = 1
    sound = np.abs(opened((click, 48_000)))
    assert sound[:1000].max() < 1e-4 and sound.argmax() == round((48_000 - 20) / 3)


def test_the_limits_themselves_are_taken() -> None:
    assert opened((np.zeros(30 * 44_100), 44_100)).shape == (480_000,)
    assert opened((np.zeros((30 * 1000, 8)), 1000)).shape == (480_000,)
    assert opened((np.zeros(192_000), 192_000)).shape == (16_000,)


@pytest.mark.parametrize("kind", KINDS)
def test_files(kind: tuple[str, str], tmp_path: Path) -> None:
    path, samples = tmp_path / "sound", tone(RATE)
    path.write_bytes(data := encoded(samples, kind))
    text = base64.b64encode(data).decode()
    for source in (path, str(path), data, bytearray(data), memoryview(data), f"data:audio/x;base64,{text}"):
        sound = opened(source)
        spectrum = np.abs(np.fft.rfft(sound, RATE))
        assert np.argmax(spectrum) == 440
        assert spectrum[440] == pytest.approx(np.abs(np.fft.rfft(samples, RATE))[440], rel=0.02)
        if kind[1] not in LOSSY:
            assert np.abs(sound - samples).max() < 0.02


@pytest.mark.parametrize("kind", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32"])
def test_whole_numbers_are_read_without_soundfile(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(3).uniform(-1, 1, (3000, 2))
    noise[:2] = [[-1, -1], [1, 1]]  # the ends of the range
    data = encoded(noise, ("WAV", kind), RATE)
    expected, _ = soundfile.read(BytesIO(data), dtype="float64")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    np.testing.assert_allclose(opened(data), expected.mean(axis=1), rtol=0, atol=1e-7)


def test_arrays() -> None:
    levels = np.random.default_rng(4).integers(-32768, 32768, (2000, 2), dtype=np.int16)
    levels[0] = -32768
    expected = (levels.astype(np.float64) / 32768).mean(axis=1)
    assert expected[0] == -1
    for source in (levels, levels.astype(np.int32) << 16, levels / 32768, (levels / 32768).astype(np.float32)):
        np.testing.assert_allclose(opened(source), expected, rtol=0, atol=1e-7)
    np.testing.assert_allclose(opened(levels[::-1, 1]), levels[::-1, 1] / 32768, rtol=0, atol=1e-7)
    assert np.array_equal(opened(levels[:, :1]), opened(levels[:, 0]))


def test_the_given_array_stays_as_it_is() -> None:
    given = lasting(1000)
    opened(given)[:] = 0
    log_mel(given)
    assert np.array_equal(given, lasting(1000))


# --- files that are not whole ---


def test_a_wav_file_that_was_streamed_is_taken() -> None:
    whole = encoded(tone(RATE), ("WAV", "PCM_16"))
    streamed = whole[:40] + b"\xff\xff\xff\xff" + whole[44:]
    assert whole[36:40] == b"data"
    assert np.array_equal(opened(streamed), opened(whole))


def test_a_file_that_was_cut_is_refused() -> None:
    whole = encoded(tone(RATE), ("WAV", "PCM_16"))
    assert refusal(whole[:-100]) == "the sound: it ends after 7,950 of its 8,000 samples; give the whole file"
    flac = encoded(tone(RATE), ("FLAC", "PCM_16"))
    assert refusal(flac[: len(flac) // 2]).startswith("the sound: it cannot be decoded (")


def test_long_sounds_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    monkeypatch.setattr(np, "frombuffer", None)
    for data in (flac_of_length(480_001), wav(np.zeros(480_001, np.int16), RATE)):
        assert refusal(data).startswith("the sound has 30.01 seconds, more than the 30")
    assert refusal(flac_of_length((1 << 36) - 1)).startswith("the sound has 4,294,967.30 seconds")
    assert refusal(flac_of_length(0)) == "the sound: it does not say how long it is; save it again as WAV"


@pytest.mark.parametrize("kind", [("WAV", "PCM_16"), ("WAV", "FLOAT"), *KINDS[-5:]])
def test_flipped_bytes_give_a_sound_or_a_sentence(kind: tuple[str, str]) -> None:
    data, rng = encoded(tone(RATE), kind), np.random.default_rng(5)
    for _ in range(60):
        other = bytearray(data[: rng.integers(len(data))] if rng.random() < 0.3 else data)
        for place in rng.integers(0, min(len(other), 200), 3) if other else ():
            other[place] = rng.integers(256)
        try:
            assert opened(bytes(other)).dtype == np.float32
        except RequestError as error:
            assert str(error).startswith("the sound")


# --- what is refused ---


NO_SAMPLES = "the sound has no samples; give a sound of up to 30 seconds"
NO_KIND = "the sound: this is no sound of a kind that can be read; give WAV, FLAC, Ogg or MP3"
NOT_DECODED = "the sound: it cannot be decoded ("


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros(0, np.float32), NO_SAMPLES),
        (np.zeros((0, 2), np.int16), NO_SAMPLES),
        (wav(np.zeros(0, np.int16), 16_000), NO_SAMPLES),
        (
            np.zeros(480_001, np.float32),
            "the sound has 30.01 seconds, more than the 30 that the model hears at once; cut it into parts",
        ),
        (
            (np.zeros(400_000, np.float32), 8000),
            "the sound has 50.00 seconds, more than the 30 that the model hears at once; cut it into parts",
        ),
        (b"", "the sound: there is nothing in it; give a sound"),
        (b"no sound at all", NO_KIND),
        (b"\xff\xf1" + bytes(100), NO_KIND),  # AAC
        (encoded(tone(RATE), ("AIFF", "PCM_16")), NO_KIND),
        (wav(np.ones(99, np.int16), 16_000)[:30], NOT_DECODED),
        (SPEECH.read_bytes()[:60], NOT_DECODED),
        (b"\xff\xfb" + bytes(100), NOT_DECODED),
        (b"OggS" + bytes(100), NOT_DECODED),
        (np.array([0.0, np.nan]), "the sound has samples that are not finite numbers; give numbers from -1 to 1"),
        (np.array([0.0, np.inf]), "the sound has samples that are not finite numbers; give numbers from -1 to 1"),
        (np.full(9, 1e300), "the sound has samples that are not finite numbers; give numbers from -1 to 1"),
        (
            encoded(np.array([0.0, np.nan]), ("WAV", "FLOAT")),
            "the sound has samples that are not finite numbers; give numbers from -1 to 1",
        ),
        (
            np.array([0.0, -20_000.0]),
            "the sound has samples up to 20,000; give numbers from -1 to 1, or divide those of 16 bits by 32,768",
        ),
        ((np.zeros(9), 12), "the sound has 12 samples a second; it must be a whole number from 1,000 to 192,000"),
        ((np.zeros(9), "fast"), "the sound has 'fast' samples a second; it must be a whole number"),
        ((np.zeros(9), 44_100.0), "the sound has 44100.0 samples a second; it must be a whole number"),
        (wav(np.zeros(9, np.int16), 200_000), "the sound has 200,000 samples a second; it must be a whole number"),
        (encoded(np.zeros(9), ("FLAC", "PCM_16"), 200_000), "the sound has 200,000 samples a second;"),
        (np.zeros((9, 65)), "the sound has 65 channels; 1 to 8 can be read"),
        (np.zeros((9, 0)), "the sound has 0 channels; 1 to 8 can be read"),
        (wav(np.zeros(90, np.int16), RATE, 9), "the sound has 9 channels; 1 to 8 can be read"),
        (encoded(np.zeros((9, 9)), ("WAV", "FLOAT")), "the sound has 9 channels; 1 to 8 can be read"),
        (
            np.zeros(9, np.uint8),
            "the sound is a uint8 array of shape (9,); an array must be float, int16 or int32 of shape "
            "(samples,) or (samples, channels)",
        ),
        (np.zeros((9, 2, 2)), "the sound is a float64 array of shape (9, 2, 2); an array must be float, int16"),
        (
            7,
            "the sound is of type int; give the bytes of an audio file, a path, a data: URI, an array of "
            "samples at 16,000 a second, or such an array and its rate: (array, rate)",
        ),
        ((RATE, np.zeros(9)), "the sound is of type tuple; give the bytes"),
        ("nowhere.wav", "nowhere.wav: there is no such file"),
        (
            "https://host/a.wav",
            "the sound is a web address, which has to be fetched first; give the bytes that "
            "gemma_wgpu.fetch.sounds.fetch_sound returns",
        ),
        ("data:audio/wav;base64,%%", "the sound: its data: URI is damaged"),
        (np.full((3, BINS), np.nan, np.float32), "the sound has features that are not finite numbers"),
        (np.zeros((0, BINS), np.float32), "the sound has 0 frames of features; there can be 1 to 2,997"),
        (np.zeros((2998, BINS), np.float32), "the sound has 2,998 frames of features; there can be 1 to 2,997"),
        (np.zeros((3, BINS), np.int16), "the sound has 128 channels; 1 to 8 can be read"),
    ],
)
def test_what_is_no_sound(source: object, message: str, recwarn: pytest.WarningsRecorder) -> None:
    assert refusal(source).startswith(message)
    assert not recwarn.list


def test_a_sentence_about_a_file_begins_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(wav(np.zeros(480_001, np.int16), RATE))
    assert refusal(path).startswith(f"{path} has 30.01 seconds")
    path.write_bytes(b"no sound at all")
    assert refusal(path).startswith(f"{path}: this is no sound of a kind")


def test_paths_can_be_refused() -> None:
    for source in (SPEECH, str(SPEECH)):
        assert "only data: URIs are taken here" in refusal(source, files=False)


# --- soundfile ---


def test_text_alone_does_not_import_soundfile() -> None:
    program = (
        "import sys, gemma_wgpu, gemma_wgpu.sounds, gemma_wgpu.fetch.sounds; sys.exit('soundfile' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("why", ["ImportError", "OSError('sndfile library not found')"])
def test_soundfile_is_missing(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "soundfile.py").write_text(f"raise {why}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "soundfile")
    assert refusal(SPEECH) == (
        f"{SPEECH}: only WAV files with whole numbers can be read without soundfile; pip install soundfile, or "
        "convert the file to WAV of 16 bits"
    )
    assert len(opened(wav(np.zeros(24_000, np.int16), 48_000))) == 8000
