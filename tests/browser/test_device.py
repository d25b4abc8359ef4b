import pytest

from tests.browser.conftest import Chromium
from tests.browser.device_checks import CHECKS

PLACES = ("page", "worker")


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_device(chromium: Chromium, check: str) -> None:
    chromium.run(f"from tests.browser.device_checks import run; await run({check!r})")


@pytest.mark.parametrize(
    "check",
    [
        "dispatches_and_programs_run_in_order",
        "a_failure_that_nobody_awaits_does_no_harm",
        "wait_blocks_where_jspi_is",
    ],
)
def test_device_in_a_page(chromium: Chromium, check: str) -> None:
    chromium.run(f"from tests.browser.device_checks import run; await run({check!r})", where="page")


@pytest.mark.parametrize("where", PLACES)
def test_without_jspi_the_async_interface_is_named(chromium: Chromium, where: str) -> None:
    chromium.run("from tests.browser.device_checks import cannot_block; cannot_block()", where=where, can_block=False)


@pytest.mark.parametrize("where", PLACES)
def test_without_webgpu_the_browsers_that_have_it_are_named(chromium: Chromium, where: str) -> None:
    chromium.run(
        "from pyodide.code import run_js\n"
        "from tests.browser.device_checks import no_webgpu\n"
        "run_js(\"Object.defineProperty(navigator, 'gpu', { value: undefined, configurable: true })\")\n"
        "try:\n"
        "    await no_webgpu()\n"
        "finally:\n"
        "    run_js('delete navigator.gpu')",
        where=where,
    )
