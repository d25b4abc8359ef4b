"""Model folders on the web, whose matrices go to the GPU without entering Python's memory."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.gpu.device import Data, Held
from gemma_wgpu.models.spec import Family
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.progress import OnProgress, Progress
from gemma_wgpu.tokens.tokenizer import Tokenizer
from gemma_wgpu.tokens.vocabulary import Vocabulary
from gemma_wgpu.weights.checkpoint import Tensor, Weights
from gemma_wgpu.weights.folder import checked_config
from gemma_wgpu.weights.manifest import MANIFEST, Entry, File, Manifest, ShardPart
from gemma_wgpu.weights.packed import Packed


class KeptFile(ABC):
    """A file of a folder on the web as it lies on this machine, outside of Python's memory."""

    @abstractmethod
    async def read(self, spans: Sequence[tuple[int, int]]) -> bytes:
        """Return the bytes of some spans, (offset, size) each, one after the other.

        Raises ModelError, which names the file's address, if they are no longer there.
        """


class WebFolder(ABC):
    """A folder of files at the address `url`, each of which is kept on this machine once it has come.

    Every method raises ModelError, which names the file's address.
    """

    url: str

    @abstractmethod
    async def read(self, name: str) -> bytes:
        """Return a small file as it is now, or as it was kept if the server cannot be reached."""

    @abstractmethod
    async def load(self, name: str, nbytes: int, sha256: str, report: Callable[[int], None]) -> Held:
        """Return a file with a known size in bytes and SHA-256, from this machine or else over the network.

        `report` is called again and again with the bytes that have come so far.
        """

    @abstractmethod
    async def kept(self, name: str, data: Held) -> KeptFile:
        """Return a file that was loaded, as `data`, to read from it later: `data` is not needed for that."""

    @abstractmethod
    async def retain(self, name: str, data: bytes, others: frozenset[str]) -> None:
        """Keep `data` as the file `name`, and delete what is kept of the folder but this file and `others`."""

    @abstractmethod
    def seconds(self) -> dict[str, float]:
        """Return the seconds that were spent on loading so far: on "storage", "download" and "hash"."""

    @abstractmethod
    def close(self) -> None:
        """Stop what is under way. Idempotent."""


class HostedFolder(Weights):
    """A model in a model folder on the web. It has one shard at hand at a time: read it in the table's order.

    Shards that have no tensor of the table are not fetched.
    """

    reports_progress = True

    def __init__(
        self,
        folder: WebFolder,
        manifest: Manifest,
        family: Family,
        config: Any,
        vocabulary: bytes,
        progress: OnProgress | None,
    ) -> None:
        self.name = manifest.name
        self.quantization = manifest.quantization
        self.family = family
        self.config = config
        self._folder = folder
        self._manifest = manifest
        self._vocabulary = vocabulary
        self._progress = progress
        self._entries = {tensor.name: tensor for tensor in manifest.tensors if tensor.name in self.table}
        self._needed = [manifest.shards[number] for number in manifest.shards_of(self.table)]
        self._at_hand: tuple[int, Held] | None = None
        self._kept: dict[int, KeptFile] = {}

    @classmethod
    async def open(cls, folder: WebFolder, progress: OnProgress | None, *, vision: bool = True) -> Self:
        """Fetch the folder but its shards. `progress` is told of these as they come.

        The tower that reads images, if there is one, is left out if `vision` is false.

        Raises ModelError, which names the address, if the folder is not there, is damaged or cannot be reached.
        """
        listing = await folder.read(MANIFEST)
        manifest = Manifest.from_web(listing, f"{folder.url}/{MANIFEST}")
        config, vocabulary = [
            (await folder.load(file.name, file.nbytes, file.sha256, lambda _: None)).to_bytes()
            for file in (manifest.config, manifest.vocabulary)
        ]
        family, checked = checked_config(manifest, config, folder.url, vision=vision)
        await folder.retain(MANIFEST, listing, frozenset(file.name for file in manifest.files))
        return cls(folder, manifest, family, checked, vocabulary, progress)

    @property
    def place(self) -> str:
        """Return the address."""
        return self._folder.url

    def tensor(self, name: str) -> Tensor:
        """Return a matrix of the table. Raises ModelError for any other name."""
        return _HostedMatrix(self._entries[self.spec(name, matrix=True).name], self)

    async def vector(self, name: str) -> NDArray[np.float32]:
        """Return what is no matrix, float32 in its shape, as it is used. Raises ModelError for any other name."""
        spec = self.spec(name, matrix=False)
        parts = [(await self.shard(part.shard)).slice(*part.quants).to_bytes() for part in self._entries[name].parts]
        return np.frombuffer(b"".join(parts), np.float32).reshape(spec.shape)

    def tokenizer(self) -> Tokenizer:
        """Return the vocabulary's tokenizer. Raises ModelError if that is damaged."""
        place = f"{self._folder.url}/{self._manifest.vocabulary.name}"
        return Vocabulary.from_bytes(self._vocabulary, place).tokenizer(place)

    async def shard(self, number: int) -> Held:
        """Return a shard, checked. The shard that was at hand before is let go."""
        if self._at_hand is None or self._at_hand[0] != number:
            self._let_go()
            file = self._manifest.shards[number]
            held = await self._folder.load(file.name, file.nbytes, file.sha256, self._report(file))
            self._at_hand = number, held
        return self._at_hand[1]

    async def keep(self, number: int) -> None:
        """Load a shard, checked, and keep it for `kept`."""
        if number not in self._kept:
            self._kept[number] = await self._folder.kept(self._manifest.shards[number].name, await self.shard(number))

    def kept(self, number: int) -> KeptFile:
        """Return a shard that `keep` has kept."""
        return self._kept[number]

    def _report(self, file: File) -> Callable[[int], None]:
        before = sum(shard.nbytes for shard in self._needed[: self._needed.index(file)])
        total = sum(shard.nbytes for shard in self._needed)

        def report(done: int) -> None:
            if self._progress is not None:
                self._progress(Progress("loading", before + done, total))

        return report

    def _let_go(self) -> None:
        if self._at_hand is not None:
            self._at_hand[1].free()
            self._at_hand = None

    def seconds(self) -> dict[str, float]:
        """Return the seconds that were spent on fetching, keeping and checking files."""
        return self._folder.seconds()

    def release(self) -> None:
        """Do nothing: a shard is let go when the next one comes."""

    def rest(self) -> None:
        """Let go of the last shard."""
        self._let_go()

    def close(self) -> None:
        """Let go of the last shard, and stop a download that is under way."""
        self._let_go()
        self._folder.close()


class _HostedMatrix(Tensor):
    """A matrix in the shards of a folder on the web."""

    def __init__(self, entry: Entry, folder: HostedFolder) -> None:
        self.name = entry.name
        self.shape = (entry.rows, entry.cols)
        self._entry = entry
        self._folder = folder

    @property
    def layout(self) -> Layout:
        """Return the layout of the words in the shards."""
        return self._entry.layout

    async def words(self, start: int, stop: int) -> AsyncIterator[tuple[int, Data, Data]]:
        """Yield rows [start, stop), in one run for each shard that they lie in."""
        for run in self._entry.runs(start, stop):
            shard = await self._folder.shard(run.shard)
            yield run.start, shard.slice(*run.quants), shard.slice(*run.scales)

    async def stay(self) -> None:
        """Bring the shards to this machine, one by one, and check them."""
        for part in self._entry.parts:
            await self._folder.keep(part.shard)

    def fetch(self, numbers: Sequence[int]) -> Awaitable[NDArray[np.float32]]:
        """Fetch some rows from the shards that `stay` has kept."""
        return _Shared(self._rows(numbers))

    async def _rows(self, numbers: Sequence[int]) -> NDArray[np.float32]:
        rows = np.empty((len(numbers), self.shape[1]), np.float32)
        runs: dict[int, list[tuple[int, ShardPart]]] = {}  # by their shards, with the places of their rows
        for place, number in enumerate(numbers):
            even = number // 2 * 2  # the scales of two rows begin and end with a word
            [run] = self._entry.runs(even, min(even + 2, self.shape[0]))
            runs.setdefault(run.shard, []).append((place, run))
        for shard, found in runs.items():
            data = await self._folder.kept(shard).read(
                [span for _, run in found for span in (run.quants, run.scales)]
            )
            words, at = np.frombuffer(data, np.uint32), 0
            for place, run in found:
                quants, scales = run.quants[1] // 4, run.scales[1] // 4
                split = np.split(words[at : at + quants + scales], [quants])
                packed = Packed(self.layout, run.stop - run.start, self.shape[1], *split)
                rows[place] = packed.dequantize()[numbers[place] - run.start]
                at += quants + scales
        return rows


class _Shared(Awaitable[NDArray[np.float32]]):
    """What a coroutine returns, for all who await it. If one of them is cancelled, the others are not."""

    def __init__(self, coroutine: Coroutine[Any, Any, NDArray[np.float32]]) -> None:
        self._future = asyncio.ensure_future(coroutine)

    def __await__(self) -> Generator[Any, None, NDArray[np.float32]]:
        return asyncio.shield(self._future).__await__()
