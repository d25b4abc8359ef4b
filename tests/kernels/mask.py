"""mask.wgsl: logits of some tokens put out of reach, and the sampling kernels after it, which never draw those."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.engine.runner import Draw
from gemma_wgpu.gpu.device import Device
from gemma_wgpu.ops.kernels import VOCABULARY_PART
from gemma_wgpu.ops.launch import record
from gemma_wgpu.options import Options
from tests.kernels.bench import Bench, same
from tests.kernels.drawing import NOISE, allowed, bits, gumbel, temper


@dataclass(frozen=True)
class Case:
    """`left`: tokens that the mask leaves, 0 for all of them. `sequences`: they are masked only, nothing is drawn."""

    vocab: int
    left: int
    draws: int
    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    sequences: int = 1
    half: bool = False


SMALL, LARGE = 5 * VOCABULARY_PART + 33, 262144
CASES = (
    Case(SMALL, 0, 50),
    Case(SMALL, 2000, 100),
    Case(SMALL, 40, 100),
    Case(SMALL, 40, 100, repetition_penalty=1.5),
    Case(SMALL, 40, 100, top_k=0, top_p=1.0, temperature=100.0, repetition_penalty=0.01),
    Case(SMALL, 40, 100, top_k=0, min_p=0.1),
    Case(SMALL, 40, 5, temperature=0.0),
    Case(SMALL, 40, 5, temperature=0.0, repetition_penalty=1.5),
    Case(SMALL, 40, 5, temperature=1e-4, repetition_penalty=100.0),
    Case(SMALL, 2, 50),
    Case(SMALL, 1, 20),
    Case(SMALL, 1, 20, top_k=0, top_p=1.0),
    Case(SMALL, 1, 5, temperature=0.0, repetition_penalty=100.0),
    Case(SMALL, 2000, 0, sequences=5),
    Case(LARGE, 3, 5, half=True),
    Case(LARGE, 200_000, 5, half=True),
    Case(LARGE, 2, 5, temperature=0.0, half=True),
)


async def check(device: Device, case: Case) -> None:
    await (_check_draws(device, case) if case.sequences == 1 else _check_rows(device, case))


async def _check_rows(device: Device, case: Case) -> None:
    """A mask for each, and rows that are longer than the vocabulary that may be drawn from."""
    rng = np.random.default_rng(case.vocab)
    stride = case.vocab + 40
    logits = rng.standard_normal((case.sequences, stride)).astype(np.float32)
    left = rng.random(logits.shape) < case.left / case.vocab
    with Bench(device, half=case.half) as bench:
        buffer, mask = bench.put(logits), bench.put([bits(row) for row in left], np.uint32)
        bench.run(bench.kernels.mask(mask, buffer, vocab=case.vocab, sequences=case.sequences, stride=stride))
        masked = await bench.get(buffer, *logits.shape)
    left[:, case.vocab :] = True
    same("logits", masked, np.where(left, logits, np.float32(-1e32)))


async def _check_draws(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.vocab + case.left)
    left = np.ones(case.vocab, np.bool_)
    if case.left:
        left[:] = False
        left[rng.choice(case.vocab, case.left, replace=False)] = True
    logits = (rng.standard_normal(case.vocab) * 5).astype(np.float32)
    logits[left] -= 20 * (case.left > 0)  # what is left is the unlikely
    seen = rng.random(case.vocab) < 0.5
    options = Options(
        temperature=case.temperature,
        top_k=case.top_k,
        top_p=case.top_p,
        min_p=case.min_p,
        repetition_penalty=case.repetition_penalty,
    )
    chosen = []
    with Bench(device, half=case.half) as bench:
        kernels, vocab = bench.kernels, case.vocab
        logits_buffer, mask = bench.put(logits), bench.put(bits(left), np.uint32)
        program = record(device, [kernels.mask(mask, logits_buffer, vocab=vocab, stride=vocab)])
        device.submit([program])
        masked = await bench.get(logits_buffer, vocab)

        state, words = bench.state(0), bench.put(Draw(options, 0x12345678).words(), np.uint32)
        seen_buffer, tokens = bench.put(bits(seen), np.uint32), bench.put([0], np.uint32)
        summaries, shape = bench.blank(-(-vocab // VOCABULARY_PART), 4), {"vocab": vocab, "stride": vocab}
        draw = record(
            device,
            (
                kernels.logits_scan(state, words, seen_buffer, logits_buffer, summaries, **shape),
                kernels.sample(state, words, logits_buffer, summaries, tokens, seen_buffer, **shape),
            ),
        )
        for position in range(1, case.draws + 1):
            bench.write(state, np.array([position - 1, 1, 0], np.uint32))
            bench.write(seen_buffer, bits(seen))
            bench.write(logits_buffer, logits)
            device.submit([program, draw])
            chosen.append(int((await bench.get(tokens, 1, dtype=np.uint32))[0]))

    same("logits that are left", masked[left], logits[left])
    same("logits that are masked", masked[~left], np.float32(-1e32))
    of_left = temper(logits[left], seen[left], options)
    ids = np.flatnonzero(left)
    kept = allowed(of_left, options)
    for position, token in enumerate(chosen, 1):
        assert token < vocab, f"token {token} of {vocab}"
        assert left[token], f"token {token} is masked"
        noisy = of_left.copy()
        if case.temperature > 0:
            noisy[~kept] = -np.inf
            noisy += gumbel(0x12345678, position, vocab)[left]
        drawn = noisy[np.searchsorted(ids, token)]
        assert drawn >= noisy.max() - (NOISE if case.temperature else 0), f"token {token} at {position}"
