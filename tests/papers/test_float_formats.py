"""What the claims of FlexAttention, float formats and the roofline leave open: edges and bad input."""

import pytest
import torch

from deltax import UserError
from deltax.claims.systems.attention_kernels.flex_attention import masks
from deltax.papers.language.models.gpt import gpt
from deltax.papers.systems.attention_kernels.flex_attention import block_mask, either, flex, flex_attention
from deltax.papers.systems.performance.float_formats import FORMATS, bits, mixed_step, nearest
from deltax.papers.systems.performance.roofline import MACHINES, Work, roofline
from deltax.parts.attention.scores import Rules


def test_blocks_of_blind_queries_are_empty_and_give_zeros():
    q = torch.randn(1, 9, 2, 4)
    rules = Rules(mask=lambda b, h, i, j: (i < 4) & (j < 4))
    assert block_mask(q, q, rules, 4).full == ((0,), (), ()) and block_mask(q, q, rules, 4).visited() == 1
    assert not flex_attention(q, q, q, rules, tile=4)[:, 4:].any()


def test_one_mask_joined_is_itself():
    at = torch.arange(70)
    for mask in masks():
        where = at[:1], at[:1], at[:, None], at
        assert torch.equal(either(*where, masks=(mask,)), mask(*where))


def test_bits_of_known_numbers():
    x = torch.tensor([0.0, -0.0, 1.0, -2.0, 65504.0, 65520.0, 2.0**-24, 2.0**-25])
    known = [0, 0x8000, 0x3C00, 0xC000, 0x7BFF, 0x7C00, 1, 0]
    assert bits(x, FORMATS["fp16"]).tolist() == known
    assert nearest(torch.tensor([torch.nan]), FORMATS["bf16"]).isnan().all()


def test_bad_input_is_told():
    weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(UserError, match="fp16"):
        mixed_step(torch.sum, [weight], torch.optim.SGD([weight]), form="fp15")
    with pytest.raises(UserError, match="above 0"):
        roofline(Work(1, 0), MACHINES["A100"])
    with pytest.raises(UserError, match="at least 1"):
        flex(gpt, tile=0)
