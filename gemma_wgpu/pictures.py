"""Pictures as people have them, made into the pixels that the vision tower of Gemma 3 takes.

Pillow is imported when the first picture comes, so that whoever uses text alone does not need it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import RequestError
from gemma_wgpu.options import Range
from gemma_wgpu.sources import file_bytes

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

MOST_PIXELS = 100_000_000
"""A picture may have so many pixels."""
MOST_SIDE = 65_535
"""A picture may be so many pixels wide or high. Beyond that, making it smaller takes gigabytes of memory."""

_KINDS = "PNG, JPEG, WebP, GIF, BMP or TIFF"
_TAKEN = (
    "a PIL image, a uint8 array of shape (H, W), (H, W, 3) or (H, W, 4), the bytes of an image file, a path, or a "
    "data: URI"
)
_PICTURE = "the picture"

# Pictures are decoded one at a time: a large one takes a gigabyte, and Python's way to silence warnings is not made
# for several threads.
_DECODING = Lock()


def opened(source: object, *, files: bool = True) -> Image:
    """Return a picture as a PIL image of mode RGB, turned as its EXIF orientation says.

    `source` is a PIL image, a uint8 array of shape (H, W), (H, W, 3) or (H, W, 4), the bytes of an image file, a path
    (str or Path), or a data: URI (str). Without `files`, paths are refused. The kinds of files are PNG, JPEG, WebP,
    GIF, BMP and TIFF. Of several frames, the first is taken.

    What is transparent is laid over white, as the reference's image processor does. 16 bits are scaled to 8.

    Raises RequestError, whose sentence begins with the path or with "the picture", if `source` is something else, is
    damaged, or is above MOST_PIXELS, MOST_SIDE or MOST_BYTES.
    """
    pil = _pil()
    if isinstance(source, pil.Image):
        return _rgb(source, _PICTURE)
    if isinstance(source, np.ndarray):
        return _rgb(_from_array(source), _PICTURE)
    return _decoded(*file_bytes(source, "picture", _TAKEN, files=files))


def prepared(image: Image, size: int, *, mean: float = 0.5, deviation: float = 0.5) -> NDArray[np.float32]:
    """Return the pixels of an image of mode RGB, float32 of shape (3, size, size).

    They are (c - mean) / deviation, where c is 0 for black and 1 for white.

    The image is resized straight to a square, whatever its shape, with Pillow's bilinear filter, and rounded to 256
    levels. The values equal those of the reference's processor that uses Pillow, if both have the same Pillow. They
    differ by at most one of 256 levels (0.0079) from those of its processor that uses torchvision, and between Pillow
    12 and 13, which round differently.
    """
    from PIL.Image import Resampling

    square = image.resize((size, size), Resampling.BILINEAR)
    levels = np.asarray(square, dtype=np.float32).transpose(2, 0, 1)
    return np.ascontiguousarray((levels / 255 - mean) / deviation)


def crops(image: Image, *, min_crop: int = 256, max_crops: int = 4, ratio: float = 1.2) -> list[Image]:
    """Return the parts of a long image that a model should see beside the whole ("pan and scan").

    An image whose long side is at least `ratio` times its short side is cut across its long side, into at least two
    and at most `max_crops` parts that are about square. The last part may be a little smaller. There are none if a
    side of a part would have less than `min_crop` pixels.

    Raises RequestError, which names the option, for an option that is out of range.
    """
    Range("", 1, None, whole=True).check("min_crop", min_crop)
    Range("", 2, None, whole=True).check("max_crops", max_crops)
    Range("", 1, 1000).check("ratio", ratio)
    width, height = image.size
    long, short = max(width, height), min(width, height)
    if long / short < ratio:
        return []
    count = min(max(min(math.floor(long / short + 0.5), long // min_crop), 2), max_crops)
    side = math.ceil(long / count)
    if min(side, short) < min_crop:
        return []
    ranges = [(start, min(start + side, long)) for start in range(0, long, side)]
    if width >= height:
        return [image.crop((start, 0, end, height)) for start, end in ranges]
    return [image.crop((0, start, width, end)) for start, end in ranges]


def views(
    source: object,
    size: int,
    *,
    mean: float = 0.5,
    deviation: float = 0.5,
    pan_and_scan: bool = False,
    files: bool = True,
) -> list[NDArray[np.float32]]:
    """Return the pixels of a picture, (3, size, size), and with `pan_and_scan` those of its crops after it.

    `source` and `files` are as in `opened`, and `mean` and `deviation` as in `prepared`. Raises RequestError as
    `opened` does.
    """
    picture = opened(source, files=files)
    parts = crops(picture) if pan_and_scan else []
    return [prepared(each, size, mean=mean, deviation=deviation) for each in (picture, *parts)]


def normalized(source: object, size: int) -> NDArray[np.float32] | None:
    """Return a copy of pixels that are prepared already, float32 of shape (3, size, size); None for another source.

    An array of floating-point numbers counts as prepared. Raises RequestError if such an array has another shape, or
    a value that is not a finite float32.
    """
    if not isinstance(source, np.ndarray) or not np.issubdtype(source.dtype, np.floating):
        return None
    if source.shape != (3, size, size):
        raise RequestError(
            f"{_PICTURE} is a {source.dtype} array of shape {source.shape}; an array of floating-point numbers must "
            f"have the shape (3, {size}, {size}) and values from -1 to 1, and an array of levels must be uint8"
        )
    with np.errstate(over="ignore"):
        pixels = np.array(source, dtype=np.float32, order="C")
    if not np.isfinite(pixels).all():
        raise RequestError(f"{_PICTURE} has values that are not finite numbers; give values from -1 to 1")
    return pixels


def _pil() -> ModuleType:
    """Return the module PIL.Image. Raises RequestError if Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise RequestError("pictures need Pillow, which is not installed; pip install pillow") from None
    return Image


def _from_array(array: NDArray[np.generic]) -> Image:
    """Return an array of levels as an image. Raises RequestError if it is not one."""
    grey, coloured = array.ndim == 2, array.ndim == 3 and array.shape[-1] in (3, 4)
    if array.dtype != np.uint8 or not (grey or coloured):
        raise RequestError(
            f"{_PICTURE} is a {array.dtype} array of shape {array.shape}; an array must be uint8 of shape (H, W), "
            "(H, W, 3) or (H, W, 4)"
        )
    _check_size(array.shape[1], array.shape[0], _PICTURE)
    image: Image = _pil().fromarray(array)
    return image


def _decoded(data: bytes, name: str) -> Image:
    """Return the picture in the bytes of an image file. `name` begins the sentence of a RequestError."""
    reader = _reader(data)
    if reader is None:
        raise RequestError(f"{name}: this is no picture of a kind that can be read; give {_KINDS}")
    with _as_request_error(name):
        image = reader(BytesIO(data))
    return _rgb(image, name)


def _reader(data: bytes) -> type[ImageFile] | None:
    """Return Pillow's class for the kind of file that begins like `data`; None for other kinds."""
    from PIL.BmpImagePlugin import BmpImageFile
    from PIL.GifImagePlugin import GifImageFile
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile
    from PIL.TiffImagePlugin import TiffImageFile
    from PIL.WebPImagePlugin import WebPImageFile

    readers: dict[bytes, type[ImageFile]] = {
        b"\x89PNG\r\n\x1a\n": PngImageFile,
        b"\xff\xd8\xff": JpegImageFile,  # for files of several pictures, MPO, as well
        b"GIF87a": GifImageFile,
        b"GIF89a": GifImageFile,
        b"BM": BmpImageFile,
        b"II*\0": TiffImageFile,
        b"MM\0*": TiffImageFile,
    }
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImageFile
    return next((reader for beginning, reader in readers.items() if data.startswith(beginning)), None)


def _rgb(image: Image, name: str) -> Image:
    """Decode an image and return it upright, in mode RGB, without transparency."""
    _check_size(*image.size, name)
    with _as_request_error(name):
        image.load()
        image = _of_8_bits(_upright(image), name)
        if image.mode == "La":
            image = image.convert("LA")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = _pil().new("RGBA", image.size, "white")
            image = _pil().alpha_composite(white, image)
        return image.convert("RGB")


def _of_8_bits(image: Image, name: str) -> Image:
    """Return an image whose pixels have at most 256 levels: Pillow would make most others white.

    Raises RequestError for pixels of which nothing says which value is white.
    """
    if image.mode == "F":
        raise RequestError(f"{name}: its pixels are floating-point numbers; convert it to 8 bits first")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise RequestError(f"{name}: its pixels are numbers from {low:,} to {high:,}; convert it to 8 bits first")
    if image.mode == "I" and high <= 0xFF:
        return image
    grey: Image = _pil().fromarray((values >> 8).astype(np.uint8))
    return grey


def _upright(image: Image) -> Image:
    """Return an image turned as its EXIF orientation says; as it is if the EXIF data are damaged."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are decoded already, so this is about the EXIF data
        return image


def _check_size(width: int, height: int, name: str) -> None:
    """Raise RequestError for a picture without pixels, or with too many."""
    if not width or not height:
        raise RequestError(f"{name}: it has {width} x {height} pixels; there must be at least one")
    if width * height > MOST_PIXELS or max(width, height) > MOST_SIDE:
        raise RequestError(
            f"{name}: it has {width:,} x {height:,} pixels; make it smaller first, as {MOST_PIXELS:,} in all and "
            f"{MOST_SIDE:,} on a side are the limits"
        )


@contextmanager
def _as_request_error(name: str) -> Iterator[None]:
    """Make a RequestError of whatever Pillow raises about a picture, and let none of its warnings out."""
    with _DECODING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except RequestError:
            raise
        except _pil().DecompressionBombError as error:
            raise RequestError(
                f"{name}: it has more than {MOST_PIXELS:,} pixels, which is the limit; make it smaller first"
            ) from error
        except MemoryError as error:
            raise RequestError(f"{name}: the memory does not suffice for it; make it smaller first") from error
        except Exception as error:  # Pillow raises errors of many kinds when a file is damaged
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise RequestError(f"{name}: it cannot be decoded ({why}); save it again as PNG or JPEG") from error
