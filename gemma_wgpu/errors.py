"""What can go wrong, by whose hand it is to be mended. Each message is one line that says what to do next."""


class GemmaError(Exception):
    """Base of every error this package raises on purpose."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the sentence alone."""
        return [f"{type(self).__name__}: {self}"]


class ModelError(GemmaError):
    """A model file or folder is missing, damaged, or not a Gemma 3 that this package can run."""


class DeviceError(GemmaError):
    """There is no GPU adapter, it lacks what was asked of it, it ran out of memory, or it was lost."""


class RequestError(GemmaError, ValueError):
    """A prompt, a token id or an option is outside what the model or the method accepts."""
