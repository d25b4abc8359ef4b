"""The downloads that this machine keeps."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_wgpu import ModelError, cache
from gemma_wgpu.fetch.cache import Cached
from gemma_wgpu.fetch.download import download
from gemma_wgpu.models.gemma3 import Gemma3Config
from gemma_wgpu.weights.convert import convert
from gemma_wgpu.weights.opening import open_checkpoint
from tests.host import Host, answer
from tests.tiny import HF, random_gguf


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("GEMMA_WGPU_CACHE", str(tmp_path / "cache"))
    random_gguf(tmp_path / "tiny.gguf", Gemma3Config.from_hf(HF), {})
    with open_checkpoint(tmp_path / "tiny.gguf") as original:
        convert(original, tmp_path / "tiny", quant="keep", shard_size=200_000)
    host = Host(tmp_path / "tiny")
    yield host
    host.close()


def nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_WGPU_CACHE", str(tmp_path / "none"))
    assert cache.list() == []
    assert cache.size() == 0


def test_list_size_and_delete(host: Host, tmp_path: Path) -> None:
    other = f"{host.address}/models/another"
    whole = nbytes(host.folder)
    for url in (f"{host.url}/manifest.json", other):
        download(url)
    assert cache.list() == [Cached(other, whole + len(other)), Cached(host.url, whole + len(host.url))]
    assert cache.size() == nbytes(tmp_path / "cache") == sum(model.nbytes for model in cache.list())
    cache.delete(f"{other}/")
    assert [model.url for model in cache.list()] == [host.url]
    with pytest.raises(ModelError, match=rf"^{other}: nothing is kept from there; gemma_wgpu.cache.list\(\) has the"):
        cache.delete(other)
    host.asked()
    download(host.url)
    download(other)
    assert [name for name, _ in host.asked()].count("config.json") == 1


def test_what_an_interrupted_download_left(host: Host, tmp_path: Path) -> None:
    host.replies["vocabulary.bin"] = [answer(404)]
    with pytest.raises(ModelError):
        download(host.url)
    [model] = cache.list()
    assert model == Cached(host.url, nbytes(tmp_path / "cache"))
    cache.delete(model.url)
    assert cache.list() == []
