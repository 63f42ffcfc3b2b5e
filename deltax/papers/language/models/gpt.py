"""Improving Language Understanding by Generative Pre-Training. Radford, Narasimhan, Salimans, Sutskever, 2018.

A transformer, but only its decoder, without cross-attention, trained to predict the next token.

    x = token_embedding[tokens] + position_embedding          (B, T, D)
    for each block:
        x = x + attention(layer_norm(x))                      causal
        x = x + mlp(layer_norm(x))
    logits = layer_norm(x) @ token_embedding.T                (B, T, V)
    loss = cross_entropy(logits[:, :-1], tokens[:, 1:])

GPT (2018) normalises after each branch. GPT-2 (2019), built here, normalises before, adds a last norm and divides the
initial weights of each branch's output by sqrt(2 depth). GPT has 12 blocks of width 768, GPT-2 up to 48 of 1600; the
default here trains in half a minute on one core.
"""

from deltax import Part, paper, part
from deltax.papers.language.attention.softmax_attention import Attention
from deltax.papers.language.models.transformer import transformer
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.parts.attention.scores import causal
from deltax.parts.model.language_model import Embedding, LanguageModel, Learned, Tied
from deltax.parts.model.mlp import MLP
from deltax.parts.model.stack import Block, PreNorm, Stack
from deltax.parts.training.objectives import next_token
from deltax.parts.training.optimizers import adamw
from deltax.parts.training.run import Loop, Run, from_task
from deltax.parts.training.schedules import cosine
from deltax.tasks.language.text import Text


@paper(on=transformer, year=2018, url="https://openai.com/index/language-unsupervised/")
def gpt(*, dim: int = 96, depth: int = 3, heads: int = 3) -> Part:
    block = part(
        Block,
        mixer=part(Attention, heads=heads, mask=causal),
        mlp=part(MLP),
        residual=part(PreNorm, norm=LayerNorm),  # x + branch(norm(x)); GPT (2018) has norm(x + branch(x))
    )
    model = part(
        LanguageModel,
        dim=dim,
        embedding=Embedding,
        position=Learned,  # one vector for each position, (context, D)
        stack=part(Stack, depth=depth, block=block),
        norm=LayerNorm,  # the last norm, which GPT-2 adds
        head=Tied,  # logits by the transposed token embedding
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
