"""Claims of flow-matching: the paper's equations, parity with peers, and what it measures."""

from typing import Any

import torch
from torch import Tensor, nn

from deltax import claim
from deltax.papers.generative.ddim import ddim
from deltax.papers.generative.flow_matching import data_of, euler, heun, marginal, midpoint, sample, straight
from deltax.tasks.evaluation import energy_distance


@claim
def one_image_teaches_as_all_do():
    """The losses on conditional and marginal velocity differ, by a constant: their gradients are equal (Theorem 2)."""
    torch.manual_seed(0)
    data = torch.randn(3, 2, dtype=torch.float64)
    grid = torch.linspace(-8, 8, 81, dtype=torch.float64)
    z = torch.cartesian_prod(grid, grid)
    mass = torch.exp(-z.square().sum(-1) / 2)
    mass = (mass / mass.sum()).repeat(3) / 3
    noise, image = z.repeat(3, 1), data.repeat_interleave(len(z), 0)
    for t, smallest in ((0.0, 0.0), (0.3, 0.0), (0.6, 0.1), (1.0, 0.4)):
        times = torch.full((len(noise),), t, dtype=torch.float64)
        x, target = straight(noise, image, times, smallest=smallest)
        weight, bias = torch.randn(2, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
        losses, gradients = [], []
        for goal in (target, marginal(data, smallest=smallest)(x, times)):
            learned = [p.clone().requires_grad_() for p in (weight, bias)]
            losses.append(mass @ (x @ learned[0] + learned[1] - goal).square().sum(-1))
            gradients.append(torch.autograd.grad(losses[-1], learned))
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)
        assert losses[0] > losses[1] + 0.01


@claim
def euler_is_ddim():
    """On the straight path, where signal is t and noise 1 - t, Euler's step is DDIM's: name the data and the noise, put
    them together again at the later time."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    now, then = torch.rand(2, dtype=torch.float64).sort().values
    denoiser = lambda x: torch.tanh(x @ weight)
    velocity = lambda x, times: (denoiser(x) - x) / (1 - times[:, None])
    noise = (x - now * denoiser(x)) / (1 - now)
    together = then * denoiser(x) + (1 - then) * noise
    torch.testing.assert_close(euler(velocity, x, now, then), together, rtol=1e-12, atol=1e-12)


@claim
def a_velocity_is_a_denoiser_and_a_score():
    """The denoiser read off the exact velocity is the one that Tweedie's formula reads off the score of the density."""
    torch.manual_seed(0)
    data, x = torch.randn(4, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    for t, smallest in ((0.2, 0.0), (0.9, 0.0), (0.5, 0.2), (1.0, 0.3)):
        times = torch.full((6,), t, dtype=torch.float64)
        width = 1 - (1 - smallest) * t
        log_density = torch.logsumexp(-(x[:, None] - t * data).square().sum(-1) / (2 * width**2), -1)
        score = torch.autograd.grad(log_density.sum(), x)[0]
        ours = data_of(marginal(data, smallest=smallest)(x, times), x, times, smallest=smallest)
        torch.testing.assert_close(ours, (x + width**2 * score) / t, rtol=1e-10, atol=1e-10)


@claim
def straight_paths_make_a_bent_flow():
    """One step of Euler from any noise ends on the mean of the data: right for a single image, neither of two; many
    steps end on one of them."""
    torch.manual_seed(0)
    noise = torch.randn(7, 3, dtype=torch.float64)
    for count in (1, 2):
        data = torch.randn(count, 3, dtype=torch.float64)
        once = sample(marginal(data), noise, steps=1)
        torch.testing.assert_close(once, data.mean(0).expand_as(once))
        often = sample(marginal(data), noise, steps=100)
        assert torch.cdist(often, data).amin(1).max() < 1e-6
    assert torch.cdist(once, data).min() > 0.1


@claim
def two_evaluations_buy_an_order():
    """On an exact velocity Euler's error falls with the step, Heun's and the midpoint's with its square."""
    torch.manual_seed(0)
    data, noise = torch.randn(3, 2, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    velocity = marginal(data, smallest=0.6)
    exact = sample(velocity, noise, steps=640, solver=heun)
    for solver, order in ((euler, 1), (midpoint, 2), (heun, 2)):
        coarse, fine = ((sample(velocity, noise, steps=n, solver=solver) - exact).norm() for n in (40, 80))
        assert abs(torch.log2(coarse / fine) - order) < 0.1, (solver.__name__, torch.log2(coarse / fine))


@claim.parity(peer="diffusers FlowMatchEulerDiscreteScheduler")
def equals_diffusers():
    """With time and velocity turned round, the same network gives diffusers' samples, and its weights' gradients."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    noise, weights = torch.randn(3, 5), [w.requires_grad_() for w in (torch.randn(5, 5) / 2).expand(2, 5, 5).clone()]
    network = lambda x, times, weight: torch.tanh(x @ weight + times[:, None])
    ours = sample(lambda x, times: network(x, times, weights[0]), noise, steps=7)
    peer, theirs = FlowMatchEulerDiscreteScheduler(), noise
    peer.set_timesteps(sigmas=torch.linspace(1, 0, 8)[:-1].tolist())
    for t in peer.timesteps:
        velocity = network(theirs, (1 - t / 1000).expand(3), weights[1])
        theirs = peer.step(-velocity, t, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(ours.square().sum() + theirs.square().sum(), weights)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@claim.parity(peer="flow_matching AffineProbPath with CondOTScheduler")
def equals_meta():
    """Points and velocities of the path, and the loss with its gradient, equal those of the authors' library."""
    from flow_matching.path import CondOTProbPath

    torch.manual_seed(0)
    noise, data, weight = torch.randn(3, 4, 1, 5, 3, dtype=torch.float64)
    times = torch.rand(4, dtype=torch.float64)
    weight.requires_grad_()
    x, velocity = straight(noise, data, times)
    peer = CondOTProbPath().sample(x_0=noise, x_1=data, t=times)
    torch.testing.assert_close((x, velocity), (peer.x_t, peer.dx_t), rtol=1e-12, atol=1e-12)
    loss = lambda x, u: (torch.tanh(weight * x) - u).square().mean()
    ours, theirs = (torch.autograd.grad(loss(*pair), weight)[0] for pair in ((x, velocity), (peer.x_t, peer.dx_t)))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@claim.measured(paper="CIFAR-10: FID 6.35 at 142 evaluations; ImageNet-64: FID 14.45, both below DDPM's (Table 1)")
def fewer_evaluations_do(lab):
    """At 4, 8 and 16 evaluations of the same network, trained alike, flow matching (Euler) draws digits nearer to
    held-out ones than DDPM (DDIM) does: their energy distances sum to less by at least a fifth."""
    from sklearn.svm import SVC

    training, held_out = (lab.task("flow-matching").all(split) for split in ("train", "validation"))
    labels = training.labels[:800]
    noise = torch.randn(800, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    judge = SVC(C=10).fit(training.images.flatten(1), training.labels)
    numbers = {
        "training digits: distance": energy_distance(training.images, held_out.images),
        "held-out digits: recognised": judge.score(held_out.images.flatten(1), held_out.labels),
    }
    gains, drawn = [], {}
    for seed in lab.seeds(3):
        models = {name: lab.train(name, seed=seed).model for name in ("flow-matching", "ddpm")}
        sums = dict.fromkeys(models, 0.0)
        for name, calls in ((name, calls) for calls in (4, 8, 16, 64) for name in models):
            images = _drawn(models[name], noise, labels, calls, name)
            distance = energy_distance(images, held_out.images)
            right = (judge.predict(images.flatten(1)) == labels.numpy()).mean()
            numbers.setdefault(f"{name}, {calls} evaluations: distance", []).append(distance)
            numbers.setdefault(f"{name}, {calls} evaluations: recognised", []).append(float(right))
            sums[name] += distance if calls <= 16 else 0.0
            drawn[f"{name} {calls}"] = torch.cat([images[labels == digit][:1] for digit in range(10)])
        gains.append(1 - sums["flow-matching"] / sums["ddpm"])
    figures = {"One digit of each class from the same noise, by evaluations": lab.figure(_mosaic(drawn))}
    return lab.at_least(gains, 0.2, unit="of DDPM's distance", numbers=numbers, figures=figures)


@torch.no_grad()
def _drawn(model: nn.Module, noise: Tensor, labels: Tensor, calls: int, name: str) -> Tensor:
    network = lambda x, times: model(x, times, labels)
    return sample(network, noise, steps=calls) if name == "flow-matching" else ddim(network, noise, evaluations=calls)


def _mosaic(rows: dict[str, Tensor]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 0.5 * len(rows)))
    axes = figure.subplots()
    axes.imshow(torch.cat([torch.cat(list(images[:, 0]), 1) for images in rows.values()]), cmap="gray_r")
    axes.set_yticks([8 * i + 3.5 for i in range(len(rows))], list(rows))
    axes.set_xticks([])
    return figure
