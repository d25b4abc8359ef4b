"""A device that only keeps count. It says what a model would take before that is loaded."""

from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from gemma_wgpu.errors import DeviceError
from gemma_wgpu.gpu.device import Buffer, Constants, Device, Dispatch, Program

T = TypeVar("T")


class _Entry:
    def destroy(self) -> None:
        """Do nothing: there is no memory."""


class Ledger(Device):
    """Counts buffers in `allocated`, and refuses those over the limits of `adapter`, as its device would."""

    def _create_buffer(self, size: int, label: str) -> Any:
        return _Entry()

    def write(self, buffer: Buffer, data: NDArray[Any], offset: int = 0) -> None:
        """Keep nothing."""

    def copy(self, source: Buffer, target: Buffer, size: int, source_offset: int = 0, target_offset: int = 0) -> None:
        """Keep nothing."""

    def close(self) -> None:
        """Do nothing: nothing is held."""

    def _refuse(self) -> NoReturn:
        raise DeviceError("this device only counts; it cannot compute")

    def _create_pipeline(self, label: str, source: str, constants: Constants) -> Any:
        self._refuse()

    def record(self, dispatches: Sequence[Dispatch]) -> Program:
        """Raise DeviceError: nothing runs here."""
        self._refuse()

    def submit(self, programs: Sequence[Program]) -> None:
        """Raise DeviceError: nothing runs here."""
        self._refuse()

    def read(
        self, buffer: Buffer, offset: int = 0, size: int | None = None, *, after: Sequence[Program] = ()
    ) -> Awaitable[NDArray[np.uint8]]:
        """Raise DeviceError: nothing is kept here."""
        self._refuse()

    def _timestamps(self, programs: Sequence[Program], count: int) -> Awaitable[NDArray[np.float64]]:
        self._refuse()

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that has nothing to wait for. Raises DeviceError if it waits after all."""
        try:
            coroutine.send(None)
        except StopIteration as stop:
            result: T = stop.value
            return result
        self._refuse()
