"""Improving Language Understanding by Generative Pre-Training. Radford, Narasimhan, Salimans, Sutskever, 2018.

A transformer, but only its decoder, without cross-attention, trained to predict the next token of plain text.

Every task that can be written down is a text to go on with, so one objective serves all. GPT put the norm after
each branch; GPT-2 (2019), built here, puts it before, adds one at the end, and starts the branches smaller the deeper
the stack. Their sizes: 12 blocks of width 768 to 48 of 1600; the default here trains in half a minute on one core.
"""

import torch
from torch import Tensor

from deltax import Part, claim, paper, part
from deltax.papers.language.softmax_attention import Attention
from deltax.papers.language.transformer import transformer
from deltax.papers.optimization.layer_norm import LayerNorm
from deltax.parts.context import Context, DecodingState
from deltax.parts.language_model import Embedding, LanguageModel, Learned, Tied
from deltax.parts.mlp import MLP
from deltax.parts.objectives import next_token
from deltax.parts.optimizers import adamw
from deltax.parts.run import Loop, Run, from_task
from deltax.parts.schedules import cosine
from deltax.parts.scores import causal
from deltax.parts.stack import Block, PreNorm, Stack
from deltax.tasks.counting import counting_bits
from deltax.tasks.text import Text


@paper(on=transformer, year=2018, url="https://openai.com/index/language-unsupervised/")
def gpt(*, dim: int = 96, depth: int = 3, heads: int = 3) -> Part:
    block = part(
        Block,
        mixer=part(Attention, heads=heads, mask=causal),
        mlp=part(MLP),
        residual=part(PreNorm, norm=LayerNorm),
    )
    model = part(
        LanguageModel,
        dim=dim,
        embedding=Embedding,
        position=Learned,
        stack=part(Stack, depth=depth, block=block),
        norm=LayerNorm,
        head=Tied,
    )
    return part(
        Run,
        model=model,
        task=Text,
        objective=next_token,
        batches=from_task,
        optimizer=adamw,
        schedule=cosine,
        loop=Loop,
    )


_HF_BLOCK = {
    "mixer_residual.norm": "ln_1",
    "mixer.project.out": "attn.c_proj",
    "mlp_residual.norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` GPT2LMHeadModel as that of gpt's model.

    `transformers` stores these matrices transposed (Conv1D), with query, key and value side by side.
    """
    state = {k.removeprefix("transformer."): v for k, v in state.items()}
    ours = {
        "embedding.weight": state["wte.weight"],
        "position.table": state["wpe.weight"],
        "norm.gain": state["ln_f.weight"],
        "norm.bias": state["ln_f.bias"],
    }
    for i in range(_depth(state, "h.{}.ln_1.weight")):
        here, there = f"stack.blocks.{i}", f"h.{i}"
        for name, peer in _HF_BLOCK.items():
            weight = state[f"{there}.{peer}.weight"]
            ours[f"{here}.{name}.{'gain' if 'norm' in name else 'weight'}"] = weight.T if weight.ndim == 2 else weight
            ours[f"{here}.{name}.bias"] = state[f"{there}.{peer}.bias"]
        for name, weight, bias in zip(
            ("query", "key", "value"),
            state[f"{there}.attn.c_attn.weight"].T.chunk(3),
            state[f"{there}.attn.c_attn.bias"].chunk(3),
            strict=True,
        ):
            ours[f"{here}.mixer.project.{name}.weight"], ours[f"{here}.mixer.project.{name}.bias"] = weight, bias
    return {k: v.contiguous() for k, v in ours.items()}


def to_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of gpt's model as that of a `transformers` GPT2LMHeadModel. The inverse of `from_hf`."""
    theirs = {
        "wte.weight": state["embedding.weight"],
        "wpe.weight": state["position.table"],
        "ln_f.weight": state["norm.gain"],
        "ln_f.bias": state["norm.bias"],
    }
    for i in range(_depth(state, "stack.blocks.{}.mlp.up.weight")):
        here, there = f"stack.blocks.{i}", f"h.{i}"
        for name, peer in _HF_BLOCK.items():
            weight = state[f"{here}.{name}.{'gain' if 'norm' in name else 'weight'}"]
            theirs[f"{there}.{peer}.weight"] = weight.T if weight.ndim == 2 else weight
            theirs[f"{there}.{peer}.bias"] = state[f"{here}.{name}.bias"]
        thirds = [f"{here}.mixer.project.{name}" for name in ("query", "key", "value")]
        theirs[f"{there}.attn.c_attn.weight"] = torch.cat([state[f"{third}.weight"] for third in thirds]).T
        theirs[f"{there}.attn.c_attn.bias"] = torch.cat([state[f"{third}.bias"] for third in thirds])
    theirs = {f"transformer.{k}": v.contiguous() for k, v in theirs.items()}
    return {**theirs, "lm_head.weight": state["embedding.weight"]}


@claim
def a_cache_changes_nothing():
    """Logits of a token-by-token run that keeps its keys and values equal those of the full pass."""
    torch.manual_seed(0)
    model = _tiny().double()
    tokens = torch.randint(11, (2, 9))
    ctx = Context(state=DecodingState())
    steps = [model(piece, ctx) for piece in tokens.split([4, 1, 1, 3], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens))


@claim
def the_start_is_the_uniform_guess():
    """A fresh model gives each of 256 tokens nearly the same chance: its guess has an entropy within 5 % of ln 256.

    Its logits are products with embeddings that are `faint` at any width: their deviation is 0.55.
    """
    torch.manual_seed(0)
    model = gpt().build({"vocab": 256, "context": 9})
    guess = torch.distributions.Categorical(logits=model(torch.randint(256, (4, 9))))
    assert (guess.entropy() / torch.tensor(256.0).log() - 1).abs().max() < 0.05


@claim.parity(peer="transformers GPT2LMHeadModel")
def equals_transformers():
    """The same random weights give the logits and gradients of transformers' GPT-2, and go there and back unchanged."""
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
    """Trained on text, it beats interpolated counts of three bytes on held-out text by at least 0.1 bits per byte."""
    counted = counting_bits(lab.task(gpt), order=3)
    return lab.at_least([counted - lab.train("gpt", seed=s).score for s in lab.seeds(3)], 0.1, unit="bits per byte")


def _tiny() -> LanguageModel:
    tree = gpt.put("model.dim", 12).put("model.stack.depth", 2)
    return tree().build({"vocab": 11, "context": 9})


def _depth(state: dict[str, Tensor], pattern: str) -> int:
    depth = 0
    while pattern.format(depth) in state:
        depth += 1
    return depth
