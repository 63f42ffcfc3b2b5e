"""Claims of alibi: the paper's equations, parity with peers, and what it measures."""

import torch

from deltax import claim, part
from deltax.papers.language.attention.softmax_attention import attend
from deltax.papers.language.position.alibi import Distance, slopes
from deltax.parts.attention.scores import Rules, causal


@claim
def eight_heads_halve():
    """With eight heads the slopes are 1/2, 1/4, ... 1/256."""
    assert slopes(8).tolist() == [2.0**-i for i in range(1, 9)]


@claim
def off_it_is_attention():
    """With strength 0, the output equals attention without positions, bit for bit."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 9, 4, 8)
    assert torch.equal(
        attend(q, k, v, Rules(Distance(4, strength=0.0), part(causal))), attend(q, k, v, Rules(mask=part(causal)))
    )


@claim
def only_distance_matters():
    """Shifting all positions leaves the output unchanged. Under a causal softmax, -slope * distance and +slope * key
    position give the same output.
    """
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 9, 4, 8, dtype=torch.float64)
    at = torch.arange(9)
    out = attend(q, k, v, Rules(Distance(4), part(causal), at, at))
    torch.testing.assert_close(attend(q, k, v, Rules(Distance(4), part(causal), at + 50, at + 50)), out)
    by_column = lambda s, b, h, q, k: s + slopes(4)[h] * k
    torch.testing.assert_close(attend(q, k, v, Rules(by_column, part(causal), at, at)), out)


@claim.parity(peer="transformers build_alibi_tensor (BLOOM)")
def equals_transformers():
    """Slopes equal those of BLOOM's ALiBi in transformers, for head counts that are powers of two and that are not."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for heads in (1, 2, 3, 4, 6, 7, 8, 12, 16):
        theirs = build_alibi_tensor(torch.ones(1, 5), heads, torch.float32).view(heads, 5)
        torch.testing.assert_close(slopes(heads).float()[:, None] * torch.arange(5.0), theirs, rtol=1e-3, atol=1e-3)


@claim.measured(paper="trained on 1024, at 2048 the perplexity of a sinusoidal model trained on 2048 (abstract)")
def length_does_not_hurt(lab):
    """Trained at length 64, gpt + alibi has a loss at length 512 at most 0.05 bits per byte above its loss at 64."""
    short = lab.recipe("gpt+alibi").put("task.context", 64)
    rises = []
    for seed in lab.seeds(3):
        run = lab.train(short, seed=seed)
        rises.append(run.score_at(context=512) - run.score_at(context=64))
    return lab.at_most(rises, 0.05, unit="bits per byte")
