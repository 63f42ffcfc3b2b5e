"""The kernels against torch's, as ratios; on a GPU each of SDPA's backends, Triton's kernels, and the roofline.

On a CPU: what `kernels.fastest` puts in for `attend` against `attend`, and a chain of elementwise operators compiled
into one against the chain.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import timing
from deltax import part
from deltax.kernels.attention import sdpa
from deltax.kernels.choice import candidates, choose, has_triton
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.language.position.alibi import Distance
from deltax.parts.attention.scores import Rules, causal, window

BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    rows = _on_a_gpu() if torch.cuda.is_available() else {**_on_a_cpu(), **_fused()}
    timing.store("kernels", rows)


def _rules(heads: int, device: str) -> dict[str, Rules]:
    return {
        "causal": Rules(mask=part(causal)),
        "window of 256": Rules(mask=part(window, width=256)),
        "ALiBi": Rules(Distance(heads).to(device), part(causal)),
    }


def _on_a_cpu() -> dict[str, Any]:
    rows = {}
    q, k, v = (torch.randn(2, 512, 4, 32, requires_grad=True) for _ in range(3))
    for name, rules in _rules(4, "cpu").items():
        picked = choose(q, k, v, rules)
        rows |= _against(
            f"{picked.name} against attend, {name}, 512 positions", picked.kernel, attend, (q, k, v), rules
        )
    return rows


def _fused() -> dict[str, Any]:
    x = torch.randn(10_000_000)

    def chain(x: Tensor) -> Tensor:
        for operator in [torch.neg, torch.abs, torch.relu, torch.square] * 2:
            x = operator(x)
        return x

    compiled = torch.compile(chain)
    seconds = timing.interleave({"ours": lambda: compiled(x), "peer": lambda: chain(x)}, rounds=9)
    return {"eight elementwise operators, compiled into one": timing.ratio(seconds["ours"], seconds["peer"])}


def _on_a_gpu() -> dict[str, Any]:
    peak, bandwidth = _roofline()
    rows: dict[str, Any] = {"roofline": {"flops_per_second": peak, "bytes_per_second": bandwidth}}
    for time in (512, 2048, 8192):
        b, h, width = max(1, 16384 // time), 16, 64
        q, k, v = (
            torch.randn(b, time, h, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        for name, rules in _rules(h, "cuda").items():
            said = f"{name}, {b} x {time} positions, bfloat16"
            picked = choose(q, k, v, rules)
            ours = candidates(q, k, v, rules).get("triton", sdpa)
            pairs = 256 * time if name.startswith("window") else time * time / 2
            flops = 3.5 * 4 * b * h * width * pairs  # two products forward, five backward
            for backend, which in BACKENDS.items():
                found = _try(f"Triton against {backend}, {said}", ours, _through(which), (q, k, v), rules)
                for row in found.values():
                    row |= {"of_peak": flops / row["ours_seconds"] / peak, "picked": picked.name} if row else {}
                rows |= found
        rows |= _sage(time)
    return rows


def _sage(time: int) -> dict[str, Any]:
    """Forward alone: SageAttention against SDPA's flash kernel."""
    if not has_triton():
        return {}
    from deltax.kernels import triton_sage

    q, k, v = (torch.randn(max(1, 16384 // time), time, 16, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    rows = {}
    for name in ("sage", "sage_2"):
        said = f"{name} in Triton against SDPA flash, causal, forward, {time} positions"
        rows |= _try(
            said, getattr(triton_sage, name), _through(SDPBackend.FLASH_ATTENTION), (q, k, v), Rules(mask=part(causal))
        )
    return rows


def _through(backend: SDPBackend) -> Callable[..., Tensor]:
    def run(*given: Any) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(*given)

    return run


def _try(name: str, ours: Callable, peer: Callable, tensors: tuple[Tensor, ...], rules: Rules) -> dict[str, Any]:
    """Nothing where a backend does not take the arguments."""
    try:
        return _against(name, ours, peer, tensors, rules)
    except RuntimeError as error:
        print(f"{name}: left out, {str(error).splitlines()[0]}")
        return {}


def _against(name: str, ours: Callable, peer: Callable, tensors: tuple[Tensor, ...], rules: Rules) -> dict[str, Any]:
    weight, cuda = torch.randn_like(tensors[0]), tensors[0].is_cuda
    trains = tensors[0].requires_grad

    def step(kernel: Callable) -> Callable[[], None]:
        def run() -> None:
            with nullcontext() if trains else torch.no_grad():
                out = kernel(*tensors, rules)
            if trains:
                torch.autograd.grad(out, tensors, weight)
            if cuda:
                torch.cuda.synchronize()

        return run

    seconds = timing.interleave({"ours": step(ours), "peer": step(peer)}, rounds=15)
    return {name: timing.ratio(seconds["ours"], seconds["peer"])}


def _roofline() -> tuple[float, float]:
    """FLOPs a second of a large matrix product, bytes a second of a large copy: what this GPU was seen to reach."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    big = torch.empty(2**28, device="cuda", dtype=torch.float32)
    other = torch.empty_like(big)

    def synchronised(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            call()
            torch.cuda.synchronize()

        return run

    calls = {"product": synchronised(lambda: a @ a), "copy": synchronised(lambda: other.copy_(big))}
    seconds = {name: min(s) for name, s in timing.interleave(calls).items()}
    return 2 * 8192**3 / seconds["product"], 2 * big.numel() * 4 / seconds["copy"]
