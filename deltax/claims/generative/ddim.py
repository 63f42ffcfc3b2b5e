"""Claims of ddim: the paper's equations, parity with peers, and what it measures."""

from itertools import product

import torch

from deltax import claim
from deltax.papers.generative.ddim import ddim, encode, step
from deltax.papers.generative.ddpm import STEPS, posterior, signal
from deltax.tasks.evaluation import energy_distance


@claim
def eta_one_is_ddpm():
    """With eta = 1 and no step skipped, a step draws from DDPM's posterior: the same mean, the same variance."""
    torch.manual_seed(0)
    abar = signal()
    x, noise = torch.randn(2, 1, 40_000, dtype=torch.float64)
    x, noise = x[:, :1].expand_as(x), noise[:, :1].expand_as(noise)
    for t in (2, 40, 1000):
        data = (x - (1 - abar[t]).sqrt() * noise) / abar[t].sqrt()
        mean, variance = posterior(data, x, abar[[t - 1]], abar[[t]])
        torch.manual_seed(t)
        ours = step(x, noise, abar[t], abar[t - 1], eta=1.0)
        torch.manual_seed(t)
        torch.testing.assert_close(ours, mean + variance.sqrt() * torch.randn_like(x), rtol=1e-9, atol=1e-9)


@claim
def steps_join():
    """Where the network names the same data each time, two steps are one: the interpolant is consistent with itself."""
    torch.manual_seed(0)
    abar = signal()
    data, noise = torch.randn(2, 3, 7, dtype=torch.float64)
    at = lambda t: abar[t].sqrt() * data + (1 - abar[t]).sqrt() * noise
    x = at(900)
    named = lambda x, t: (x - abar[t].sqrt() * data) / (1 - abar[t]).sqrt()
    half = step(x, named(x, 900), abar[900], abar[300])
    torch.testing.assert_close(step(half, named(half, 300), abar[300], abar[20]), step(x, noise, abar[900], abar[20]))
    torch.testing.assert_close(half, at(300), rtol=1e-12, atol=1e-12)


@claim
def it_is_euler():
    """In x / sqrt(abar) against sqrt(1 / abar - 1), a step is Euler's for a slope that is the noise (section 4.3)."""
    torch.manual_seed(0)
    abar = signal()
    x, noise = torch.randn(2, 3, 7, dtype=torch.float64)
    for now, then in ((1000, 800), (500, 499), (30, 1)):
        ratio = lambda t: (1 / abar[t] - 1).sqrt()
        euler = abar[then].sqrt() * (x / abar[now].sqrt() + (ratio(then) - ratio(now)) * noise)
        torch.testing.assert_close(step(x, noise, abar[now], abar[then]), euler, rtol=1e-12, atol=1e-12)


@claim.parity(peer="diffusers DDIMScheduler")
def equals_diffusers():
    """With the same network, whole samples and their gradients equal diffusers' over the same steps, for eta = 0."""
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    settings = {"beta_schedule": "linear", "clip_sample": False, "timestep_spacing": "trailing"}
    peer = DDIMScheduler(num_train_timesteps=STEPS, set_alpha_to_one=True, **settings)
    peer.set_timesteps(8)
    weight = torch.randn(5, 5) / 3
    network = lambda x, times: torch.tanh(x @ weight + times[:, None])
    x = torch.randn(3, 5)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = ddim(network, ours, evaluations=8), theirs
    for t in peer.timesteps:
        b = peer.step(network(b, ((t + 1) / STEPS).expand(3)), t, b, eta=0.0).prev_sample
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    gradients = (torch.autograd.grad(y.square().sum(), z)[0] for y, z in ((a, ours), (b, theirs)))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@claim.measured(paper="CIFAR-10 at 10 steps: FID 13.36 with no fresh noise, 41.07 with DDPM's (Table 1)")
def fewer_steps_do(lab):
    """At 10 and 20 evaluations of one trained network, steps without fresh noise draw digits nearer to held-out ones
    than steps with DDPM's do: their energy distances sum to less by at least a third."""
    held_out = lab.task("ddpm").all("validation").images
    labels = torch.arange(800) % 10
    gains, numbers = [], {}
    for seed in lab.seeds(3):
        model = lab.train("ddpm", seed=seed).model
        noise = torch.randn(800, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        sums = {0.0: 0.0, 1.0: 0.0}
        for eta, evaluations in product(sums, (10, 20, 50, 100)):
            with torch.no_grad():
                images = ddim(lambda x, times, m=model: m(x, times, labels), noise, evaluations=evaluations, eta=eta)
            distance = energy_distance(images, held_out)
            numbers.setdefault(f"eta {eta:g}, {evaluations} evaluations: distance", []).append(distance)
            sums[eta] += distance if evaluations <= 20 else 0.0
        gains.append(1 - sums[0.0] / sums[1.0])
    return lab.at_least(gains, 1 / 3, unit="of the distance with fresh noise", numbers=numbers)


@claim.measured(paper="CIFAR-10: the error of a dimension falls from 0.014 at 10 steps to 0.0001 at 1000 (Table 2)")
def images_come_back(lab):
    """Held-out digits taken up to noise by the steps turned round, and down again, come back, and the more steps the
    nearer: five times the steps leave at most half of the error."""
    batch = lab.task("ddpm").all("validation")
    ratios, numbers = [], {}
    for seed in lab.seeds(3):
        model = lab.train("ddpm", seed=seed).model
        network = lambda x, times, m=model: m(x, times, batch.labels)
        errors = {}
        for evaluations in (10, 50):
            with torch.no_grad():
                back = ddim(network, encode(network, batch.images, evaluations=evaluations), evaluations=evaluations)
            errors[evaluations] = ((back - batch.images) / 2).square().mean().item()  # in units of [0, 1], as Table 2
            numbers.setdefault(f"{evaluations} evaluations: squared error", []).append(errors[evaluations])
        ratios.append(errors[50] / errors[10])
    return lab.at_most(ratios, 0.5, unit="of the error", numbers=numbers)
