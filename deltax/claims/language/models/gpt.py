"""Claims of gpt: the paper's equations, parity with peers, and what it measures."""

import torch

from deltax import claim
from deltax.papers.language.models.gpt import gpt
from deltax.parts.attention.context import Context, DecodingState
from deltax.parts.model.language_model import LanguageModel
from deltax.tasks.language.counting import counting_bits
from deltax.weights.language.models.gpt import from_hf, to_hf


@claim
def a_cache_changes_nothing():
    """Logits of token-by-token decoding with a key/value cache equal those of one full pass."""
    torch.manual_seed(0)
    model = _tiny().double()
    tokens = torch.randint(11, (2, 9))
    ctx = Context(state=DecodingState())
    steps = [model(piece, ctx) for piece in tokens.split([4, 1, 1, 3], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens))


@claim
def the_start_is_the_uniform_guess():
    """A fresh model predicts nearly uniformly over 256 tokens: its entropy is within 5 % of ln 256. The standard
    deviation of the logits is 0.55 at any width.
    """
    torch.manual_seed(0)
    model = gpt().build({"vocab": 256, "context": 9})
    guess = torch.distributions.Categorical(logits=model(torch.randint(256, (4, 9))))
    assert (guess.entropy() / torch.tensor(256.0).log() - 1).abs().max() < 0.05


@claim.parity(peer="transformers GPT2LMHeadModel")
def equals_transformers():
    """With the same random weights, logits and gradients equal those of transformers' GPT-2. The weights convert
    there and back unchanged.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=11, n_positions=9, n_embd=12, n_layer=2, n_head=3, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    theirs = GPT2LMHeadModel(config).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = _tiny().double()
    ours.load_state_dict(from_hf(theirs.state_dict()))
    tokens = torch.randint(11, (2, 9))
    a, b = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(a, b)
    weight = torch.randn_like(a)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    gradients = to_hf({k: p.grad for k, p in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
    back = to_hf(ours.state_dict())
    assert all(torch.equal(back[k], v) for k, v in theirs.state_dict().items())


@claim.measured(paper="state of the art on 7 of 8 language-modelling sets without training on them (abstract)")
def beats_counting(lab):
    """Trained on text, gpt scores at least 0.1 bits per byte below an interpolated trigram model of bytes, on held-
    out text.
    """
    counted = counting_bits(lab.task(gpt), order=3)
    return lab.at_least([counted - lab.train("gpt", seed=s).score for s in lab.seeds(3)], 0.1, unit="bits per byte")


def _tiny() -> LanguageModel:
    tree = gpt.put("model.dim", 12).put("model.stack.depth", 2)
    return tree().build({"vocab": 11, "context": 9})
