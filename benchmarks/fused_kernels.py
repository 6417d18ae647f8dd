"""The Triton kernels that torch makes of the fused functions for an H100, without one: python3 run.py bench fused_kernels

Each function of adastate_core/attention/block.py and decode/norm_silu.py is traced on fake CUDA tensors at the shapes of the 1.3B
and of the full VAE, 832x480 with the adaptive state, and handed to torch's inductor with a mocked device, which generates its code
and compiles nothing. The mocks reach into torch, so this may break with another torch; the tests count kernels in another way.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch._dynamo.device_interface import CudaInterface  # noqa: E402
from torch._inductor.decomposition import select_decomp_table  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.virtualized import V  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.func import functionalize  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_unflatten  # noqa: E402

from adastate_core.attention import block  # noqa: E402
from adastate_core.attention.fused_blocks import ROTATIONS  # noqa: E402
from adastate_core.decode import norm_silu  # noqa: E402

FUNCTIONS = block.FUNCTIONS | norm_silu.FUNCTIONS

TABLE = ROOT / "benchmarks" / "results" / "fused-kernels.md"
FRAMES, TOKENS, WIDTH, HEADS, EPS = 4, 1560, 1536, 12, 1e-6
# kernels of the code, at most: a noisy pass calls one of the two rotations
BUDGET = {"norm_modulate": 1, "norm_rotate": 2, "norm_rotate_raw": 3, "gate_norm": 1, "add_norm_modulate": 1, "gate": 1,
          "norm": 1, "norm_silu": 1}  # fmt: skip
# what an H100 says of itself, as far as it is asked
H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=80 << 30, L2_cache_size=50 << 20,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
)  # fmt: skip


@contextmanager
def mocked_h100() -> Iterator[None]:
    """Fake tensors on "cuda", for which torch believes that there is an H100."""
    compiler, driver = (
        __import__(f"triton.{name}", fromlist=["_"]) for name in ("backends.compiler", "runtime.driver")
    )
    target = compiler.GPUTarget("cuda", 90, 32)
    fixed = {
        CudaInterface: {"get_device_properties": H100, "get_compute_capability": 90},
        CudaInterface.Worker: {"get_device_properties": H100},
        torch.cuda: {"get_device_properties": H100, "get_device_capability": (9, 0), "is_available": True,
                     "current_device": 0, "device_count": 1, "_lazy_init": None},
    }  # fmt: skip

    def always(value: Any) -> Callable[..., Any]:
        return lambda *args: value

    with ExitStack() as stack:
        mode = stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.no_grad())
        for owner, answers in fixed.items():
            for name, value in answers.items():
                answer = always(value) if owner is torch.cuda else staticmethod(always(value))
                stack.enter_context(mock.patch.object(owner, name, answer))
        driver.driver.set_active(SimpleNamespace(get_current_target=always(target), get_current_device=always(0)))
        stack.enter_context(V.set_fake_mode(mode))
        stack.enter_context(V.set_debug_handler(mock.MagicMock()))
        yield


def arguments(name: str) -> tuple[Any, ...]:
    """What a pass gives a function, as shapes alone."""
    device, n = torch.device("cuda", 0), FRAMES * TOKENS

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    x, y, rows = empty(1, n, WIDTH), empty(1, n, WIDTH), (empty(1, 6, WIDTH), empty(1, 1, 6, WIDTH))
    weights = empty(WIDTH), empty(WIDTH)
    if name in ROTATIONS:
        turn = tuple(empty(n, 1, WIDTH // HEADS, dtype=torch.float32) for _ in range(2))
        return (
            x,
            y,
            empty(1, n, WIDTH),
            *weights,
            (EPS, EPS),
            turn,
            TOKENS,
            HEADS,
            empty(1, n, WIDTH),
            empty(1, n, WIDTH),
        )
    # pixels of the decoder's attention, and of 4 pictures where they are whole
    pixels = {"norm": (60 * 104, 384), "norm_silu": (4 * 480 * 832, 96)}
    if name in pixels:
        return empty(*pixels[name]), empty(pixels[name][1], dtype=torch.float32)
    return {
        "norm_modulate": (x, *rows, EPS),
        "gate_norm": (x, y, *rows, *weights, EPS),
        "add_norm_modulate": (x, y, *rows, EPS),
        "gate": (x, y, *rows),
    }[name]


def generated(name: str) -> str:
    """The Python source, with its Triton kernels, that inductor makes of a function."""
    leaves, form = tree_flatten(arguments(name))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    given = [leaves[i] for i in places]

    def function(*tensors: torch.Tensor) -> Any:
        filled = dict(zip(places, tensors, strict=True))
        return FUNCTIONS[name](*tree_unflatten([filled.get(i, leaf) for i, leaf in enumerate(leaves)], form))

    pure = functionalize(function, remove="mutations_and_views")
    module = make_fx(pure, decomposition_table=select_decomp_table())(*given)
    for node in module.graph.find_nodes(op="output"):
        if not isinstance(node.args[0], tuple | list):
            node.args = ((node.args[0],),)
    module.recompile()
    graph = GraphLowering(module, example_inputs=given)
    with V.set_graph_handler(graph):
        graph.run(*given)
        code, _ = graph.codegen()
    return str(getattr(code, "value", code))


def main() -> int:
    """Count, print and write the table; 1 if a function has more kernels than its budget says."""
    rows, wrong = [], False
    with mocked_h100():
        for name in FUNCTIONS:
            kernels = re.findall(r"\b(triton_\w+)\.run\(", generated(name))
            kinds = ", ".join("rows" if "_red_" in one or "_per_" in one else "numbers" for one in kernels)
            rows.append(f"| {name} | {len(kernels)} | {kinds} | {BUDGET[name]} |")
            wrong |= len(kernels) > BUDGET[name] or not kernels
            sys.stdout.write(rows[-1] + "\n")
    text = "\n".join(
        [
            "# Triton kernels of the fused functions",
            "",
            f"`python3 run.py bench fused_kernels`, torch {torch.__version__}, an H100 that is mocked: what inductor generates for "
            f"[1, {FRAMES * TOKENS}, {WIDTH}] in bfloat16. A kernel goes over rows, with a norm's sums in it, or over numbers. Of "
            "the rotations the last one puts the values into their slots. `norm` and `norm_silu` are the decoder's, of [6240, 384] "
            "and [1597440, 96]. Nothing is compiled or timed.",
            "",
            "| function | kernels | what each goes over | budget |",
            "| --- | ---: | --- | ---: |",
            *rows,
        ]
    )
    TABLE.write_text(text + "\n")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
