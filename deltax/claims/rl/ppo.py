"""Claims of ppo: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import claim
from deltax.papers.rl.ppo import ppo
from deltax.tasks.control import cart_pole


@claim
def the_first_step_is_the_policy_gradient():
    """Where the policy is still the old one, the gradient is that of advantage-weighted log-likelihood."""
    torch.manual_seed(0)
    logits, advantages = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
    log_probs = torch.log_softmax(logits, -1)[torch.arange(7), torch.randint(5, (7,))]
    ours = torch.autograd.grad(ppo(log_probs, log_probs, advantages).mean(), logits, retain_graph=True)[0]
    plain = torch.autograd.grad(-(advantages * log_probs).mean(), logits)[0]
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@claim
def the_clip_stops_going_and_not_coming_back():
    """An action has no gradient only where it is good and already likelier by the clip, or bad and already rarer by it;
    everywhere else its gradient is -r A."""
    ratio = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0], dtype=torch.float64).repeat(2, 1)
    advantages = torch.tensor([[1.7], [-0.6]], dtype=torch.float64)
    log_probs = ratio.log().requires_grad_()
    gradient = torch.autograd.grad(ppo(log_probs, torch.zeros_like(ratio), advantages).sum(), log_probs)[0]
    stopped = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    torch.testing.assert_close(gradient, torch.where(stopped, 0.0, -ratio * advantages), rtol=1e-12, atol=0)
    assert stopped.sum() == 4


@claim
def it_is_a_pessimistic_bound():
    """The clipped loss is nowhere below the unclipped one, and equal to it wherever the ratio is inside the clip."""
    torch.manual_seed(0)
    log_ratio, advantages = torch.randn(2, 999, dtype=torch.float64)
    zero = torch.zeros_like(log_ratio)
    clipped, free = (ppo(log_ratio, zero, advantages, clip=c) for c in (0.3, float("inf")))
    assert (clipped >= free).all()
    inside = (log_ratio.exp() - 1).abs() < 0.3
    assert torch.equal(clipped[inside], free[inside]) and (clipped > free).any()
    torch.testing.assert_close(free, -log_ratio.exp() * advantages)


@claim.measured(paper="Seven MuJoCo tasks, mean of normalised returns: 0.82 clipped at 0.2, -0.39 unclipped (Table 1)")
def clipped_is_more_stable(lab):
    """Over ten passes through each batch, a policy that balances a pole keeps it up for longer, in the second half of
    training, where the ratio is clipped than where it is not: by at least 50 of 500 steps."""
    gains, numbers, curves = [], {}, {}
    for seed in lab.seeds(5):
        lengths = {name: _balance(seed, clip=clip) for name, clip in (("clipped", 0.2), ("unclipped", float("inf")))}
        late = {name: sum(curve[len(curve) // 2 :]) / (len(curve) - len(curve) // 2) for name, curve in lengths.items()}
        for name, curve in lengths.items():
            numbers.setdefault(f"{name}: steps upright", []).append(late[name])
            curves.setdefault(name, []).append(curve)
        gains.append(late["clipped"] - late["unclipped"])
    figures = {"Length of episodes by update, each seed": lab.figure(_drawn(curves))}
    return lab.at_least(gains, 50, unit="steps", numbers=numbers, figures=figures)


def _balance(seed: int, *, clip: float, updates: int = 30, carts: int = 16, steps: int = 128) -> list[float]:
    """The mean length of the episodes that ended in each update (the last known where none did), by Algorithm 1.

    Settings are those of Table 3: ten epochs of minibatches of 64, Adam at 3e-4, discount 0.99, and advantages by
    Eq. 11 with lambda 0.95; but for the 2048 steps of an update, which 16 carts make together.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy, critic = (nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, out)) for out in (2, 1))
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=3e-4)
    state, age, lengths, curve = cart_pole.started(carts, generator), torch.zeros(carts), [], []
    for _ in range(updates):
        seen, ended = [], []
        with torch.no_grad():
            for _ in range(steps):
                log_probs = torch.log_softmax(policy(state), -1)
                action = torch.multinomial(log_probs.exp(), 1, generator=generator)
                after, fallen = cart_pole.pushed(state, action[:, 0])
                age += 1
                late = (age >= cart_pole.LIMIT) & ~fallen
                over = fallen | late
                reward = 1 + 0.99 * late * critic(after)[:, 0]  # an episode cut by the limit would have gone on
                seen.append((state, action[:, 0], log_probs.gather(1, action)[:, 0], reward, over.float()))
                ended += age[over].tolist()
                state = torch.where(over[:, None], cart_pole.started(carts, generator), after)
                age = age * ~over
            states, actions, old, rewards, over = (torch.stack(column) for column in zip(*seen, strict=True))
            values, following = critic(states)[..., 0], critic(state)[:, 0]
            advantage, advantages = torch.zeros(carts), torch.zeros(steps, carts)
            for t in range(steps - 1, -1, -1):
                surprise = rewards[t] + 0.99 * following * (1 - over[t]) - values[t]
                advantages[t] = advantage = surprise + 0.99 * 0.95 * (1 - over[t]) * advantage
                following = values[t]
        lengths = ended or lengths
        curve.append(sum(lengths) / len(lengths) if lengths else float(steps))
        batch = [x.flatten(0, 1) for x in (states, actions, old, advantages, advantages + values)]
        for _ in range(10):
            for rows in torch.randperm(carts * steps, generator=generator).split(64):
                state_, action_, old_, advantage_, target = (x[rows] for x in batch)
                new = torch.log_softmax(policy(state_), -1).gather(1, action_[:, None])[:, 0]
                scaled = (advantage_ - advantage_.mean()) / (advantage_.std() + 1e-8)
                loss = ppo(new, old_, scaled, clip=clip).mean() + 0.5 * (critic(state_)[:, 0] - target).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return curve


def _drawn(curves: dict[str, list[list[float]]]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3))
    axes = figure.subplots()
    for colour, (name, each) in enumerate(curves.items()):
        for number, curve in enumerate(each):
            axes.plot(curve, color=f"C{colour}", label=None if number else name, linewidth=1)
    axes.set_xlabel("update")
    axes.set_ylabel("steps upright")
    axes.legend()
    return figure
