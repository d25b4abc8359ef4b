"""The options of a generation; what they do is tested with the texts that are generated, and with the kernels."""

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_wgpu import GemmaError, Options, RequestError
from gemma_wgpu.engine.runner import Draw
from gemma_wgpu.options import OptionFields


def test_the_defaults_are_those_of_gemma() -> None:
    options = Options()
    assert (options.temperature, options.top_k, options.top_p, options.min_p) == (1.0, 64, 0.95, 0.0)
    assert options.repetition_penalty == 1.0


@pytest.mark.parametrize(
    ("option", "values", "range_"),
    [
        ("temperature", [-0.1, 101, math.nan, math.inf, -math.inf], "a number from 0 to 100"),
        ("top_k", [-1, (1 << 24) + 1, 1.5, 3.0, math.nan], "a whole number from 0 to 16,777,216"),
        ("top_p", [0, 0.0, -0.5, 1.01, math.nan], "a number above 0 up to 1"),
        ("min_p", [-0.01, 1.01, math.nan], "a number from 0 to 1"),
        ("repetition_penalty", [0.009, -1, 101, math.nan, math.inf], "a number from 0.01 to 100"),
        ("max_new_tokens", [0, -1, 1.5, math.inf], "a whole number above 0"),
        ("seed", [-1, 1 << 32, 0.5], "a whole number from 0 to 4,294,967,295"),
    ],
)
def test_options_that_are_wrong(option: str, values: list[float], range_: str) -> None:
    for value in [*values, True, "1", [1]]:
        with pytest.raises(RequestError) as raised:
            Options(**{option: value})  # type: ignore[arg-type]
        assert str(raised.value) in (f"{option} is {value!r}; it must be {range_}",)
        assert raised.value.option == option
        assert isinstance(raised.value, ValueError)
        assert isinstance(raised.value, GemmaError)


@pytest.mark.parametrize("option", ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"])
def test_none_is_wrong_for_all_but_the_seed(option: str) -> None:
    with pytest.raises(RequestError, match=f"^{option} is None; it must be "):
        Options(**{option: None})  # type: ignore[arg-type]


def words(**options: Any) -> NDArray[np.uint32]:
    """What the shaders are told."""
    made = Options(**options)
    return Draw(made, made.drawn_seed()).words()


def test_the_ends_of_the_ranges() -> None:
    Options(max_new_tokens=1, temperature=0, top_k=0, top_p=1e-9, min_p=0, repetition_penalty=0.01, seed=0)
    Options(temperature=100, top_k=1 << 24, top_p=1, min_p=1, repetition_penalty=100, seed=(1 << 32) - 1)
    assert words(top_p=5e-324).view(np.float32)[1] > 0  # which is nothing in float32


def test_numbers_of_numpy() -> None:
    numbers: dict[str, Any] = {
        "temperature": np.float32(0.5),
        "top_k": np.int64(3),
        "top_p": np.float64(0.5),
        "min_p": np.float32(0),
        "repetition_penalty": np.float16(1),
        "seed": np.uint32(7),
    }
    assert np.array_equal(words(**numbers), words(**{name: value.item() for name, value in numbers.items()}))


def test_seeds_are_drawn() -> None:
    seeds = {Options().drawn_seed() for _ in range(20)}
    assert len(seeds) > 15
    assert all(0 <= seed < 1 << 32 for seed in seeds)
    assert Options(seed=7).drawn_seed() == 7


def test_seeds_of_several_texts() -> None:
    options = Options(seed=(1 << 32) - 2)
    assert [options.for_text(index).seed for index in range(4)] == [(1 << 32) - 2, (1 << 32) - 1, 0, 1]
    assert Options().for_text(3).seed is None


@pytest.mark.parametrize(
    ("stop", "strings"), [("a", ("a",)), (["a", "b"], ("a", "b")), ((), ()), (iter(["a"]), ("a",))]
)
def test_stop_strings(stop: Any, strings: tuple[str, ...]) -> None:
    assert Options(stop=stop).stop_strings == strings


def test_the_fields_by_name_are_those_of_the_options() -> None:
    assert list(OptionFields.__annotations__) == [field.name for field in fields(Options)]


def test_words_of_the_shader() -> None:
    told = words(temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, repetition_penalty=2.0, seed=(1 << 32) - 1)
    assert told.dtype == np.uint32
    assert told[:4].view(np.float32).tolist() == [0.5, 0.25, 0.125, 2.0]
    assert told[4:].tolist() == [3, (1 << 32) - 1]


@pytest.mark.parametrize("temperature", [0, 1e-9, 1e-300])
def test_a_temperature_that_logits_cannot_be_divided_by_is_none(temperature: float) -> None:
    assert words(temperature=temperature)[0] == 0
