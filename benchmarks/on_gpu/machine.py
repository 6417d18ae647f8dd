"""The card, what runs on it, and what it reaches at best: copies, matrix products, attention by back end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from on_gpu.bench import Bench, Section, median_of, ms

BACK_ENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def ceilings(bench: Bench) -> dict[str, float]:
    """Bytes a second of a copy, and FLOP a second of a large matrix product in the model's dtype."""
    large = bench.device == "cuda"
    x = torch.empty((2**30 if large else 2**24) // 4, dtype=torch.float32, device=bench.device)
    y = torch.empty_like(x)
    n = 8192 if large else 512
    a, b = (torch.randn(n, n, device=bench.device, dtype=bench.host.dtype) for _ in range(2))
    return {
        "copy": 2 * x.nbytes / median_of(lambda: y.copy_(x), bench.size.rounds, 2),
        "gemm": 2 * n**3 / median_of(lambda: a @ b, bench.size.rounds, 2),
    }


def machine(bench: Bench) -> Section:
    """What was measured on, and its ceilings."""
    import comfy.ldm.wan.model

    host, size = bench.host, bench.size
    found = ceilings(bench)
    rows = [
        ["torch", torch.__version__],
        ["CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}"],
        ["the host's attention", comfy.ldm.wan.model.optimized_attention.__name__],
        ["dtype", str(host.dtype).removeprefix("torch.")],
        ["copy, read and written", f"{found['copy'] / 1e9:.3g} GB/s"],
        ["matrix product, large", f"{found['gemm'] / 1e12:.3g} TFLOP/s"],
    ]
    width = host.geometry.heads * host.geometry.head_dim
    tokens = 4 * (size.height // 16) * (size.width // 16)
    for name, inner in (
        ("width x width", width),
        ("feed-forward", host.patcher.model.diffusion_model.blocks[0].ffn[0].out_features),
    ):
        x = torch.randn(tokens, width, device=bench.device, dtype=host.dtype)
        weight = torch.randn(inner, width, device=bench.device, dtype=host.dtype)
        seconds = median_of(lambda x=x, weight=weight: F.linear(x, weight), size.rounds, 2)
        rows.append([f"linear, {name}, {tokens} tokens", f"{2 * tokens * width * inner / seconds / 1e12:.3g} TFLOP/s"])
    rows += [[f"attention, {name}, 4 frames on 8", text] for name, text in attentions(bench, tokens).items()]
    return Section("The machine", ["what", "figure"], rows)


def attentions(bench: Bench, tokens: int) -> dict[str, str]:
    """Speed of torch's attention by back end, and of the one that it chooses."""
    geometry, found = bench.host.geometry, {}
    q = torch.randn(1, geometry.heads, tokens, geometry.head_dim, device=bench.device, dtype=bench.host.dtype)
    k = torch.randn(1, geometry.heads, 2 * tokens, geometry.head_dim, device=bench.device, dtype=bench.host.dtype)
    flop = 4 * geometry.heads * geometry.head_dim * tokens * 2 * tokens
    # the last one makes a matrix of all queries and keys: too large for a large picture
    for name, back_end in {"torch's choice": None, **BACK_ENDS}.items():
        if name == "math" and bench.device == "cuda":
            continue
        try:
            with sdpa_kernel(list(BACK_ENDS.values()) if back_end is None else back_end):
                seconds = median_of(lambda: F.scaled_dot_product_attention(q, k, k), bench.size.rounds, 2)
            found[name] = f"{ms(seconds)} ms, {flop / seconds / 1e12:.3g} TFLOP/s"
        except RuntimeError as error:
            found[name] = f"not offered: {str(error).splitlines()[0]}"
    return found
