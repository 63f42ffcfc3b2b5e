"""What the lens does with models it does not know, models that fail, and letters that are hard to draw."""

import io

import pytest
import torch
from torch import nn

from deltax import UserError
from deltax.claims.interp.logit_lens import _tiny
from deltax.papers.interp.logit_lens import distance_to_last, logit_lens, picture


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="cannot find blocks and a last norm in Linear"):
        logit_lens(nn.Linear(2, 2), torch.zeros(1, 2, dtype=torch.int64))


def test_hooks_go_even_when_the_model_fails():
    model, tokens = _tiny()
    with pytest.raises(IndexError):
        logit_lens(model, tokens + 11)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_each_layer_is_a_distribution():
    model, tokens = _tiny()
    lens = logit_lens(model.float(), tokens)
    torch.testing.assert_close(lens.exp().sum(-1), torch.ones(4, 2, 9))
    by_hand = (lens[-1].exp() * (lens[-1] - lens[0])).sum(-1)
    torch.testing.assert_close(distance_to_last(lens)[0], by_hand)


def test_any_letter_can_be_drawn():
    model, tokens = _tiny()
    letters = ["\n", "$", "$x$", "é", "\0", " ", "_", "^", "\\", "{", "%"]
    figure = picture(logit_lens(model, tokens), tokens, lambda ids: "".join(letters[i] for i in ids))
    with io.StringIO() as file:
        figure.savefig(file, format="svg")
        assert "<svg" in file.getvalue()
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["embedding", "1", "2", "3"]
