"""Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time.
Wortsman, Ilharco, Gadre, Roelofs, Gontijo-Lopes, Morcos, et al., 2022. arXiv:2203.05482

Several runs are fine-tuned from one start, but their weights are averaged, not the best one chosen.

A sweep leaves many runs, and all but the best are usually discarded. Runs from the same pre-trained weights mostly end
in one basin of the loss, where their average is as good or better and costs no more at inference than one model. Runs
from different starts do not, and their average is useless. The greedy soup adds runs, best first, if the held-out score
does not get worse, so there it is never worse than the best run.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deltax import UserError, paper

State = dict[str, Tensor]


@paper(year=2022, arxiv="2203.05482")
def soup(states: Sequence[State], score: Callable[[State], float]) -> State:
    """The greedy soup of states of one model (Recipe 1). `score` is a state's held-out score, lower is better.

    Raises UserError as `uniform` does.
    """
    alone = [score(state) for state in states]
    chosen: list[State] = []
    best = float("inf")
    # Recipe 1: best first
    for i in sorted(range(len(states)), key=lambda i: alone[i]):
        after = score(uniform([*chosen, states[i]]))
        if not chosen or after <= best:  # keep the candidate if the soup does not get worse
            chosen.append(states[i])
            best = after
    return uniform(chosen)


def uniform(states: Sequence[State]) -> State:
    """The mean of every tensor; integer buffers are the first state's.

    Raises UserError for no states, and for states of different models.
    """
    if not states:
        raise UserError("a soup needs at least one state, not an empty list: pass the state_dicts of the runs")
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    if any(other != shapes[0] for other in shapes):
        raise UserError("the states have different names or shapes: average the states of one model only")
    return {
        # integer buffers, such as step counters, have no mean
        name: torch.stack([state[name] for state in states]).mean(0) if value.is_floating_point() else value.clone()
        for name, value in states[0].items()
    }
