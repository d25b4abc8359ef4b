"""Variants of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

from gemma_wgpu.gpu.device import AdapterInfo


@dataclass(frozen=True)
class Tuning:
    """Variants of the kernels, which compute the same, faster on one GPU than on another one.

    `lanes` is the number of threads that share a row of a matrix at decode. They read its memory together, but on a
    CPU their barriers cost more than that saves. `cpu` takes the variants for CPUs that stand in for a GPU.
    """

    lanes: int
    cpu: bool

    def __str__(self) -> str:
        return f"lanes={self.lanes}" + (",cpu" if self.cpu else "")

    @property
    def on_cpu(self) -> bool:
        """Say whether few workgroups run at a time, so that decode is to be divided into few."""
        return self.lanes == 1


def usual_tuning(adapter: AdapterInfo, features: frozenset[str]) -> Tuning:
    """Return what is likely to be best for an adapter of its kind."""
    if adapter.type != "CPU":
        return Tuning(16, cpu=False)
    # In browsers' WGSL `enable subgroups` must be said, and their CPU adapter has subgroups of 4 only.
    return Tuning(1, cpu="subgroups" in features and adapter.backend != "WebGPU")
