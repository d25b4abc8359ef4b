"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma_wgpu.apps.server.engine import Engine
from gemma_wgpu.engine.request import Stats
from gemma_wgpu.gemma import Gemma

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_SPEEDS = (1, 3, 10, 20, 30, 50, 70, 100, 150, 200, 300, 500)


class Metrics:
    """Counts and measures while the server runs."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        named: dict[str, Any] = {"namespace": "gemma_wgpu", "registry": self._registry}
        self._requests = Counter("requests", "HTTP requests", ["path", "status"], **named)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts", **named)
        self._cached = Counter("cached_prompt_tokens", "Tokens of prompts that were in the cache already", **named)
        self._generated = Counter("generated_tokens", "Tokens that were generated", **named)
        self._images = Counter("encoded_images", "Images that were encoded", **named)
        self._endings = Counter("generations", "Texts by how they ended", ["reason"], **named)
        self._waited = Histogram("wait_seconds", "Seconds from a request to its beginning", buckets=_SECONDS, **named)
        self._first = Histogram(
            "prefill_seconds", "Seconds from the beginning to the first token", buckets=_SECONDS, **named
        )
        self._speed = Histogram(
            "decode_tokens_per_second", "Tokens a second after the first one", buckets=_SPEEDS, **named
        )
        self._state = Gauge("active_requests", "Requests by what they do", ["state"], **named)
        self._memory = Gauge("gpu_bytes", "Memory on the GPU by what it is for", ["use"], **named)
        self._gpu_bytes: Callable[[], dict[str, int]] = dict

    def watch(self, gemma: Gemma, engine: Engine) -> None:
        """Show how many requests run and wait, and what the model takes on the GPU now and after each text."""
        self._state.labels("running").set_function(lambda: engine.running)
        self._state.labels("waiting").set_function(lambda: engine.waiting)
        self._gpu_bytes = lambda: gemma.gpu_bytes
        self._measure()

    def ended(self, stats: Stats, reason: str, waited: float) -> None:
        """Note that a text has ended, which had `waited` so many seconds. Call this on the GPU's thread."""
        self._endings.labels(reason).inc()
        self._prompt.inc(stats.prompt_tokens)
        self._cached.inc(stats.reused_tokens)
        self._generated.inc(stats.new_tokens)
        self._images.inc(stats.encoded_images)
        self._waited.observe(waited)
        if stats.new_tokens:
            self._first.observe(stats.prefill_seconds)
        if stats.decode_tokens_per_second:
            self._speed.observe(stats.decode_tokens_per_second)
        self._measure()

    def _measure(self) -> None:
        for use, size in self._gpu_bytes().items():
            self._memory.labels(use).set(size)

    def counted(self, app: ASGIApp) -> ASGIApp:
        """Return `app`, but its responses are counted by path and status."""

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            async def note(message: Message) -> None:
                if message["type"] == "http.response.start":
                    route = scope.get("route")  # any path that somebody makes up would be a series of its own
                    self._requests.labels(getattr(route, "path", "other"), message["status"]).inc()
                await send(message)

            await app(scope, receive, note if scope["type"] == "http" else send)

        return call

    def text(self) -> bytes:
        """Return the figures in Prometheus's format."""
        return generate_latest(self._registry)
