"""The Triton kernels against their references, in Triton's interpreter where there is no GPU.

The interpreter of Triton 3.7.1 multiplies the bits of bfloat16, cuts it off instead of rounding, and loses the carry
when it rounds to 8-bit floats (triton-lang/triton, issue 11584 and pull request 11897): `correct` mends it with torch.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deltax import UserError, kernels, part
from deltax.kernels import choice
from deltax.kernels.attention import sdpa
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.language.models.gpt import gpt
from deltax.papers.language.position.alibi import Distance
from deltax.papers.systems.attention_kernels import online_softmax
from deltax.papers.systems.attention_kernels.flash_attention import flash
from deltax.papers.systems.attention_kernels.sage_attention import in_8_bits, sage, sage_attention, smooth
from deltax.papers.systems.attention_kernels.sage_attention_2 import sage_2, sage_attention_2
from deltax.parts.attention.scores import Rules, causal, window

triton = pytest.importorskip("triton")
from deltax.kernels import triton_attention, triton_sage, triton_softmax  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}


@pytest.fixture(autouse=True)
def correct(monkeypatch):
    if DEVICE.type == "cuda":
        return
    from triton.runtime import interpreter

    as_was, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    whole, fp32 = {8: np.int8, 16: np.int16, 32: np.int32}, triton.language.float32

    def convert(data, old, new, rounding):
        if old.name not in FLOATS or new.name not in FLOATS:
            return as_was(data, old, new, rounding)
        bits = np.ascontiguousarray(data).view(whole[old.primitive_bitwidth])
        rounded = torch.from_numpy(bits).view(FLOATS[old.name]).to(FLOATS[new.name])
        out = rounded.view(getattr(torch, f"int{new.primitive_bitwidth}")).numpy()
        return out.view(f"uint{new.primitive_bitwidth}")

    def multiply(self, a, b, d, precision, most):
        wide = [
            interpreter.TensorHandle(convert(x.data, x.dtype, fp32, None).view(np.float32), fp32)
            if x.dtype.name == "bf16"
            else x
            for x in (a, b)
        ]
        if wide[0] is a:
            return dot(self, a, b, d, precision, most)
        return interpreter.TensorHandle(np.matmul(wide[0].data, wide[1].data) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", multiply)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a kernel does not write, and what it must not read beside its inputs, is NaN."""
    empty = torch.empty

    def poisoned(*size, **options):
        new = empty(*size, **options)
        return new.fill_(torch.nan) if new.is_floating_point() else new

    monkeypatch.setattr(torch, "empty", poisoned)


def surrounded(*shape, dtype=torch.float64):
    """Random numbers in the midst of NaN."""
    whole = torch.full([n + 2 for n in shape], torch.nan, dtype=dtype, device=DEVICE)
    inside = whole[tuple(slice(1, n + 1) for n in shape)]
    inside.copy_(torch.randn(shape, dtype=torch.float64))
    return inside


def drawn(queries, keys, heads=2, groups=1, width=5, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((queries, heads), (keys, groups), (keys, groups))
    return [surrounded(2, time, n, width, dtype=dtype).requires_grad_() for time, n in shapes]


def at(*shape):
    return torch.randint(40, shape, device=DEVICE)


def rule(name, queries, keys):
    """Rules by name, for two examples."""
    padded = lambda n: (torch.arange(n, device=DEVICE) >= torch.tensor([[n - 3], [n]], device=DEVICE)).long()
    torch.manual_seed(1)
    return {
        "everywhere": lambda: Rules(),
        "causal": lambda: Rules(mask=part(causal)),
        "window": lambda: Rules(mask=part(window, width=6)),
        "alibi": lambda: Rules(Distance(2).to(DEVICE), part(causal)),
        "positions": lambda: Rules(Distance(2).to(DEVICE), part(window, width=17), at(2, queries), at(keys)),
        "segments": lambda: Rules(mask=part(causal), q_segments=padded(queries), k_segments=1 - padded(keys)),
    }[name]()


@pytest.mark.parametrize(
    ("name", "queries", "keys"),
    [
        ("everywhere", 19, 35),
        ("causal", 35, 35),
        ("causal", 19, 7),
        ("window", 35, 35),
        ("alibi", 19, 19),
        ("positions", 19, 18),
        ("segments", 19, 19),
    ],
)
def test_flash_is_attention(name, queries, keys):
    """Output and gradients to 1e-12 in float64, over tiles that the lengths do not fill."""
    q, k, v = drawn(queries, keys)
    rules, weight = rule(name, queries, keys), torch.randn_like(q)
    assert not triton_attention.unfit(q, k, v, rules)
    found = []
    for kernel in (part(triton_attention.flash, block=16), attend):
        out = kernel(q, k, v, rules)
        found.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_flash_with_two_groups_of_three_heads():
    q, k, v = drawn(17, 17, heads=6, groups=2, width=3)
    rules, weight = Rules(mask=part(causal)), torch.randn_like(q)
    found = []
    for kernel in (part(triton_attention.flash, block=16), attend):
        out = kernel(q, k, v, rules)
        found.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)], ids=str
)
def test_flash_in_less_precision(dtype, near):
    """As far from float64 as the type rounds, relative to the largest, forward and backward, with tiles as on a GPU."""
    q, k, v = drawn(19, 19, dtype=dtype)
    rules = Rules(mask=part(causal))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    weight = torch.randn_like(q)
    out = triton_attention.flash(q, k, v, rules)
    exact = attend(*wide, rules)
    found = [out, *torch.autograd.grad((out * weight).sum(), (q, k, v))]
    wanted = [exact, *torch.autograd.grad((exact * weight).sum(), wide)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).abs().max() < 2 * near * theirs.abs().max()


def test_flash_hands_on_what_it_has_no_code_for():
    q, k, v = drawn(9, 9)
    bent = Rules(lambda s, b, h, i, j: s.tanh(), part(causal))
    assert "function of its own" in triton_attention.unfit(q, k, v, bent)
    assert torch.equal(triton_attention.flash(q, k, v, bent), attend(q, k, v, bent))
    assert "one floating-point type" in triton_attention.unfit(q, k.float(), v, Rules())
    assert "on chip" in triton_attention.unfit(*drawn(9, 9, width=300), Rules())
    with pytest.raises(UserError, match="power of two"):
        triton_attention.flash(q, k, v, block=24)


@pytest.mark.parametrize("shape", [(3, 133), (2, 3, 7), (4, 1)], ids=str)
def test_softmax_is_softmax(shape):
    torch.manual_seed(0)
    scores = torch.randn(shape, dtype=torch.float64, device=DEVICE) * 20
    scores[0] = -torch.inf
    scores[-1, ..., 0] = 1.0
    scores.requires_grad_()
    weight = torch.randn_like(scores)
    for block in (7, 1024):
        found = []
        for kernel in (triton_softmax.softmax, online_softmax.softmax):
            out = kernel(scores, block=block)
            found.append([out, torch.autograd.grad((out * weight).sum(), scores)[0]])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    with pytest.raises(UserError, match="at least 1"):
        triton_softmax.softmax(scores, block=0)


@pytest.mark.parametrize("name", ["causal", "window", "alibi", "segments"])
@pytest.mark.parametrize(
    ("twin", "reference", "near"),
    [(triton_sage.sage, sage_attention, 3e-3), (triton_sage.sage_2, sage_attention_2, 3e-3)],
    ids=["sage", "sage_2"],
)
def test_sage_is_the_papers(twin, reference, near, name):
    """As near to the simulated integers as half precision and 22 bits let it, and they are further from exact."""
    q, k, v = (t.detach() for t in drawn(131, 131, dtype=torch.float32))
    k = k + 3
    rules = rule(name, 131, 131)
    assert not triton_sage.unfit(q, k, v, rules)
    wanted = reference(q, k, v, rules)
    off = (twin(q, k, v, rules) - wanted).abs().max()
    assert off < near * wanted.abs().max() and off < (wanted - attend(q, k, v, rules)).abs().max() / 2


def test_sage_refuses_gradients_and_hands_on_what_it_has_no_code_for():
    q, k, v = drawn(9, 9, dtype=torch.float32)
    bent = Rules(lambda s, b, h, i, j: s.tanh())
    assert torch.equal(triton_sage.sage(q, k, v, bent), sage_attention(q, k, v, bent))
    with pytest.raises(UserError, match="no gradient"):
        triton_sage.sage_2(q, k, v).sum().backward()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the peer's kernels are for the GPU it was tuned on")
def test_sage_is_the_authors():
    """The integers, the steps and the output of sageattention 1.0.6, its own kernels run in the interpreter."""
    peer = pytest.importorskip("sageattention")
    from sageattention.attn_qk_int8_per_block import forward
    from sageattention.quant_per_block import per_block_int8

    assert peer
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 128, heads, 64) for heads in (2, 1, 1))
    k = k + 2 * torch.randn(64)
    whole_q, step_q, whole_k, step_k = per_block_int8(q, smooth(k)[0], tensor_layout="NHD")
    theirs = forward(whole_q, whole_k, v.half(), step_q, step_k, tensor_layout="NHD")
    ours_q, ours_k = in_8_bits(q, k)
    assert torch.equal(ours_k.whole, whole_k.float())
    assert (ours_q.whole - whole_q).abs().max() <= 1 and (ours_q.whole != whole_q).float().mean() < 1e-3
    torch.testing.assert_close(ours_q.step[:, 0, :, 0] * 1.44269504, step_q[:, :, 0, 0], rtol=1e-5, atol=0)
    for ours in (sage_attention(q, k, v), triton_sage.sage(q, k, v)):
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=2e-3)


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """For compute capability 8.0 or 9.0 they become machine code, within the shared memory of the smallest such GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    script = Path(__file__).parent / "ahead_of_time.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shared = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert len(shared) == 3 and max(shared.values()) <= 99 * 1024


def test_on_a_cpu_torch_computes_and_says_so():
    cpu = torch.device("cpu")
    kernel, tiled = "model.stack.block.mixer.kernel", gpt + flash(tile=16)
    assert kernels.fastest(gpt, cpu)[kernel] == part(sdpa)
    assert kernels.fastest(tiled, cpu)[kernel] == tiled[kernel]
    (line,) = set(kernels.said(gpt, cpu)) - set(kernels.said(tiled, cpu))
    assert line.startswith("attend -> sdpa on cpu: torch's fused kernel")
    q, k, v = (t.cpu() for t in drawn(9, 9))
    assert choice.choose(q, k, v, Rules(mask=part(causal))).name == "sdpa"
    assert choice.choose(q, k, v, Rules(lambda s, b, h, i, j: s.tanh())).name == "attend"
    torch.testing.assert_close(choice.auto(q, k, v), attend(q, k, v), rtol=1e-12, atol=1e-12)
    assert any(line.startswith("cpu float64, 2 x up to 16 queries and 16 keys") for line in choice.picked())


def test_on_a_gpu_each_reference_has_its_twin():
    gpu, kernel = torch.device("cuda"), "model.stack.block.mixer.kernel"
    assert kernels.fastest(gpt, gpu)[kernel] == part(choice.auto)
    assert kernels.fastest(gpt + flash(tile=60), gpu)[kernel] == part(triton_attention.flash)
    assert kernels.fastest(gpt + sage, gpu)[kernel] == part(triton_sage.sage)
    assert kernels.fastest(gpt + sage_2(largest=127), gpu)[kernel] == part(triton_sage.sage_2, largest=127)
    assert "flash_attention -> flash on cuda: its Triton kernel" in kernels.said(gpt + flash(), gpu)
    for recipe in (gpt, gpt + flash()):
        assert kernels.reference(kernels.fastest(recipe, gpu))[kernel] == part(attend)


@pytest.mark.parametrize(
    ("rules", "time", "dtype", "name", "why"),
    [
        (Rules(mask=part(causal)), 4096, torch.bfloat16, "sdpa", "as it is"),
        (Rules(mask=part(window)), 4096, torch.bfloat16, "triton", "bias for every score"),
        (Rules(mask=part(window)), 128, torch.bfloat16, "sdpa", "cheap"),
        (Rules(mask=part(window)), 4096, torch.float32, "sdpa", "matrix units"),
        (Rules(mask=lambda b, h, i, j: i > j), 4096, torch.bfloat16, "sdpa", "does not take"),
        (Rules(lambda s, b, h, i, j: s.tanh()), 4096, torch.bfloat16, "attend", "no bias"),
    ],
)
def test_the_table_for_a_gpu(rules, time, dtype, name, why):
    """Asked with tensors that say they are on a GPU and hold nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.zeros(2, time, 4, 64, dtype=dtype, device="cuda") for _ in range(3))
        found = choice._by_table(q, k, v, rules)
    assert found.name == name and why in found.why


def test_what_was_timed_is_chosen_from_then_on(monkeypatch):
    clock = [0.0]

    def taking(seconds, kernel):
        def run(*given):
            clock[0] += seconds
            return kernel(*given)

        return run

    monkeypatch.setattr(choice, "_timed", {})
    monkeypatch.setattr(choice, "_picked", {})
    monkeypatch.setattr(choice, "_now", lambda device: clock[0])
    slow = {"attend": taking(1, attend), "sdpa": taking(5, sdpa)}
    monkeypatch.setattr(choice, "candidates", lambda *given: slow)
    q, k, v = (t.detach().cpu().contiguous().requires_grad_() for t in drawn(9, 9))
    rules = Rules(mask=part(causal))
    assert choice.choose(q, k, v, rules).name == "sdpa"
    found = choice.timed(q, k, v, rules, rounds=3)
    assert found.name == "attend" and found.why == "timed: 1e+03 ms against sdpa 5e+03 ms"
    assert choice.choose(q, k, v, rules) == found
    assert choice.choose(*(t[:, :3] for t in (q, k, v)), rules).name == "sdpa"
    torch.testing.assert_close(choice.auto(q, k, v, rules), attend(q, k, v, rules))
