"""The checks of the kernels, as they are natively, in the browser. Its software adapter has no float16."""

import pytest

from tests.browser.conftest import Chromium
from tests.kernels.cases import KERNELS
from tests.kernels.test_kernels import name

CASES = [(kernel, i) for kernel, module in KERNELS.items() for i, case in enumerate(module.CASES) if not case.half]


def _id(kernel: str, i: int) -> str:
    return f"{kernel}-{name(KERNELS[kernel].CASES[i])}"


@pytest.mark.parametrize(("kernel", "case"), CASES, ids=[_id(*case) for case in CASES])
def test_kernel(chromium: Chromium, kernel: str, case: int) -> None:
    chromium.run(f"from tests.browser.inside import check_kernel; await check_kernel({kernel!r}, {case})")
