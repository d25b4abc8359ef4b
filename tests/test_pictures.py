"""Pictures of all kinds become the pixels that the reference makes of them, and broken ones a sentence."""

import base64
import hashlib
import io
import struct
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import numpy as np
import PIL
import pytest
from numpy.typing import NDArray
from PIL import Image

from gemma_wgpu import pictures, sources
from gemma_wgpu.errors import RequestError
from gemma_wgpu.pictures import crops, normalized, opened, prepared
from gemma_wgpu.sources import MOST_BYTES, content_key
from tests.broken_pictures import BROKEN, chunk, encoded, picture, png

Pixels = NDArray[np.uint8]
REFERENCE = Path(__file__).parent / "data" / "gemma3_vision" / "pictures.npz"
SIZE = 112  # pixels on a side of the reference's squares
LEVEL = 2 / 255
ORIENTATION = 0x0112

# What is shown of stored rows and columns, by the orientations of the EXIF standard.
SHOWN: dict[int, Any] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored[::-1].swapaxes(0, 1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored.swapaxes(0, 1)[::-1],
}


@pytest.fixture(scope="module")
def reference() -> dict[str, NDArray[Any]]:
    with np.load(REFERENCE) as arrays:
        return dict(arrays)


def levels(source: object) -> Pixels:
    image = opened(source)
    assert image.mode == "RGB"
    return np.asarray(image)


def over_white(colour: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    share = alpha.astype(np.float64) / 255
    return colour * share + 255 * (1 - share)


def oriented(orientation: object) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def refusal(source: object, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        opened(source, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 400
    return sentence


# --- what the tower takes ---


@pytest.mark.parametrize("number", [0, 1])
def test_the_pixels_are_the_references(reference: dict[str, NDArray[Any]], number: int) -> None:
    pixels = prepared(opened(reference[f"image_{number}"]), SIZE)
    assert pixels.dtype == np.float32 and pixels.shape == (3, SIZE, SIZE) and pixels.flags.c_contiguous
    same = int(PIL.__version__.partition(".")[0]) >= 13  # before, Pillow rounded otherwise
    np.testing.assert_allclose(
        pixels, reference["pixel_values_pil"][number], rtol=0, atol=1e-6 if same else LEVEL * 1.001
    )
    np.testing.assert_allclose(pixels, reference["pixel_values"][number], rtol=0, atol=LEVEL * 1.001)


@pytest.mark.parametrize("number", [0, 1])
def test_the_crops_are_the_references(reference: dict[str, NDArray[Any]], number: int) -> None:
    image = opened(reference[f"image_{number}"])
    parts = [prepared(part, SIZE) for part in [image, *crops(image, min_crop=64)]]
    expected = reference[f"pan_and_scan_{number}"]  # by torchvision, so a level may differ
    assert len(parts) == len(expected) == (3, 4)[number]
    np.testing.assert_allclose(np.stack(parts), expected, rtol=0, atol=LEVEL * 1.001)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("width", "height", "sides"),
    [
        (1199, 1000, []),
        (1200, 1000, [600, 600]),
        (1600, 1000, [800, 800]),
        (2499, 1000, [1250, 1249]),
        (2500, 1000, [834, 834, 832]),
        (3000, 1000, [1000] * 3),
        (9000, 1000, [2250] * 4),
        (511, 300, [256, 255]),
        (510, 300, []),
        (2000, 255, []),
        (1000, 1000, []),
    ],
)
def test_how_a_picture_is_cut(width: int, height: int, sides: list[int], turned: bool) -> None:
    image = picture(width=height, height=width) if turned else picture(width=width, height=height)
    parts = crops(image)
    assert [part.size for part in parts] == [(height, side) if turned else (side, height) for side in sides]
    if parts:
        whole = np.concatenate([np.asarray(part) for part in parts], axis=0 if turned else 1)
        assert np.array_equal(whole, np.asarray(image))


def test_the_options_of_cutting() -> None:
    image = picture(width=900, height=100)
    assert not crops(image) and len(crops(image, min_crop=100)) == 4
    assert len(crops(image, min_crop=100, max_crops=6)) == 6
    assert not crops(image, min_crop=100, ratio=9.1)
    assert [part.size[0] for part in crops(picture(width=9, height=2), min_crop=1)] == [3, 3, 3]  # a fourth is empty
    assert [part.size for part in crops(picture(width=90, height=90), min_crop=40, ratio=1)] == [(45, 90)] * 2
    for options in ({"min_crop": 0}, {"max_crops": 1}, {"ratio": 0.5}):
        with pytest.raises(RequestError) as caught:
            crops(image, **options)
        assert caught.value.option in options


def test_black_and_white() -> None:
    white = prepared(opened(np.full((3, 5), 255, np.uint8)), 4)
    assert np.array_equal(white, np.ones((3, 4, 4), np.float32))
    assert np.array_equal(prepared(opened(np.zeros((3, 5), np.uint8)), 4), -white)


def test_the_channels_come_first() -> None:
    pixels = prepared(Image.new("RGB", (7, 3), (0, 51, 255)), 2)
    np.testing.assert_allclose(pixels, np.array([-1, -0.6, 1], np.float32)[:, None, None] * np.ones((3, 2, 2)))


@pytest.mark.parametrize("size", [(1, 1), (5000, 3), (3, 5000)])
def test_any_shape(size: tuple[int, int]) -> None:
    image = opened(encoded(picture(width=size[0], height=size[1]), "PNG"))
    assert image.size == size
    assert prepared(image, 28).shape == (3, 28, 28)
    assert crops(image) == []


def test_pixels_that_are_prepared_are_taken_as_they_are() -> None:
    pixels = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)
    same = normalized(pixels, 8)
    assert same is not None and same.dtype == np.float32 and np.array_equal(same, pixels)
    pixels[0] = 0
    assert not np.array_equal(same, pixels)  # it is a copy
    double = normalized(np.asfortranarray(pixels.astype(np.float64)), 8)
    assert double is not None and double.flags.c_contiguous and np.array_equal(double, pixels)
    for other in (np.zeros((3, 8, 8), np.uint8), b"", "a.png", Image.new("RGB", (8, 8)), None):
        assert normalized(other, 8) is None


@pytest.mark.parametrize("shape", [(8, 8, 3), (3, 9, 8), (1, 3, 8, 8), (), (0,)])
def test_floats_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"the picture .* \(3, 8, 8\)"):
        normalized(np.zeros(shape, np.float32), 8)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_floats_that_are_not_finite_are_refused(value: float) -> None:
    pixels = np.zeros((3, 8, 8))
    pixels[2, 7, 7] = value
    with pytest.raises(RequestError, match="the picture .* finite"):
        normalized(pixels, 8)


def test_the_key_is_a_hash_of_the_content() -> None:
    pixels = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)
    bits = f"{int(hashlib.sha256(pixels.tobytes()).hexdigest(), 16):0256b}"
    assert content_key(pixels) == -1 - int(bits[:62], 2)
    assert content_key(pixels) == content_key(pixels.copy()) == content_key(np.asfortranarray(pixels))
    keys = set()
    for place in range(pixels.size):
        other = pixels.copy()
        other.flat[place] = 2
        keys.add(content_key(other))
    assert len(keys) == pixels.size and content_key(pixels) not in keys
    assert all(-(2**62) <= found < 0 for found in keys)


# --- what people have ---


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO"])
def test_every_kind_of_file_in_every_wrapping(kind: str, tmp_path: Path) -> None:
    original = Image.linear_gradient("L").convert("RGB").resize((60, 40))
    data = encoded(original, kind)
    found = levels(data)
    assert found.shape == (40, 60, 3)
    exact = kind in ("PNG", "GIF", "BMP", "TIFF")
    np.testing.assert_allclose(found.astype(int), np.asarray(original).astype(int), atol=0 if exact else 12)
    path = tmp_path / "a picture.of any name"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    for source in (
        *(bytearray(data), memoryview(data), path, str(path)),
        *(f"data:image/{kind.lower()};base64,{text}", f"data:;base64,{text}", f"DATA:a/b;c=d;BASE64,{text}"),
        *(
            f"data:,{quote_from_bytes(data)}",
            f"data:;base64,{text.rstrip('=')}",
            f"data:;base64,{text[:9]}\n{text[9:]}",
        ),
        f"data:;base64,{text.replace('+', '%2B').replace('=', '%3D')}",
        Image.open(io.BytesIO(data)),
    ):
        assert np.array_equal(levels(source), found)


@pytest.mark.parametrize("channels", [None, 3, 4])
def test_arrays(channels: int | None) -> None:
    shape = (40, 60) if channels is None else (40, 60, channels)
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if channels is None:
        expected: NDArray[Any] = np.stack([array] * 3, -1)
    else:
        expected = array if channels == 3 else over_white(array[..., :3], array[..., 3:])
    assert abs(levels(array) - expected).max() <= (0.51 if channels == 4 else 0)
    assert np.array_equal(levels(array[::-1, ::2]), levels(np.ascontiguousarray(array[::-1, ::2])))


@pytest.mark.parametrize("shape", [(3, 4, 5), (4, 4, 1), (4, 4, 2), (4,), (1, 4, 4, 3), (0, 4, 3), (4, 0)])
def test_arrays_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    assert refusal(np.zeros(shape, np.uint8)).startswith("the picture")


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, np.uint16, np.bool_, np.object_, np.str_])
def test_arrays_of_another_type_are_refused(kind: type) -> None:
    assert "uint8" in refusal(np.zeros((4, 4, 3), kind))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", None])
def test_transparent_pixels_are_laid_over_white(mode: str, kind: str | None) -> None:
    image = picture(mode)
    values = np.asarray(image)
    expected = over_white(values[..., :-1], values[..., -1:])
    assert abs(levels(encoded(image, kind) if kind else image) - expected).max() <= 1


def test_a_palette() -> None:
    image = picture("RGB").quantize(16)
    assert np.array_equal(levels(image), np.asarray(image.convert("RGB")))
    clear = image.copy()
    clear.info["transparency"] = bytes([0, 128, *[255] * 14])
    places, colours = np.asarray(clear), np.array(clear.getpalette(), np.uint8).reshape(-1, 3)[:16]
    alpha = np.array([0, 128, *[255] * 14])[:, None]
    expected = over_white(colours, alpha)[places]
    assert (places == 0).any() and (places == 1).any()
    for source in (clear, encoded(clear, "PNG")):
        assert abs(levels(source) - expected).max() <= 1
    clear.info["transparency"] = 1
    expected = over_white(colours, np.where(np.arange(16) == 1, 0, 255)[:, None])[places]
    for source in (clear, encoded(clear, "PNG"), encoded(clear, "GIF", transparency=1)):
        assert abs(levels(source) - expected).max() <= 1


def test_one_colour_that_means_transparent() -> None:
    data = png(2, 1, b"\0" + bytes([9, 8, 7, 1, 2, 3]), chunk(b"tRNS", struct.pack(">3H", 9, 8, 7)), bits=8, colour=2)
    assert levels(data).tolist() == [[[255, 255, 255], [1, 2, 3]]]


def test_greyscale_and_two_levels() -> None:
    grey = picture("L")
    for source in (grey, encoded(grey, "PNG")):
        assert np.array_equal(levels(source), np.stack([np.asarray(grey)] * 3, -1))
    two = grey.convert("1")
    for source in (two, encoded(two, "PNG"), encoded(two, "TIFF", compression="group4")):
        assert np.array_equal(levels(source), np.stack([np.asarray(two) * np.uint8(255)] * 3, -1))


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_greyscale_of_16_bits_is_scaled(order: str) -> None:
    deep = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    expected = np.stack([(deep >> 8).astype(np.uint8)] * 3, -1)
    image = Image.fromarray(deep.astype(order))
    sources = [image, encoded(image, "TIFF"), Image.fromarray(deep.astype(np.int32))]
    for source in [*sources, encoded(image, "PNG")]:
        assert np.array_equal(levels(source), expected)
    turned = encoded(image, "PNG", exif=oriented(3))
    assert np.array_equal(levels(turned), expected[::-1, ::-1])


def test_colours_of_16_bits_are_scaled() -> None:
    deep = struct.pack(">3H", 0, 30000, 65535)
    assert levels(png(1, 1, b"\0" + deep, bits=16, colour=2)).tolist() == [[[0, 117, 255]]]


def test_numbers_without_a_known_white_are_refused() -> None:
    small = np.arange(256, dtype=np.int32).reshape(16, 16)
    assert np.array_equal(levels(Image.fromarray(small))[..., 0], small)
    assert "from -1 to 0" in refusal(Image.fromarray(np.array([[0, -1]], np.int32)))
    assert "floating-point" in refusal(Image.fromarray(np.ones((2, 2), np.float32)))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_the_colours_of_a_jpeg(mode: str) -> None:
    ink = (10, 200, 60, 40)[: len(Image.new(mode, (1, 1)).getbands())]
    image = Image.new(mode, (16, 16), ink)
    if mode == "CMYK":
        expected = [(255 - colour) * (255 - ink[3]) / 255 for colour in ink[:3]]
    else:  # of JFIF
        y, blue, red = ink[0], ink[1] - 128, ink[2] - 128
        expected = [y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue]
    for source in (image, encoded(image, "JPEG", quality=100)):
        assert abs(levels(source)[8, 8] - np.clip(expected, 0, 255)).max() <= 3


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "RGBX", "HSV", "LAB"])
def test_other_modes_of_pillow(mode: str) -> None:
    image = opened(Image.new(mode, (3, 2)))
    assert (image.mode, image.size) == ("RGB", (3, 2))


def test_lab_has_no_transparency() -> None:
    # The reference's processor takes its A for alpha.
    image = Image.new("LAB", (2, 2), (128, 0, 0))
    assert np.array_equal(levels(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_pictures_are_turned_as_exif_says(kind: str, orientation: int) -> None:
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :8], stored[:8, 8:], stored[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    if kind == "JPEG":
        options["subsampling"] = 0
    data = encoded(Image.fromarray(stored), kind, exif=oriented(orientation), **options)
    expected = SHOWN[orientation](stored)
    for source in (data, Image.open(io.BytesIO(data))):
        found = levels(source)
        assert found.shape == expected.shape
        assert abs(found.astype(int) - expected).max() <= (4 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none(orientation: int) -> None:
    image = picture()
    assert np.array_equal(levels(encoded(image, "PNG", exif=oriented(orientation))), np.asarray(image))


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\1" * 90])
def test_damaged_exif_data_are_left_alone(exif: bytes) -> None:
    image = picture()
    data = encoded(image, "PNG")
    data = data[:33] + chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")) + data[33:]
    assert np.array_equal(levels(data), np.asarray(image))
    assert levels(encoded(image, "JPEG", exif=exif or b"Exif\0\0")).shape == (40, 60, 3)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert abs(levels(data).astype(int) - (255, 0, 0)).max() <= (4 if kind == "MPO" else 0)


def test_the_given_image_stays_as_it_is() -> None:
    image = picture("RGBA")
    before = image.tobytes()
    opened(image).paste((1, 2, 3), (0, 0, 60, 40))
    assert (image.mode, image.tobytes()) == ("RGBA", before)
    plain = picture()
    opened(plain).paste((1, 2, 3), (0, 0, 60, 40))
    assert np.array_equal(np.asarray(plain), np.asarray(picture()))


# --- what is refused ---


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_refused(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    data = BROKEN[name]
    assert refusal(data).startswith("the picture")
    path = tmp_path / "broken.png"
    path.write_bytes(data)
    assert refusal(path).startswith(f"{path}: ")
    assert refusal("data:image/png;base64," + base64.b64encode(data).decode()).startswith("the picture")
    assert not recwarn.list


def test_large_pictures_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = refusal(BROKEN["PNG: 20000 x 20000"])
    assert "20,000 x 20,000" in sentence and "100,000,000" in sentence
    assert "100,000 x 1 " in refusal(BROKEN["PNG: 100000 wide"])
    monkeypatch.setattr(pictures, "MOST_PIXELS", 60 * 40 - 1)
    monkeypatch.setattr(Image.Image, "convert", None)
    for source in (picture(), np.asarray(picture()), encoded(picture(), "PNG")):
        assert "60 x 40" in refusal(source)


def test_the_limits_themselves_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(), "PNG")
    monkeypatch.setattr(pictures, "MOST_PIXELS", 60 * 40)
    monkeypatch.setattr(pictures, "MOST_SIDE", 60)
    monkeypatch.setattr(sources, "MOST_BYTES", len(data))
    assert opened(data).size == (60, 40)
    assert opened("data:;base64," + base64.b64encode(data).decode()).size == (60, 40)
    monkeypatch.setattr(pictures, "MOST_SIDE", 59)
    assert "60 x 40" in refusal(data)


def test_large_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    data = path.read_bytes()
    assert refusal(path).startswith(f"{path}: it has more than 50,000,000 bytes")
    assert "50,000,000" in refusal(data)
    monkeypatch.setattr(sources, "unquote_to_bytes", None)
    assert "50,000,000" in refusal("data:;base64," + "A" * (MOST_BYTES // 3 * 4 + 8))


@pytest.mark.parametrize("most", [10, 6000, None])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_pillows_own_limit_stays_inside(
    kind: str, most: int | None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    data = encoded(picture(), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 40 - 1 if most is None else most)  # None makes Pillow warn
    try:
        assert opened(data).size == (60, 40)
    except RequestError as error:
        assert most == 10 and "limit" in str(error)
    assert not recwarn.list


def test_the_warnings_of_others_are_as_before() -> None:
    before = warnings.filters[:]
    with ThreadPoolExecutor(8) as pool:
        assert [found.shape for found in pool.map(levels, [encoded(picture(), "PNG")] * 40)] == [(40, 60, 3)] * 40
    assert warnings.filters == before


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_flipped_bytes_give_a_picture_or_a_sentence(kind: str) -> None:
    data, rng = encoded(picture(), kind), np.random.default_rng(5)
    for _ in range(40):
        other = bytearray(data[: rng.integers(len(data))] if rng.random() < 0.3 else data)
        for place in rng.integers(0, min(len(other), 200), 3) if other else ():
            other[place] = rng.integers(256)
        try:
            assert opened(bytes(other)).mode == "RGB"
        except RequestError as error:
            assert str(error).startswith("the picture")


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("data:", "comma"),
        ("data:image/png;base64", "comma"),
        ("data:,", "nothing"),
        ("data:;base64,", "nothing"),
        ("data:;base64,????", "damaged"),
        ("data:;base64,AAAAA", "damaged"),
        ("data:;base64,AA=A", "damaged"),
        ("data:;base64,iVBORw0KGgo=", "cannot be decoded"),
        ("data:;base64,äöü", "damaged"),
        ("data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture"),
        ("data:text/html,<b>", "no picture"),
    ],
)
def test_broken_data_uris(uri: str, why: str) -> None:
    sentence = refusal(uri)
    assert sentence.startswith("the picture") and why in sentence
    assert refusal(uri, files=False) == sentence


@pytest.mark.parametrize("url", ["http://example.com/a.png", "https://example.com/a.png", "HTTPS://example.com"])
def test_web_addresses_have_to_be_fetched_first(url: str) -> None:
    assert "fetch" in refusal(url) and "fetch" in refusal(url, files=False)


def test_file_addresses_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    assert opened(path).size == (60, 40)
    assert "give the path" in refusal(f"file://{path}")


def test_files_can_be_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    assert opened("data:;base64," + base64.b64encode(path.read_bytes()).decode(), files=False).size == (60, 40)
    for source in (path, str(path), f"file://{path}", "", "iVBORw0KGgo="):
        assert refusal(source, files=False) == (
            "the picture is a path, or a text that means nothing; only data: URIs are taken here"
        )


def test_paths_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: this is no file; give the path of a picture"
    assert "no file" in refusal("/dev/zero")
    assert refusal(tmp_path / "none.png") == f"{tmp_path / 'none.png'}: there is no such file"
    assert "no such file" in refusal(tmp_path / "a.png" / "b.png")
    assert refusal("a\0b") and refusal("") and refusal("~nobody-has-this-name/a.png")
    assert "5,000 characters" in refusal("A" * 5000)
    assert refusal("A" * 300).startswith("A" * 50)
    picture().save(tmp_path / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert opened("~/a.png").size == (60, 40)
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert refusal(tmp_path / "a.png") == f"{tmp_path / 'a.png'}: it cannot be read (Permission denied)"


@pytest.mark.parametrize("source", [None, 5, 1.5, ["a.png"], {"url": "a.png"}, io.BytesIO(b""), object()])
def test_other_things_are_refused(source: object) -> None:
    assert refusal(source).startswith(f"the picture is of type {type(source).__name__}; give a PIL image")


def test_a_closed_image_is_refused(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    image.close()
    assert refusal(image).startswith("the picture")
    assert "0 x 5" in refusal(Image.new("RGB", (0, 5)))


# --- Pillow ---


def test_text_alone_does_not_import_pillow() -> None:
    program = "import sys, gemma_wgpu, gemma_wgpu.pictures, gemma_wgpu.fetch.pictures; sys.exit('PIL' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_pillow_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert refusal(np.zeros((4, 4), np.uint8)) == "pictures need Pillow, which is not installed; pip install pillow"
