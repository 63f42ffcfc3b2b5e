import numpy as np
import pytest
import torch

from deltax.tasks.control.cart_pole import LIMIT, pushed, started


def test_episodes_are_gymnasiums():
    """From the same starts, pushed at random until they end, states and ends are CartPole-v1's."""
    gymnasium = pytest.importorskip("gymnasium")
    peer = gymnasium.make("CartPole-v1")
    assert peer.spec.max_episode_steps == LIMIT
    for seed in range(5):
        first, _ = peer.reset(seed=seed)
        theirs = np.array(peer.unwrapped.state)
        ours, ended = torch.tensor(theirs)[None], False
        np.testing.assert_allclose(theirs, first, rtol=1e-6)
        generator = torch.Generator().manual_seed(seed)
        while not ended:
            right = torch.randint(2, (1,), generator=generator)
            ours, fallen = pushed(ours, right)
            _, _, ended, _, _ = peer.step(int(right))
            np.testing.assert_allclose(ours[0], peer.unwrapped.state, rtol=1e-9)
            assert bool(fallen) == ended


def test_starts_are_drawn_evenly_and_again():
    states = started(1000, torch.Generator().manual_seed(3))
    assert states.shape == (1000, 4) and states.abs().max() <= 0.05 and states.std() > 0.02
    assert torch.equal(states, started(1000, torch.Generator().manual_seed(3)))
