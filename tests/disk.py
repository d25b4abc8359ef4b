"""A model folder on disk in the place of one on the web."""

from collections.abc import Callable, Sequence
from pathlib import Path

from gemma_wgpu.gpu.device import Held
from gemma_wgpu.weights.hosted import KeptFile, WebFolder


class Bytes(Held):
    """Bytes in the place of those that a browser holds."""

    def __init__(self, data: bytes) -> None:
        self.data, self.nbytes = data, len(data)

    def slice(self, offset: int, nbytes: int) -> "Bytes":
        return Bytes(self.data[offset : offset + nbytes])

    def to_bytes(self) -> bytes:
        return self.data

    def free(self) -> None:
        pass


class Kept(KeptFile):
    """A file in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def read(self, spans: Sequence[tuple[int, int]]) -> bytes:
        return b"".join(self.data[offset : offset + size] for offset, size in spans)


class Disk(WebFolder):
    """A folder on disk; `loaded` has the names of the files that were asked for."""

    def __init__(self, path: Path) -> None:
        self.url, self.path = str(path), path
        self.loaded: list[str] = []

    async def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    async def load(self, name: str, nbytes: int, sha256: str, report: Callable[[int], None]) -> Bytes:
        self.loaded.append(name)
        report(0)
        report(nbytes)
        return Bytes((self.path / name).read_bytes())

    async def kept(self, name: str, data: Held) -> KeptFile:
        return Kept(data.to_bytes())

    async def retain(self, name: str, data: bytes, others: frozenset[str]) -> None:
        pass

    def seconds(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass
