"""Claims of float-formats: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import Tensor, nn

from deltax import claim
from deltax.papers.systems.performance.float_formats import FORMATS, LossScale, bits, mixed_step, nearest, stochastic


@claim
def the_layouts_have_these_ends():
    """The largest fp16 is 65504, the smallest normal 2^-14. Rounding to each of four formats is off by at most
    2^-(m+1).
    """
    assert FORMATS["fp16"].largest == 65504 and FORMATS["fp16"].smallest_normal == 2**-14
    assert [1 + sum(FORMATS[f]) for f in ("fp32", "tf32", "bf16", "fp16")] == [32, 19, 16, 16]
    x = values(10_001).double()
    x = x * (1 + torch.rand_like(x) / 1024)
    for form in FORMATS.values():
        normal = x[(x.abs() >= form.smallest_normal) & (x.abs() <= form.largest)]
        off = (nearest(normal, form) / normal - 1).abs()
        assert 0.9 * 2.0 ** -(form.mantissa + 1) < off.max() <= 2.0 ** -(form.mantissa + 1)
        once = nearest(x, form).nan_to_num(3.0, torch.inf, -torch.inf)
        assert torch.equal(nearest(once, form), once)
        assert form.exponent == 5 or form.smallest_normal == FORMATS["fp32"].smallest_normal


@claim.parity(peer="torch.float16, torch.bfloat16 and torch.float32")
def equals_torchs_casts():
    """A million float32 numbers of any bits are rounded to fp16 and bf16 as by torch, bit for bit; so are float64 to
    fp32.
    """
    peers = {"fp16": (torch.float16, torch.int16), "bf16": (torch.bfloat16, torch.int16)}
    for name, (dtype, stored) in {**peers, "fp32": (torch.float32, torch.int32)}.items():
        form, info = FORMATS[name], torch.finfo(dtype)
        x = values(1_000_003 if name != "fp32" else 100_003)
        x = x.double() * (1 + 2.0**-30) if name == "fp32" else x  # float64 to float32; else float32 to 16 bits
        theirs = x.to(dtype)
        ours = nearest(x, form)
        assert torch.equal(ours.nan_to_num(3.0), theirs.double().nan_to_num(3.0))
        fine = ~x.isnan()  # a NaN may carry any mantissa
        width = 1 + sum(form)
        assert torch.equal(bits(x, form)[fine], theirs.view(stored).long()[fine] & (2**width - 1))
        assert (form.largest, form.smallest_normal) == (info.max, info.smallest_normal)


@claim.parity(peer="torch.amp.GradScaler")
def the_scale_is_torchs():
    """Over 60 steps, a fifth of which overflow, the loss scale equals torch.amp.GradScaler's at each step."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    ours = LossScale(2.0**10, interval=3)
    for overflowed in (torch.rand(60) < 0.2).tolist():
        optimizer.zero_grad()
        theirs.scale((weight * (torch.inf if overflowed else 1.0)).sum()).backward()
        theirs.step(optimizer)
        theirs.update()
        ours.update(overflowed)
        assert ours.scale == theirs.get_scale()


@claim
def scaling_saves_small_gradients():
    """A gradient of 2^-26 is zero in fp16, and not with a scale of 2^10 or in bf16. An overflow skips the step and
    halves the scale.
    """
    for form, scale, moved in (("fp16", 1.0, False), ("fp16", 2.0**10, True), ("bf16", 1.0, True)):
        weight = nn.Parameter(torch.zeros(5))
        step = torch.optim.SGD([weight], lr=1.0)
        assert mixed_step(lambda w: 2.0**-26 * w.sum(), [weight], step, form=form, scale=LossScale(scale))
        assert torch.equal(weight.detach(), torch.full((5,), -(2.0**-26) if moved else 0.0))
    scaling, before = LossScale(), weight.detach().clone()
    assert not mixed_step(lambda w: 2 * w.sum(), [weight], step, scale=scaling)
    assert scaling.scale == 2**15 and torch.equal(weight.detach(), before)


@claim
def masters_keep_what_16_bits_round_away():
    """After 256 steps of 2^-10, a bf16 weight of 1 is unchanged and a 32-bit master is exactly 1.25. With stochastic
    rounding the mean is 1.25.
    """
    torch.manual_seed(0)
    form, step = FORMATS["bf16"], 2.0**-10
    master, pure, chance = nn.Parameter(torch.ones(2000)), torch.ones(2000), torch.ones(2000)
    descent = torch.optim.SGD([master], lr=step)
    for _ in range(256):
        mixed_step(lambda w: -w.sum(), [master], descent, form="bf16")
        pure, chance = nearest(pure + step, form), stochastic(chance + step, form)
    assert torch.equal(master.detach(), torch.full((2000,), 1.25)) and torch.equal(pure, torch.ones_like(pure))
    assert abs(chance.mean() - 1.25) < 5 * chance.std() / 2000**0.5 and chance.std() > 0


@claim.measured(paper="in fp16 many activation gradients become zero, and a scale of 8 saves what matters (Figure 3)")
def unscaled_gradients_underflow(lab):
    """In a gpt after 60 steps, the share of linear layers' gradients that become zero is at least 0.05 higher in fp16
    than in scaled fp16 or bf16.
    """
    margins, shares = [], {"fp16": [], "fp16, scaled": [], "bf16": []}
    recipe = lab.recipe("gpt")
    for seed in lab.seeds(3):
        run, found = lab.train(recipe, seed=seed, steps=60), []
        keep = lambda module, into, out: found.append(out[0].flatten())  # noqa: B023
        for module in run.model.modules():
            if isinstance(module, nn.Linear):
                module.register_full_backward_hook(keep)
        recipe["objective"](run.model, run.task.batch(60, size=16, seed=seed)).mean().backward()
        gradient = torch.cat(found)
        gradient = gradient[gradient != 0]
        lost = lambda x, form: float((nearest(x, FORMATS[form]) == 0).double().mean())
        for name, scale in (("fp16", 1.0), ("fp16, scaled", 2.0**16), ("bf16", 1.0)):
            shares[name].append(lost(gradient * scale, name[:4]))
        margins.append(shares["fp16"][-1] - max(shares["fp16, scaled"][-1], shares["bf16"][-1]))
    return lab.at_least(margins, 0.05, unit="of all gradients", numbers=shares)


def values(count: int) -> Tensor:
    """float32 numbers of random bits, with ties and subnormals of the short formats, infinities and NaN."""
    torch.manual_seed(0)
    x = torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int64)
    x[::3] &= ~0xFFF  # half way between two of fp16 and tf32, or on one
    x[1::3] &= ~0x7FFF  # of bf16
    x[2::9] = (x[2::9] & ~0x7F800000) | ((96 + x[2::9] % 50) << 23)  # where fp16 is subnormal, normal and past its end
    return x.to(torch.int32).view(torch.float32)
