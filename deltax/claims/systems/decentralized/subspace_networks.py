"""Claims of subspace-networks: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import claim
from deltax.papers.language.models.gpt import gpt
from deltax.papers.systems.decentralized.subspace_networks import compress, decompress, subspace_networks, turn
from deltax.parts.attention.context import Context
from deltax.parts.model.language_model import LanguageModel


@claim
def nothing_is_lost_at_a_cut():
    """Cut after the first block, with 5 of 12 numbers a position sent each way, logits and all gradients equal the
    uncut model's to 1e-10.
    """
    model, tokens = _tiny(rank=5), torch.randint(11, (2, 9))
    weight = torch.randn(2, 9, 11, dtype=torch.float64)
    whole = model(tokens)
    (whole * weight).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    ctx = Context()
    x = model.stack.entry(model.position(model.embedding(tokens), ctx))
    left = compress(model.stack.blocks[0](x, ctx), tokens, model.embedding)
    assert left.shape == (2, 9, 5)
    arrived = left.detach().requires_grad_()
    logits = model.read(model.stack.blocks[1](decompress(arrived, tokens, model.embedding), ctx))
    torch.testing.assert_close(logits, whole, rtol=1e-12, atol=1e-12)
    (logits * weight).sum().backward()
    left.backward(arrived.grad)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-10, msg=name)


@claim
def without_the_constraint_a_cut_loses():
    """Compressed to 5 of 12 dimensions, a plain gpt's stream is off by over 0.1 of its norm, the constrained one by
    under 1e-12.
    """
    model, tokens = _tiny(rank=5), torch.randint(11, (2, 9))
    plain = gpt.put("model.dim", 12).put("model.stack.depth", 2)().build({"vocab": 11, "context": 9}).double()
    for name, found in (("span", model), ("plain", plain)):
        x = found.stack.blocks[0](found.position(found.embedding(tokens), Context()), Context())
        back = decompress(compress(x, tokens, model.embedding), tokens, model.embedding)
        lost = (back - x).norm() / x.norm()
        assert (lost < 1e-12) == (name == "span") and (lost > 0.1) == (name == "plain")


@claim
def the_whole_space_constrains_nothing():
    """With k = D and F = 0, logits equal gpt's to 1e-5 (float32 basis)."""
    model, tokens = _tiny(rank=12), torch.randint(11, (2, 9))
    model.embedding.fixed.zero_()
    plain = gpt.put("model.dim", 12).put("model.stack.depth", 2)().build({"vocab": 11, "context": 9}).double()
    plain.load_state_dict({k.replace("inner.", ""): v for k, v in model.state_dict().items() if _learned(k)})
    torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-5, atol=1e-5)


@claim
def turning_finds_the_gradients():
    """Over 300 steps, U stays orthonormal, the lost gradient energy never rises, and it ends within 0.1 % of the best 3
    directions'.
    """
    torch.manual_seed(0)
    gradients = torch.randn(40, 9, dtype=torch.float64) * torch.logspace(0, -2, 9, dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(9, 3, dtype=torch.float64)).Q
    lost = lambda u: (gradients - gradients @ u @ u.mT).square().sum()
    for _ in range(300):
        after = turn(u, gradients, rate=0.4)
        assert lost(after) <= lost(u) * (1 + 1e-12)
        u = after
    torch.testing.assert_close(u.mT @ u, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    best = torch.linalg.svdvals(gradients)[3:].square().sum()
    torch.testing.assert_close(lost(u), best, rtol=1e-3, atol=0)


@claim.measured(paper="up to 100 times less communication at the convergence of the uncompressed model (abstract)")
def an_eighth_of_the_stream_is_enough(lab):
    """On gpt (3 seeds, 300 steps), 12 of 96 dimensions, an eighth of the bytes at a cut, finish at most 0.1 bits/byte
    above gpt.
    """
    ends = lambda recipe: [lab.train(recipe, seed=s, steps=300).score for s in lab.seeds(3)]
    plain = lab.recipe("gpt(depth=2)").put("loop.batch", 8)
    arms = {"gpt": plain, "12": plain + subspace_networks, "48": plain + subspace_networks(rank=48)}
    found = {name: ends(arm) for name, arm in arms.items()}
    gaps = [a - b for a, b in zip(found["12"], found["gpt"], strict=True)]
    return lab.at_most(gaps, 0.1, unit="bits per byte", numbers=found)


@claim.measured(paper="output projections become of low rank in training anyway (section 3)")
def ranks_fall_in_training(lab):
    """Under AdamW, the stable rank of gpt's output projections after 400 steps is at most 0.8 of that after 1 step."""
    falls = []
    for seed in lab.seeds(3):
        start, end = (lab.train("gpt", seed=seed, steps=steps).model for steps in (1, 400))
        falls.append(_stable_rank(end) / _stable_rank(start))
    return lab.at_most(falls, 0.8, unit="of the start's stable rank")


def _stable_rank(model: LanguageModel) -> float:
    """|W|_F^2 / |W|_2^2, the mean over the matrices that write to the stream."""
    written = [m for block in model.stack.blocks for m in (block.mixer.project.out.weight, block.mlp.down.weight)]
    return sum(float(w.square().sum() / torch.linalg.matrix_norm(w, 2) ** 2) for w in written) / len(written)


def _tiny(rank: int) -> LanguageModel:
    torch.manual_seed(0)
    tree = gpt.put("model.dim", 12).put("model.stack.depth", 2) + subspace_networks(rank=rank)
    model = tree().build({"vocab": 11, "context": 9}).double()
    for module in model.modules():
        if hasattr(module, "basis"):
            module.basis = torch.linalg.qr(module.basis).Q
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def _learned(name: str) -> bool:
    return not name.endswith(("basis", "fixed"))
