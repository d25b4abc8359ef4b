"""The references of the kernels that look at a window around each pixel of a square image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def windows(x: NDArray[Any], kernel: int, stride: int) -> NDArray[Any]:
    """What each pixel that is made sees of an image (side, side, channels): (side_out^2, channels, kernel, kernel).

    There are side / stride pixels along a side, rounded up. The zeros around the image are as many as that takes, and
    half of them come before it, rounded down, as in TensorFlow's documentation of padding "SAME".
    """
    side = len(x)
    out = -(-side // stride)
    zeros = max((out - 1) * stride + kernel - side, 0)
    before, after = zeros // 2, zeros - zeros // 2
    padded = np.pad(x, ((before, after), (before, after), (0, 0)))
    seen = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), (0, 1))[::stride, ::stride]
    return seen[:out, :out].reshape(out * out, x.shape[2], kernel, kernel)
