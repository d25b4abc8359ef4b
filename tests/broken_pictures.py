"""What no part of the package may take for a picture, and addresses that it must not fetch pictures from."""

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes = b"", *chunks: bytes, bits: int = 1, colour: int = 0) -> bytes:
    """A PNG file of a size, with pixels that need not fit it."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(data))
    return SIGNATURE + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def picture(mode: str = "RGB", width: int = 60, height: int = 40) -> Image.Image:
    """Noise, so that a file of it is long."""
    shape = (height, width, len(Image.new(mode, (1, 1)).getbands()))
    levels = np.random.default_rng(7).integers(0, 256, shape, np.uint8)
    return Image.frombytes(mode, (width, height), levels.tobytes())


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _with_text(kind: bytes, nbytes: int) -> bytes:
    """A small picture with a text that takes `nbytes` bytes when it is unpacked."""
    return png(1, 1, b"\0\0", chunk(kind, b"name\0\0" + zlib.compress(b"a" * nbytes)))


def _tiff_in_a_circle() -> bytes:
    """A TIFF file whose only directory is empty, and is followed by itself."""
    return b"II*\0" + struct.pack("<IHI", 8, 0, 8)


_PNG, _JPEG, _GIF, _BMP, _TIFF, _WEBP = (
    encoded(picture(), kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")
)
_FLOATS = Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4))
_MILLIONS = Image.fromarray(np.full((4, 4), 1_000_000, np.int32))

BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "one zero": b"\0",
    "zeros": b"\0" * 1000,
    "a text": b"This is no picture.\n",
    "noise": np.random.default_rng(1).bytes(1000),
    "a page": b"<!DOCTYPE html><html><body><img src='a.png'></body></html>",
    "a drawing": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><rect width='9' height='9'/></svg>",
    "a document": encoded(picture(), "PDF"),
    "PostScript": encoded(picture(), "EPS"),
    "an icon": encoded(picture(), "ICO"),
    "a portable pixmap": encoded(picture(), "PPM"),
    "an archive": b"PK\x05\x06" + b"\0" * 18,
    "PNG: the signature alone": SIGNATURE,
    "PNG: cut in its header": _PNG[:20],
    "PNG: cut in its pixels": _PNG[: len(_PNG) // 2],
    "PNG: the end is missing": _PNG[:-40],
    "PNG: a wrong checksum": _PNG[:16] + bytes([_PNG[16] ^ 1]) + _PNG[17:],
    "PNG: pixels that cannot be unpacked": _PNG.replace(_PNG[60:160], b"\0" * 100),
    "PNG: no pixels": SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)) + chunk(b"IEND", b""),
    "PNG: fewer pixels than it says": png(100, 100, b"\0" * 20),
    "PNG: of no width": png(0, 5),
    "PNG: of 3 bits": png(4, 4, b"\0" * 12, bits=3),
    "PNG: 20000 x 20000": png(20_000, 20_000),
    "PNG: 100000 wide": png(100_000, 1),
    "PNG: as large as can be said": png(0x7FFF_FFFF, 0x7FFF_FFFF),
    "PNG: a text that unpacks to 100 MB": _with_text(b"zTXt", 100_000_000),
    "PNG: a colour profile that unpacks to 100 MB": _with_text(b"iCCP", 100_000_000),
    "PNG: a chunk longer than the file": SIGNATURE + struct.pack(">I", 0x7FFF_FFFF) + b"IHDR" + b"\0" * 20,
    "JPEG: the beginning alone": b"\xff\xd8\xff",
    "JPEG: noise after the beginning": b"\xff\xd8\xff\xe0" + np.random.default_rng(2).bytes(500),
    "JPEG: cut in its header": _JPEG[:100],
    "JPEG: cut in its pixels": _JPEG[: len(_JPEG) // 2],
    "GIF: the beginning alone": b"GIF89a",
    "GIF: cut in its pixels": _GIF[: len(_GIF) // 2],
    "GIF: 65535 x 65535": b"GIF89a" + struct.pack("<HH", 65535, 65535) + _GIF[10:],
    "BMP: the beginning alone": b"BM",
    "BMP: cut in its pixels": _BMP[: len(_BMP) // 2],
    "BMP: 30000 x 30000": _BMP[:18] + struct.pack("<ii", 30_000, 30_000) + _BMP[26:],
    "TIFF: the beginning alone": b"II*\0",
    "TIFF: a directory in a circle": _tiff_in_a_circle(),
    "TIFF: cut in its pixels": _TIFF[:-3000],
    "TIFF: pixels of no known white": encoded(_FLOATS, "TIFF"),
    "TIFF: pixels of a million": encoded(_MILLIONS, "TIFF"),
    "WebP: the beginning alone": b"RIFF\x10\0\0\0WEBP",
    "WebP: cut in its pixels": _WEBP[: len(_WEBP) // 2],
    "WebP: noise after the beginning": _WEBP[:20] + np.random.default_rng(3).bytes(200),
    "one kind that says it is another": SIGNATURE + _JPEG,
}

REFUSED_ADDRESSES = (
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "ftp://127.0.0.1/a.png",
    "gopher://127.0.0.1:70/_a",
    "javascript:alert(1)",
    "//127.0.0.1/a.png",
    "http://",
    "http:///a.png",
    "http://[::1/a.png",
    "http://127.0.0.1:99999/a.png",
    "http://a b/a.png",
    "http://a..b/a.png",
    "http://127.0.0.1/a.png",
    "https://127.0.0.1/a.png",
    "HTTP://127.0.0.1:8000/a.png",
    "http://127.255.255.254/",
    "http://127.1/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0177.0.0.1/",
    "http://0.0.0.0/",
    "http://0/",
    "http://localhost/a.png",
    "http://localhost:8000/v1/models",
    "http://user:word@127.0.0.1/",
    "http://example.com@127.0.0.1/",
    "http://127.0.0.1#example.com/",
    "http://127.0.0.1\\@example.com/",
    "http://169.254.169.254/latest/meta-data/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://240.0.0.1/",
    "http://[::]/",
    "http://[::1]/",
    "http://[::1]:8000/a.png",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:a9fe:a9fe]/",
    "http://[fe80::1]/",
    "http://[fc00::1]/",
    "http://[fec0::1]/",
    "http://[ff02::1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[2002:7f00:1::]/",
)
