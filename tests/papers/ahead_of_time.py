"""Compile the Triton kernels for GPUs that need not be here; print each one's name and bytes of shared memory."""

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltax.kernels import triton_attention, triton_sage

TYPES = {"q_step": "*fp32", "k_step": "*fp32", "added": "*fp32", "slope": "*fp32", "total": "*fp32", "reached": "*fp32"}
TYPES |= dict.fromkeys(("q_at", "k_at", "q_segments", "k_segments"), "*i64")
FLASH = dict.fromkeys(("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v"), "*bf16")
SAGE = {"q": "*i8", "k": "*i8", "out": "*fp32"}
RULES = {"CAUSAL": True, "WINDOW": 9, "SLOPED": True, "PLACED": False, "SEGMENTED": True}
SIZES = {"HEADS": 4, "SHARED": 2, "WIDTH": 64, "PADDED": 64}


def compiled(name, kernel, types, constants, capability):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in types}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    print(name, triton.compile(source, target=GPUTarget("cuda", capability, 32)).metadata.shared)


if __name__ == "__main__":
    like = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16)
    for name in ("_forward", "_backward_keys"):
        rows, columns = triton_attention._tiles(like, None, back=name != "_forward")
        tile = {"ROWS": rows, "COLUMNS": columns, "SCALE": 0.125, "WIDE": tl.float32}
        kernel = getattr(triton_attention, name)
        compiled(name, kernel, TYPES | FLASH, {**SIZES, **RULES, **tile}, 80 if name == "_forward" else 90)
    tile = {"ROWS": 128, "COLUMNS": 64}
    small = {"ADDED": True, "WEIGHT": 448.0, "SUMS": tl.float32}
    compiled("_sage_2", triton_sage._sage, TYPES | SAGE | {"v": "*fp8e4nv"}, {**SIZES, **RULES, **tile, **small}, 90)
