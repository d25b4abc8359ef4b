"""logits_scan.wgsl: logits penalised and tempered, and each part of the vocabulary summed up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_wgpu.engine.runner import Draw
from gemma_wgpu.gpu.device import Device
from gemma_wgpu.ops.kernels import VOCABULARY_PART
from gemma_wgpu.options import Options
from tests.kernels.bench import F32, F32_SUM, Bench, close, same
from tests.kernels.drawing import NOISE, bits, gumbel, temper


@dataclass(frozen=True)
class Case:
    vocab: int
    temperature: float
    repetition_penalty: float = 1.0
    count: int = 1
    half: bool = False


CASES = (
    Case(262144, 0.8, 1.3),
    Case(1000, 0.0, 1.2, count=7),
    Case(5 * VOCABULARY_PART + 1, 1.0, count=3, half=True),
    Case(5 * VOCABULARY_PART + 1, 0.0, half=True),
)


async def check(device: Device, case: Case) -> None:
    rng = np.random.default_rng(case.vocab)
    options = Options(temperature=case.temperature, repetition_penalty=case.repetition_penalty)
    draw = Draw(options, 0xFEDCBA98)
    logits = (rng.standard_normal(case.vocab) * 10).astype(np.float32)
    if case.temperature == 0:
        logits = (np.round(logits / 4) * 4).astype(np.float32)  # many are equal
    seen = rng.random(case.vocab) < 0.2
    position, parts = 77, -(-case.vocab // VOCABULARY_PART)
    with Bench(device, half=case.half) as bench:
        logits_buffer = bench.put(logits)
        summaries = bench.blank(parts, 4)
        bench.run(
            bench.kernels.logits_scan(
                bench.state(position, case.count),
                bench.put(draw.words(), np.uint32),
                bench.put(bits(seen), np.uint32),
                logits_buffer,
                summaries,
                vocab=case.vocab,
                stride=case.vocab,
            )
        )
        actual = await bench.get(logits_buffer, case.vocab)
        summed = await bench.get(summaries, parts, 4)

    tempered = temper(logits, seen, options)
    close("logits", actual, tempered, F32 * np.abs(tempered))
    noisy = actual.astype(np.float64)
    if case.temperature > 0:
        noisy += gumbel(draw.seed, position + case.count, case.vocab)
    highest, total, chosen = summed[:, :3].T
    token = summed.view(np.uint32)[:, 3]
    for part in range(parts):
        start, end = part * VOCABULARY_PART, min((part + 1) * VOCABULARY_PART, case.vocab)
        of_part = actual[start:end].astype(np.float64)
        same(f"highest of part {part}", highest[part], of_part.max())
        amount = np.exp(of_part - of_part.max()).sum()
        close(f"sum of part {part}", total[part], amount, F32_SUM * amount)
        tolerance = NOISE if case.temperature else 0.0
        close(f"chosen of part {part}", chosen[part], noisy[start:end].max(), tolerance)
        assert start <= token[part] < end, f"token of part {part}"
        close(f"token of part {part}", noisy[token[part]], noisy[start:end].max(), tolerance)
        if case.temperature == 0:
            same(f"token of part {part}, the lowest of equals", token[part], start + np.argmax(of_part))
