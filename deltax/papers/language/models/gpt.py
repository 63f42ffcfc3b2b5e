"""Improving Language Understanding by Generative Pre-Training. Radford, Narasimhan, Salimans, Sutskever, 2018.

A transformer, but only its decoder, without cross-attention, trained to predict the next token of plain text.

Every task that can be written down is a text to go on with, so one objective serves all. GPT put the norm after
each branch; GPT-2 (2019), built here, puts it before, adds one at the end, and starts the branches smaller the deeper
the stack. Their sizes: 12 blocks of width 768 to 48 of 1600; the default here trains in half a minute on one core.
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
