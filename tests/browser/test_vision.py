"""Images in the browser: features, logits and texts are the native ones, and those of transformers."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import gemma_wgpu
from gemma_wgpu import pictures
from gemma_wgpu.weights.convert import convert
from gemma_wgpu.weights.opening import open_checkpoint
from tests.browser.conftest import Chromium
from tests.reference.golden import largest_error
from tests.reference.random_1b import write_tokenizer
from tests.vision import FOLDER, GOLDEN, PIXELS

# This bounds an error, as a share of the largest feature or logit. Float32 alone comes to 1e-6.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a tower, as a model folder, with a vocabulary that makes no sense."""
    work = tmp_path_factory.mktemp("vision")
    source = copytree(FOLDER, work / "source")
    write_tokenizer(source, 576)
    with open_checkpoint(source) as checkpoint:
        convert(checkpoint, work / "model", quant="keep")
    return work / "model"


def array(text: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.frombuffer(b64decode(text), np.float32).reshape(shape)


def test_features_and_logits(chromium: Chromium, url: str, folder: Path) -> None:
    found = json.loads(chromium.run(f"from tests.browser.inside import golden_logits; await golden_logits({url!r})"))
    with gemma_wgpu.load(folder, precision="f32") as gemma:
        native = {"features": np.stack([gemma.image_features(pixels) for pixels in PIXELS])}
        golden = {"features": GOLDEN.features}
        for name in GOLDEN:
            gemma.reset()
            native[name] = gemma.logits(GOLDEN[name].ids, images=GOLDEN[name].images)
            golden[name] = GOLDEN[name].logits
    assert found.keys() == native.keys()
    for name, text in found.items():
        ours, largest = array(text, native[name].shape), np.abs(golden[name]).max()
        apart, wrong = (largest_error(ours, other[name]) / largest for other in (native, golden))
        print(f"{name}: {apart:.1e} of the largest from the native one, {wrong:.1e} from transformers")
        assert apart < CLOSE
        assert wrong < CLOSE


def test_texts(chromium: Chromium, url: str) -> None:
    found = json.loads(chromium.run(f"from tests.browser.inside import golden_texts; await golden_texts({url!r})"))
    assert found == [GOLDEN[name].greedy for name in GOLDEN]


def scene(width: int, height: int, channels: int = 3) -> Image.Image:
    """A picture with soft and with hard edges, and with noise."""
    x, y, colour = np.meshgrid(np.arange(width), np.arange(height), np.arange(channels))
    waves = 120 + 100 * np.sin(x / (9 + 4 * colour) + y / 23) + 30 * ((x // 16 + y // 16) % 2)
    noise = np.random.default_rng(7).normal(0, 8, waves.shape)
    return Image.fromarray(np.clip(waves + noise, 0, 255).astype(np.uint8))


def file(picture: Image.Image, kind: str, **options: Any) -> bytes:
    data = BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation: a quarter to the right
    return file(scene(200, 90), "JPEG", exif=exif)


FILES: dict[str, Callable[[], bytes]] = {
    "larger": lambda: file(scene(400, 300), "PNG"),
    "smaller": lambda: file(scene(50, 70), "PNG"),
    "see-through": lambda: file(scene(240, 130, 4), "PNG"),
    "turned JPEG": turned,
    "JPEG, each pixel its colour": lambda: file(scene(333, 217), "JPEG", quality=80, subsampling=0),
    "JPEG": lambda: file(scene(333, 217), "JPEG", quality=80),
    "WebP": lambda: file(scene(333, 217), "WEBP", quality=80),
    "GIF": lambda: file(scene(333, 217).quantize(64), "GIF"),
}


def test_pixels(chromium: Chromium) -> None:
    files = [make() for make in FILES.values()]
    given = [b64encode(each).decode() for each in files]
    found = json.loads(chromium.run(f"from tests.browser.inside import prepared; await prepared({given}, 112)"))
    for name, data, text in zip(FILES, files, found, strict=True):
        native = pictures.prepared(pictures.opened(data), 112)
        levels = np.abs(array(text, native.shape) - native) * 127.5
        print(f"{name}: {levels.mean():.2f} of 256 levels apart, and {levels.max():.0f} at most")
        # Pyodide's Pillow has another JPEG decoder, which makes other colours of pixels that share theirs.
        assert levels.mean() < 1 if "JPEG" in name else levels.max() == 0, name


def test_text_needs_no_pillow(chromium: Chromium, url: str) -> None:
    chromium.reload()  # for a Python that has none yet
    chromium.run(f"from tests.browser.inside import without_pillow; await without_pillow({url!r}, [2, 5, 9])")
