"""Other engines on the same model, through their public Python packages, to be measured beside ours.

Nothing else needs them, so each is imported when it is opened.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from gemma_wgpu.bench.run import Engine, Run, timed_run
from gemma_wgpu.errors import RequestError
from gemma_wgpu.weights.manifest import MANIFEST


class _Stepped(Engine):
    """An engine whose steps are called one by one."""

    async def run(self, ids: Sequence[int], decode: int) -> Run:
        """Compute `ids` and `decode` tokens, and time each."""
        cached, started = self._cached(), time.perf_counter()
        new, times = [], []
        for token in self._steps(ids, decode + 1):
            new.append(token)
            times.append(time.perf_counter())
        return timed_run(cached, started, new, times)

    @abstractmethod
    def _cached(self) -> int:
        """Return how many tokens are in the cache."""

    @abstractmethod
    def _steps(self, ids: Sequence[int], count: int) -> Iterator[int]:
        """Compute `ids`, then yield `count` new tokens, each as soon as it is known."""


class LlamaCpp(_Stepped):
    """llama.cpp through llama-cpp-python, on the GPU or the CPU, whichever that was compiled for."""

    name = "llama.cpp"

    def __init__(self, path: Path, context: int, threads: int | None) -> None:
        if path.suffix != ".gguf":
            raise RequestError(f"{path}: llama.cpp reads .gguf files; name one with --peer-model")
        with _package("llama-cpp-python"):
            import llama_cpp
        self.versions = {"llama-cpp-python": version("llama-cpp-python")}
        self._api: Any = llama_cpp
        with _loading(self.name, path):
            self._llama: Any = llama_cpp.Llama(
                str(path),
                n_ctx=context,
                n_gpu_layers=-1,
                n_threads=threads,
                n_threads_batch=threads,
                swa_full=False,  # windows keep no more than they see, as in llama-bench
                verbose=False,
            )
        self._memory = llama_cpp.llama_get_memory(self._llama.ctx)

    async def fill(self, ids: Sequence[int]) -> None:
        """Make the cache hold `ids` and no more."""
        self._api.llama_memory_clear(self._memory, True)
        if ids:
            self._compute(ids)
        self._api.llama_synchronize(self._llama.ctx)

    def _cached(self) -> int:
        return int(self._api.llama_memory_seq_pos_max(self._memory, 0)) + 1

    def _steps(self, ids: Sequence[int], count: int) -> Iterator[int]:
        token = self._compute(ids)
        yield token
        for _ in range(count - 1):
            token = self._compute([token])
            yield token

    def _compute(self, ids: Sequence[int]) -> int:
        api, context = self._api, self._llama.ctx
        for start in range(0, len(ids), self._llama.n_batch):
            batch = ids[start : start + self._llama.n_batch]
            tokens = (api.llama_token * len(batch))(*batch)
            if api.llama_decode(context, api.llama_batch_get_one(tokens, len(batch))):
                raise RequestError(f"{self.name} failed on {len(batch)} tokens")
        logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (self._llama.n_vocab(),))
        return int(logits.argmax())

    def close(self) -> None:
        """Free the memory of the engine."""
        self._llama.close()


class Transformers(Engine):
    """transformers on PyTorch, in bf16, with a static cache. It compiles the decode step if there is a GPU."""

    name = "transformers"

    def __init__(self, path: Path, context: int, threads: int | None) -> None:
        if (path / MANIFEST).exists():  # transformers would find no weights there, and take random ones
            raise RequestError(
                f"{path}: transformers reads Hugging Face folders and .gguf files, not our model folders; name one "
                "with --peer-model"
            )
        with _package("torch"):
            import torch
        with _package("transformers"):
            import transformers
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self._torch: Any = torch
        if threads:
            torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        folder, options = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
        with _loading(self.name, path):
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
        self._model: Any = model.to(device).eval()
        self._cache: Any = transformers.StaticCache(config=model.config, max_cache_len=context)
        self._options: Any = transformers.GenerationConfig
        self._ids: list[int] = []

    async def fill(self, ids: Sequence[int]) -> None:
        """Make the cache hold `ids` and no more."""
        self._cache.reset()
        self._ids = list(ids)
        if ids:
            with self._torch.inference_mode():
                logits = self._model(self._tensor(ids), past_key_values=self._cache, logits_to_keep=1).logits
            logits.cpu()

    def _cached(self) -> int:
        return int(self._cache.get_seq_length())

    async def run(self, ids: Sequence[int], decode: int) -> Run:
        """Compute `ids` and `decode` tokens, and time each."""
        cached, clock = self._cached(), _Clock()
        prompt = self._tensor([*self._ids, *ids])
        greedy = self._options(max_new_tokens=decode + 1, do_sample=False, eos_token_id=None, pad_token_id=0)
        started = time.perf_counter()
        self._model.generate(prompt, generation_config=greedy, past_key_values=self._cache, streamer=clock)
        return timed_run(cached, started, clock.ids, clock.times)

    def _tensor(self, ids: Sequence[int]) -> Any:
        return self._torch.tensor([list(ids)], device=self._model.device)

    def close(self) -> None:
        """Free the memory of the engine."""
        del self._model, self._cache


class _Clock:
    """A streamer of transformers' `generate`, which gives it the prompt and then each token."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.ids: list[int] = []
        self._prompt = True

    def put(self, value: Any) -> None:
        """Note a token and its time."""
        if self._prompt:
            self._prompt = False
            return
        self.ids.append(int(value.reshape(-1)[0]))
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: no token is held back."""


class OnnxRuntime(_Stepped):
    """onnxruntime-genai with the WebGPU provider, on a folder that its model builder made."""

    name = "onnxruntime"

    def __init__(self, path: Path, context: int, threads: int | None) -> None:
        if not (path / "genai_config.json").is_file():
            raise RequestError(
                f"{path}: onnxruntime reads a folder of its model builder, with a genai_config.json; name one with "
                "--peer-model"
            )
        with _package("onnxruntime-genai"):
            import onnxruntime_genai
        self.versions = {"onnxruntime-genai": version("onnxruntime-genai")}
        self._api: Any = onnxruntime_genai
        with _loading(self.name, path):
            self._model: Any = onnxruntime_genai.Model(str(path))
        self._generator: Any = None
        self._options = {"do_sample": False, "max_length": context, "min_length": context}  # it goes on past the end

    async def fill(self, ids: Sequence[int]) -> None:
        """Make the cache hold `ids` and no more."""
        parameters = self._api.GeneratorParams(self._model)
        parameters.set_search_options(**self._options)
        self._generator = self._api.Generator(self._model, parameters)
        if ids:
            self._generator.append_tokens(np.array(ids, np.int32))

    def _cached(self) -> int:
        return int(self._generator.token_count())

    def _steps(self, ids: Sequence[int], count: int) -> Iterator[int]:
        self._generator.append_tokens(np.array(ids, np.int32))
        for _ in range(count):
            self._generator.generate_next_token()
            yield int(self._generator.get_next_tokens()[0])

    def close(self) -> None:
        """Free the memory of the engine."""
        del self._generator, self._model


PEERS: dict[str, Callable[[Path, int, int | None], Engine]] = {
    peer.name: peer for peer in (LlamaCpp, Transformers, OnnxRuntime)
}
"""This has, by the name of a peer, what opens a model with (path, context in tokens, threads of the CPU).

The engine chooses the threads if they are None. RequestError is raised if the package is missing, or if the engine
does not read such a model.
"""


@contextmanager
def _package(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise RequestError(f"this peer needs {name}; pip install {name} ({error})") from error


@contextmanager
def _loading(name: str, path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each peer has classes of its own for it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(f"{path}: {name} cannot load it: {reason}") from error
