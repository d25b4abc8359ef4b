"""The options of sampling; what they do is tested where texts are generated, and with the kernels."""

import math

import numpy as np
import pytest

from gemma_wgpu import GemmaError, RequestError, Sampling


def test_the_defaults_are_those_of_gemma() -> None:
    options = Sampling()
    assert (options.temperature, options.top_k, options.top_p, options.min_p) == (1.0, 64, 0.95, 0.0)
    assert options.repetition_penalty == 1.0


@pytest.mark.parametrize(
    ("option", "values", "range_"),
    [
        ("temperature", [-0.1, 101, math.nan, math.inf, -math.inf], "a number from 0 to 100"),
        ("top_k", [-1, (1 << 24) + 1, 1.5, 3.0, math.nan], f"a whole number from 0 to {1 << 24}"),
        ("top_p", [0, 0.0, -0.5, 1.01, math.nan], "a number above 0 up to 1"),
        ("min_p", [-0.01, 1.01, math.nan], "a number from 0 to 1"),
        ("repetition_penalty", [0.009, -1, 101, math.nan, math.inf], "a number from 0.01 to 100"),
        ("seed", [-1, 1 << 32, 0.5], f"a whole number from 0 to {(1 << 32) - 1}"),
    ],
)
def test_options_that_are_wrong(option: str, values: list[float], range_: str) -> None:
    for value in [*values, True, "1", [1]]:
        with pytest.raises(RequestError) as raised:
            Sampling(**{option: value})  # type: ignore[arg-type]
        assert str(raised.value) in (f"{option} is {value!r}; it must be {range_}",)
        assert isinstance(raised.value, ValueError)
        assert isinstance(raised.value, GemmaError)


@pytest.mark.parametrize("option", ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"])
def test_none_is_wrong_for_all_but_the_seed(option: str) -> None:
    with pytest.raises(RequestError, match=f"^{option} is None; it must be "):
        Sampling(**{option: None})  # type: ignore[arg-type]


def test_the_ends_of_the_ranges() -> None:
    Sampling(temperature=0, top_k=0, top_p=1e-9, min_p=0, repetition_penalty=0.01, seed=0)
    Sampling(temperature=100, top_k=1 << 24, top_p=1, min_p=1, repetition_penalty=100, seed=(1 << 32) - 1)
    assert Sampling(top_p=5e-324).words().view(np.float32)[1] > 0  # which is nothing in float32


def test_numbers_of_numpy() -> None:
    options = Sampling(np.float32(0.5), np.int64(3), np.float64(0.5), np.float32(0), np.float16(1), np.uint32(7))  # type: ignore[arg-type]
    plain = Sampling(0.5, 3, 0.5, 0, 1, 7)
    assert np.array_equal(options.words(), plain.words())


def test_seeds_are_drawn() -> None:
    seeds = {Sampling().seed for _ in range(20)}
    assert len(seeds) > 15
    assert all(isinstance(seed, int) and 0 <= seed < 1 << 32 for seed in seeds)


def test_words_of_the_shader() -> None:
    words = Sampling(0.5, 3, 0.25, 0.125, 2.0, (1 << 32) - 1).words()
    assert words.dtype == np.uint32
    assert words[:4].view(np.float32).tolist() == [0.5, 0.25, 0.125, 2.0]
    assert words[4:].tolist() == [3, (1 << 32) - 1]


@pytest.mark.parametrize("temperature", [0, 1e-9, 1e-300])
def test_a_temperature_that_logits_cannot_be_divided_by_is_none(temperature: float) -> None:
    assert Sampling(temperature=temperature).words()[0] == 0
