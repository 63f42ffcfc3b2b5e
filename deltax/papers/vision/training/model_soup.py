"""Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time.
Wortsman, Ilharco, Gadre, Roelofs, Gontijo-Lopes, Morcos, et al., 2022. arXiv:2203.05482

One network that stands for many, as dropout's does, but the many are runs fine-tuned from one start, and it is their
weights that are averaged.

Trying many settings leaves many runs, of which all but the best are thrown away. Runs that set out from the same
pre-trained weights mostly end in one basin, where what lies between them is as good or better, and costs no more to
use than one. Runs from different starts do not, and their average is nothing. Greedy soup takes in, best first, what
does not make the held-out score worse, so it is never worse there than the best run alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deltax import UserError, paper
from deltax.papers.optimization.losses.dropout import dropout

State = dict[str, Tensor]


def uniform(states: Sequence[State]) -> State:
    """The mean of every tensor; counters, which are whole numbers, are the first's.

    Raises UserError for no states, and for states of different models.
    """
    if not states:
        raise UserError("a soup needs at least one state")
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    if any(other != shapes[0] for other in shapes):
        raise UserError("a soup is made of states of one model: these differ in their names or shapes")
    return {
        name: torch.stack([state[name] for state in states]).mean(0) if value.is_floating_point() else value.clone()
        for name, value in states[0].items()
    }


@paper(on=dropout, year=2022, arxiv="2203.05482")
def soup(states: Sequence[State], score: Callable[[State], float]) -> State:
    """The greedy soup of some states of one model (Recipe 1). `score` is the held-out score of a state, lower better.

    Raises UserError as `uniform` does.
    """
    alone = [score(state) for state in states]
    chosen: list[State] = []
    best = float("inf")
    for i in sorted(range(len(states)), key=lambda i: alone[i]):
        after = score(uniform([*chosen, states[i]]))
        if not chosen or after <= best:
            chosen.append(states[i])
            best = after
    return uniform(chosen)
