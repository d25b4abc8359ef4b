"""sample.wgsl, after logits_scan.wgsl: the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.engine.runner import Draw
from gemma_wgpu.gpu.device import Device
from gemma_wgpu.ops.kernels import STATE_WORDS, VOCABULARY_PART
from gemma_wgpu.ops.launch import record
from gemma_wgpu.options import Options
from tests.kernels.bench import Bench, Floats, same
from tests.kernels.drawing import NOISE, allowed, bits, gumbel, temper


@dataclass(frozen=True)
class Case:
    """`logits`: how they are spread. `by_seed`: each draw has its own seed at one position, else its own position.
    `together`: the draws are of as many sequences, with and without the options by turns.
    """

    vocab: int
    logits: str
    draws: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    by_seed: bool = False
    half: bool = False
    together: bool = False


SMALL, LARGE = 1500, 262144
CASES = (
    Case(SMALL, "normal", 2000, temperature=0.7),
    Case(SMALL, "normal", 2000, by_seed=True),
    Case(SMALL, "normal", 2000, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
    Case(SMALL, "normal", 2000, top_p=0.8, by_seed=True),
    Case(SMALL, "normal", 300, top_k=5),
    Case(SMALL, "normal", 300, min_p=0.3, temperature=1.4),
    Case(SMALL, "normal", 200, min_p=1e-5),
    Case(SMALL, "normal", 100, top_p=1e-6),
    Case(SMALL, "normal", 100, min_p=1.0),
    Case(SMALL, "normal", 100, top_k=1, top_p=0.9),
    Case(SMALL, "normal", 30, top_k=SMALL + 1, top_p=0.999),
    Case(SMALL, "normal", 20, temperature=0.0, top_k=5, repetition_penalty=1.5),
    Case(SMALL, "peaked", 100, top_k=64, top_p=0.95),
    Case(SMALL, "peaked", 100, top_k=1000),
    Case(SMALL, "cliff", 100, top_k=1000),
    Case(SMALL, "cliff", 100, top_p=0.95),
    Case(SMALL, "cliff", 300, top_k=1400, top_p=0.95),
    Case(SMALL, "equal", 300, top_k=3),  # equal ones stay together
    Case(SMALL, "steps", 500, top_k=64, top_p=0.5),
    Case(SMALL, "steps", 20, temperature=0.0),
    Case(SMALL, "normal", 9, top_k=40, top_p=0.9, temperature=1.5, repetition_penalty=1.3, together=True),
    Case(SMALL, "steps", 9, temperature=0.0, together=True),
    Case(LARGE, "normal", 10, top_k=64, top_p=0.95, half=True),
    Case(LARGE, "flat", 3, top_p=0.9, half=True),
    Case(LARGE, "flat", 3, top_k=100_000, top_p=0.7, min_p=0.001, repetition_penalty=1.1, half=True),
    Case(LARGE, "peaked", 10, top_p=0.95, half=True),
    Case(LARGE, "peaked", 3, top_k=64, top_p=0.95, half=True),
    Case(LARGE, "peaked", 5, min_p=0.05, half=True),
    Case(LARGE, "flat", 20, half=True),
)


def _logits(rng: np.random.Generator, case: Case) -> NDArray[np.float32]:
    spread = rng.standard_normal(case.vocab)
    match case.logits:
        case "normal":
            spread *= 3
        case "flat":
            spread *= 0.01
        case "equal":
            spread[:] = -7
        case "steps":
            spread = np.round(spread)
        case "cliff":  # the many far below the highest one have a seventh of the probability
            spread *= 0.01
            spread[case.vocab // 2] = 9
        case "peaked":
            spread[rng.choice(case.vocab, 5, replace=False)] += [60, 59, 58.5, 57, 40]
    return spread.astype(np.float32)


async def check(device: Device, case: Case) -> None:
    if case.together:
        await _check_together(device, case)
        return
    rng = np.random.default_rng(case.vocab + case.draws)
    logits, seen = _logits(rng, case), rng.random(case.vocab) < 0.1
    parts = -(-case.vocab // VOCABULARY_PART)
    options = Options(**_options(case))
    draws = [(i + 1, 41) if case.by_seed else (0x89ABCDEF, i + 2) for i in range(case.draws)]  # seed, position
    chosen = []
    with Bench(device, half=case.half) as bench:
        logits_buffer, summaries = bench.blank(case.vocab), bench.blank(parts, 4)
        state, sampling = bench.state(0), bench.put(np.zeros(6), np.uint32)
        seen_buffer, tokens = bench.put(bits(seen), np.uint32), bench.put([0, 77], np.uint32)
        kernels, shape = bench.kernels, {"vocab": case.vocab, "stride": case.vocab}
        program = record(
            device,
            (
                kernels.logits_scan(state, sampling, seen_buffer, logits_buffer, summaries, **shape),
                kernels.sample(state, sampling, logits_buffer, summaries, tokens, seen_buffer, **shape),
            ),
        )
        for seed, position in draws:
            count = 1 + position % 2
            bench.write(state, np.array([position - count, count, 0], np.uint32))
            bench.write(sampling, Draw(options, seed).words())
            bench.write(seen_buffer, bits(seen))
            bench.write(logits_buffer, logits)
            device.submit([program])
            chosen.append(int((await device.read(tokens, 0, 4)).view(np.uint32)[0]))
        after = await bench.get(state, 4, dtype=np.uint32)
        seen_after = await bench.get(seen_buffer, *bits(seen).shape, dtype=np.uint32)
        tokens_after = await bench.get(tokens, 2, dtype=np.uint32)

    same("state", after, (draws[-1][1], 1, 0, chosen[-1]))
    with_token = seen.copy()
    with_token[chosen[-1]] = True
    assert np.array_equal(seen_after, bits(with_token)), "seen"
    same("tokens", tokens_after, (chosen[-1], 77))

    tempered = temper(logits, seen, options)
    if case.temperature == 0:
        same("the likeliest token, the lowest of equals", np.array(chosen), np.argmax(tempered))
        return
    kept = allowed(tempered, options)
    _check_draws(tempered, kept, draws, chosen)
    if case.draws >= 1000:
        _check_frequencies(tempered, kept, chosen)


def _options(case: Case) -> dict[str, Any]:
    return {name: getattr(case, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}


async def _check_together(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.draws)
    count, parts, stride = case.draws, -(-case.vocab // VOCABULARY_PART), case.vocab + 37
    logits = np.stack([np.pad(_logits(rng, case), (0, stride - case.vocab)) for _ in range(count)])
    seen = rng.random((count + 2, stride)) < 0.1
    seen_words = np.stack([bits(row) for row in seen])
    slots, positions = rng.permutation(count + 2)[:count], rng.integers(0, 49, count)
    draws = [
        Draw(Options(**(_options(case) if i % 2 else {"top_k": 0, "top_p": 1.0})), i * 0x12345) for i in range(count)
    ]
    with Bench(device, half=case.half) as bench:
        states, tokens = bench.states(positions, slots), bench.put(np.zeros(count + 2), np.uint32)
        sampling = bench.put(np.concatenate([each.words() for each in draws]), np.uint32)
        seen_buffer, logits_buffer = bench.put(seen_words, np.uint32), bench.put(logits)
        summaries = bench.blank(count, parts, 4)
        several: dict[str, Any] = {"vocab": case.vocab, "sequences": count, "stride": stride}
        kernels, rest = bench.kernels, (logits_buffer, summaries)
        bench.run(
            kernels.logits_scan(states, sampling, seen_buffer, *rest, **several),
            kernels.sample(states, sampling, *rest, tokens, seen_buffer, **several),
        )
        after = await bench.get(states, count, STATE_WORDS, dtype=np.uint32)
        tokens_after = await bench.get(tokens, count + 2, dtype=np.uint32)
        seen_after = await bench.get(seen_buffer, *seen_words.shape, dtype=np.uint32)

    chosen = after[:, 3]
    same("states", after[:, :4], np.stack((positions + 1, np.ones(count), slots, chosen), axis=1))
    expected_tokens, expected_seen = np.zeros(count + 2), seen.copy()
    expected_tokens[slots] = chosen
    expected_seen[slots, chosen] = True
    same("tokens", tokens_after, expected_tokens)
    assert np.array_equal(seen_after, [bits(row) for row in expected_seen]), "seen"
    for i, (slot, position, token, of_row) in enumerate(zip(slots, positions, chosen, draws, strict=True)):
        tempered = temper(logits[i, : case.vocab], seen[slot, : case.vocab], of_row.options)
        if of_row.options.temperature == 0:
            same("the likeliest token, the lowest of equals", np.array([token]), np.argmax(tempered))
        else:
            draw = (of_row.seed, int(position) + 1)
            _check_draws(tempered, allowed(tempered, of_row.options), [draw], [int(token)])


def _check_draws(tempered: Floats, kept: NDArray[np.bool_], draws: list[tuple[int, int]], chosen: list[int]) -> None:
    """Each token is an allowed one, and the one with the highest logit plus noise, as far as float32 can tell."""
    tempered = np.where(kept, tempered, -np.inf)
    for (seed, position), token in zip(draws, chosen, strict=True):
        assert token < len(kept), f"token {token} of {len(kept)}"
        assert kept[token], f"token {token} is filtered out, seed {seed}, position {position}"
        noisy = tempered + gumbel(seed, position, len(kept))
        best = int(np.argmax(noisy))
        assert noisy[token] >= noisy[best] - NOISE, f"token {token}, not {best}, seed {seed}, position {position}"


def _check_frequencies(tempered: Floats, kept: NDArray[np.bool_], chosen: list[int]) -> None:
    """Pearson's chi-squared test, rare tokens taken together; 5 standard deviations are allowed."""
    expected = np.where(kept, np.exp(tempered - tempered.max()), 0)
    expected *= len(chosen) / expected.sum()
    observed = np.bincount(chosen, minlength=len(kept))
    common = expected >= 8
    expected = np.append(expected[common], expected[~common].sum())
    observed = np.append(observed[common], observed[~common].sum())
    if expected[-1] == 0:
        expected, observed = expected[:-1], observed[:-1]
    statistic, freedom = np.sum((observed - expected) ** 2 / expected), len(expected) - 1
    assert freedom >= 3, "the distribution has too few common tokens to test"
    limit = freedom + 5 * np.sqrt(2 * freedom)
    assert statistic <= limit, f"chi-squared is {statistic:.1f} with {freedom} degrees of freedom"
