"""Every kernel's cases, by the name of its shader. Free of pytest and of any backend."""

from __future__ import annotations

from types import ModuleType

from tests.kernels import (
    attention_combine,
    attention_decode,
    attention_prefill,
    average_pool,
    cache_copy,
    cache_write,
    embed,
    geglu,
    gelu,
    layer_norm,
    logits_scan,
    mask,
    matmul,
    matmul_int8,
    matvec,
    matvecs,
    norm_matvec,
    qk_norm_rope,
    quantize,
    read,
    rms_norm,
    sample,
    split_heads,
)

KERNELS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        attention_combine,
        attention_decode,
        attention_prefill,
        average_pool,
        cache_copy,
        cache_write,
        embed,
        geglu,
        gelu,
        layer_norm,
        logits_scan,
        mask,
        matmul,
        matmul_int8,
        matvec,
        matvecs,
        norm_matvec,
        qk_norm_rope,
        quantize,
        read,
        rms_norm,
        sample,
        split_heads,
    )
}
