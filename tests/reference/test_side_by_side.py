"""A real Gemma 3 270M, eight texts of it side by side."""

from pathlib import Path

from gemma_wgpu import load
from tests.reference.golden import greedy
from tests.reference.test_reference import GOLDEN

COUNT = 20


def test_eight_ragged_prompts(demo_gguf: Path) -> None:
    """Those that transformers continued, and the beginnings of them, which share the cache of their prompts."""
    whole = [golden.ids for golden in GOLDEN.values()]
    prompts = [*whole, *(ids[: 1 + len(ids) // 2] for ids in whole)]
    with load(demo_gguf, precision="f32", context_length=1024) as gemma:
        generations = gemma.generate(prompts, max_new_tokens=COUNT, temperature=0)
        generations.result()
        for ids, golden in zip(generations.ids, GOLDEN.values(), strict=False):
            assert ids == golden.greedy[:COUNT]
        for ids, prompt in zip(generations.ids[len(whole) :], prompts[len(whole) :], strict=True):
            assert ids == greedy(gemma, prompt)[:COUNT]
