from collections.abc import Callable

import pytest

_REACHED = pytest.StashKey[list[str]]()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Shows a line, after the test's name, when all tests have run, passed or not."""
    lines = request.config.stash.setdefault(_REACHED, [])
    return lambda line: lines.append(f"{request.node.name}: {line}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = terminalreporter.config.stash.get(_REACHED, [])
    if lines:
        terminalreporter.section("distance from the reference")
    for line in lines:
        terminalreporter.write_line(line)
