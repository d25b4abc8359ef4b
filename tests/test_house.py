"""The rooms of the package: no import points up, and none goes round in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gemma_wgpu"

# From the ground up. Rooms of one floor do not know each other; the files on the ground are rooms of their own.
FLOORS = (
    ("errors", "html", "progress", "files"),
    ("options", "sources"),
    ("gpu", "pictures", "sounds"),
    ("ops", "tokens"),
    ("models",),
    ("weights",),
    ("engine", "fetch"),
    ("gemma",),
    ("bench",),
    ("apps",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def module(path: Path) -> str:
    """The dotted name of a file, without the package's."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path) for path in FILES}


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "gemma_wgpu" and len(parts) > 1:
                yield next(
                    (found for end in (3, 2, 1) if (found := ".".join(parts[1 : end + 1])) in MODULES), parts[1]
                )


GRAPH = {module(path): set(imported(path)) - {module(path)} for path in FILES}


def test_every_file_is_in_a_room() -> None:
    assert {name.partition(".")[0] for name in MODULES} == set(FLOOR)
    assert len(MODULES) > 40


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_no_import_points_up(name: str) -> None:
    room = name.partition(".")[0]
    for other in GRAPH[name]:
        target = other.partition(".")[0]
        assert target == room or FLOOR[target] < FLOOR[room], f"{name} imports {other}"


def test_no_import_goes_round_in_a_circle() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def test_the_checks_see_something() -> None:
    assert {"ops.kernels", "ops.kv_cache"} <= GRAPH["ops.step"]
    assert "fetch.download" in GRAPH["fetch.hub"]  # inside of a function


def test_a_layer_calls_its_attention_in_one_place() -> None:
    for path in (PACKAGE / "models").glob("*.py"):
        assert path.read_text(encoding="utf-8").count("step.attention(") <= 1, path
    others = [path for path in FILES if "step.attention(" in path.read_text(encoding="utf-8")]
    assert [path.parent.name for path in others] == ["models"] * len(others) != []
