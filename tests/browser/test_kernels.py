"""The checks of the kernels, as they are natively, in the browser."""

import pytest

from tests.browser.conftest import Chromium
from tests.browser.inside import cases
from tests.kernels.cases import KERNELS
from tests.kernels.test_kernels import name


@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        pytest.param(kernel, i, id=f"{kernel}-{name(case)}")
        for kernel in KERNELS
        for i, case in enumerate(cases(kernel))
    ],
)
def test_kernel(chromium: Chromium, kernel: str, case: int) -> None:
    chromium.run(f"from tests.browser.inside import check_kernel; await check_kernel({kernel!r}, {case})")
