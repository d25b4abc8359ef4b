"""Every kernel's cases, by the name of its shader. Free of pytest and of any backend."""

from __future__ import annotations

from types import ModuleType

from tests.kernels import (
    embed,
    geglu,
    matmul,
    matvec,
    norm_matvec,
    rms_norm,
)

KERNELS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        embed,
        geglu,
        matmul,
        matvec,
        norm_matvec,
        rms_norm,
    )
}
