"""A model folder on the web, whose matrices go to the GPU without entering Python's memory."""

from collections.abc import AsyncIterator, Callable
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import ModelError
from gemma_wgpu.fetch.store import Folder
from gemma_wgpu.gpu.device import Data, Held
from gemma_wgpu.models.config import Gemma3Config
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.tokens.tokenizer import Tokenizer
from gemma_wgpu.tokens.vocabulary import Vocabulary
from gemma_wgpu.weights.checkpoint import Source, Weights, matrix_shapes, norm_shapes
from gemma_wgpu.weights.folder import checked_config
from gemma_wgpu.weights.manifest import MANIFEST, Entry, File, Manifest

Progress = Callable[[int, int], None]


class HostedFolder(Weights):
    """A Gemma 3 in a model folder on the web. One shard at a time is at hand: read it in the manifest's order."""

    reports_progress = True

    def __init__(
        self, folder: Folder, manifest: Manifest, config: Gemma3Config, vocabulary: bytes, progress: Progress | None
    ) -> None:
        self.name = manifest.name
        self.quantization = manifest.quantization
        self.config = config
        self._folder = folder
        self._manifest = manifest
        self._vocabulary = vocabulary
        self._progress = progress
        self._entries = {tensor.name: tensor for tensor in manifest.tensors}
        self._at_hand: tuple[int, Held] | None = None

    @classmethod
    async def open(cls, folder: Folder, progress: Progress | None) -> Self:
        """Fetch all but the shards. `progress` is told bytes done and in all of these, as they come.

        Raises ModelError naming the address when the folder is not there, is damaged or cannot be reached.
        """
        listing = await folder.read(MANIFEST)
        manifest = Manifest.from_web(listing, f"{folder.url}/{MANIFEST}")
        config, vocabulary = [
            (await folder.load(file.name, file.nbytes, file.sha256, lambda _: None)).to_bytes()
            for file in (manifest.config, manifest.vocabulary)
        ]
        checked = checked_config(manifest, config, folder.url)
        files = (manifest.config, manifest.vocabulary, *manifest.shards)
        await folder.retain(MANIFEST, listing, frozenset(file.name for file in files))
        return cls(folder, manifest, checked, vocabulary, progress)

    def tensor(self, name: str) -> Source:
        """The matrix of a name in `matrix_shapes`. Raises ModelError for any other."""
        if name not in matrix_shapes(self.config):
            raise ModelError(f"{self._folder.url}: Gemma 3 has no matrix {name}")
        return _HostedTensor(self._entries[name], self)

    async def norm_factors(self, name: str) -> NDArray[np.float32]:
        """What a norm of `norm_shapes` multiplies by, 1 + w, float32 (n,). Raises ModelError for others."""
        if name not in norm_shapes(self.config):
            raise ModelError(f"{self._folder.url}: Gemma 3 has no norm {name}")
        [part] = self._entries[name].parts
        return np.frombuffer((await self.shard(part.shard)).slice(*part.quants).to_bytes(), np.float32)

    def tokenizer(self) -> Tokenizer:
        """The vocabulary's tokenizer. Raises ModelError when that is damaged."""
        source = f"{self._folder.url}/{self._manifest.vocabulary.name}"
        return Vocabulary.from_bytes(self._vocabulary, source).tokenizer(source)

    async def shard(self, number: int) -> Held:
        """A shard, checked. The one before is let go."""
        if self._at_hand is None or self._at_hand[0] != number:
            self._let_go()
            file = self._manifest.shards[number]
            held = await self._folder.load(file.name, file.nbytes, file.sha256, self._report(file))
            self._at_hand = number, held
        return self._at_hand[1]

    def _report(self, file: File) -> Callable[[int], None]:
        shards = self._manifest.shards
        before = sum(shard.nbytes for shard in shards[: shards.index(file)])
        total = sum(shard.nbytes for shard in shards)

        def report(done: int) -> None:
            if self._progress is not None:
                self._progress(before + done, total)

        return report

    def _let_go(self) -> None:
        if self._at_hand is not None:
            self._at_hand[1].free()
            self._at_hand = None

    def seconds(self) -> dict[str, float]:
        """Spent on fetching, keeping and checking files."""
        return self._folder.seconds()

    def release(self) -> None:
        """A shard is let go when the next one comes."""

    def close(self) -> None:
        """Let go of the last shard, and stop a download that is under way."""
        self._let_go()
        self._folder.close()


class _HostedTensor(Source):
    def __init__(self, entry: Entry, folder: HostedFolder) -> None:
        self.name = entry.name
        self.shape = (entry.rows, entry.cols)
        self._entry = entry
        self._folder = folder

    @property
    def layout(self) -> Layout:
        return self._entry.layout

    async def words(self, start: int, stop: int) -> AsyncIterator[tuple[int, Data, Data]]:
        for run in self._entry.runs(start, stop):
            shard = await self._folder.shard(run.shard)
            yield run.start, shard.slice(*run.quants), shard.slice(*run.scales)
