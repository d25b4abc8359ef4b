"""The errors of this package. Each message is one line that says what is wrong and what to do next."""

from __future__ import annotations


class GemmaError(Exception):
    """This is the base of every error that the package raises on purpose."""

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows: the sentence alone."""
        return [f"{type(self).__name__}: {self}"]


class ModelError(GemmaError):
    """A model file or folder is missing, is damaged, or is of a kind that this package cannot run."""


class DeviceError(GemmaError):
    """There is no GPU adapter, it lacks what was asked of it, it ran out of memory, or it was lost."""


class RequestError(GemmaError, ValueError):
    """A prompt, a token id or an option is outside what the model or the method accepts.

    `option` is the name of the option at fault, if one is.
    """

    def __init__(self, message: str, *, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


class ContextError(RequestError):
    """A prompt has more tokens than the context of the model."""
