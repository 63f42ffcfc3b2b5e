"""Claims of ddpm: the paper's equations, parity with peers, and what it measures."""

import torch

from deltax import claim
from deltax.papers.generative.ddpm import STEPS, bound, large, noised, posterior, sample, signal, small
from deltax.tasks.evaluation import energy_distance


@claim
def the_posterior_is_a_product_of_gaussians():
    """At every step the closed form of q(x_{t-1} | x_t, x_0) is the product of the chain's step and the noised data."""
    torch.manual_seed(0)
    abar = signal()[1:]
    before, now = abar[:-1], abar[1:]
    data, x = torch.randn(2, len(now), 1, dtype=torch.float64)
    alpha = now / before
    step, chain = alpha / (1 - alpha), 1 / (1 - before)  # what each factor adds to the precision
    mean = ((step / alpha.sqrt())[:, None] * x + (chain * before.sqrt())[:, None] * data) / (step + chain)[:, None]
    ours, variance = posterior(data, x, before, now)
    torch.testing.assert_close(ours, mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(variance, 1 / (step + chain), rtol=1e-10, atol=1e-12)


@claim
def a_thousand_steps_are_one():
    """Noising step by step gives the mean and the variance that noising at once gives."""
    abar = signal()
    mean, variance = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    for t in range(1, STEPS + 1):
        alpha = abar[t] / abar[t - 1]
        mean, variance = alpha.sqrt() * mean, alpha * variance + (1 - alpha)
        torch.testing.assert_close(torch.stack([mean, variance]), torch.stack([abar[t].sqrt(), 1 - abar[t]]))


@claim.parity(peer="diffusers DDPMScheduler")
def equals_diffusers():
    """Noised images, their gradients, and mean and variance of steps back equal diffusers' all along the chain."""
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    settings = {"beta_schedule": "linear", "clip_sample": False, "variance_type": "fixed_small"}
    peer = DDPMScheduler(num_train_timesteps=STEPS, **settings)
    abar = signal().float()
    for t in (1, 2, 77, 500, 999, 1000):
        data, noise, weight = torch.randn(3, 2, 1, 5, 3)
        ours, theirs = data.clone().requires_grad_(), data.clone().requires_grad_()
        a = noised(ours, noise, abar[[t, t]])
        b = peer.add_noise(theirs, noise, torch.tensor([t - 1, t - 1]))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        gradients = (torch.autograd.grad((x * weight).sum(), y)[0] for x, y in ((a, ours), (b, theirs)))
        torch.testing.assert_close(*gradients)
        x = b.detach()
        guess = (x - (1 - abar[t]).sqrt() * weight) / abar[t].sqrt()
        mean, variance = posterior(guess, x, abar[[t - 1] * 2], abar[[t] * 2])
        torch.testing.assert_close(variance[0].clamp(min=1e-20), peer._get_variance(t - 1), rtol=2e-3, atol=1e-9)
        if t == 1:  # the last step adds no noise, so the peer's step is its mean
            torch.testing.assert_close(mean, peer.step(weight, 0, x).prev_sample, rtol=1e-4, atol=1e-4)
        else:
            torch.manual_seed(t)
            stepped = peer.step(weight, t - 1, x, generator=torch.Generator().manual_seed(t)).prev_sample
            drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
            torch.testing.assert_close(mean + variance[0].sqrt() * drawn, stepped, rtol=1e-3, atol=1e-3)


@claim.parity(peer="diffusers DDPMScheduler, fixed_large and clip_sample")
def equals_diffusers_as_released():
    """With the data clipped to [-1, 1] and the variance of the step forth, all steps back from the same noise are
    diffusers' "fixed_large" steps."""
    from unittest.mock import patch

    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    peer = DDPMScheduler(num_train_timesteps=STEPS, beta_schedule="linear", variance_type="fixed_large")
    x, draws = torch.randn(2, 1, 5, 3), torch.randn(STEPS + 1, 2, 1, 5, 3)
    noise_of = lambda x, times: (3 * x + 5 * times.view(-1, 1, 1, 1)).sin() * 1.5
    theirs = x
    for t in range(STEPS, 0, -1):
        noise = noise_of(theirs, torch.full((2,), t / STEPS))
        mean = peer.step(noise, t - 1, theirs, generator=torch.Generator().manual_seed(t)).prev_sample
        draws[t] = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
        theirs = mean
    order = iter(range(STEPS, 1, -1))
    with patch("torch.randn_like", lambda _: draws[next(order)]):
        ours = sample(noise_of, x, largest=1.0, variance=large)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@claim
def each_variance_is_right_for_its_data():
    """Of data N(0, 1) and their exact noise, a step back of the larger variance gives x_{t-1} a variance of one again,
    a step of the smaller one less; of a single point, the smaller one gives 1 - abar_{t-1} (section 3.2)."""
    abar = signal()
    before, now = abar[:-1], abar[1:]
    unit = torch.ones_like(now)[:, None]
    shrinks = posterior(now.sqrt()[:, None], unit, before, now)[0][:, 0]  # E[x_0 | x_t] = sqrt(abar) x_t
    torch.testing.assert_close(shrinks.square() + large(before, now), torch.ones_like(now), rtol=1e-10, atol=0)
    assert (shrinks.square() + small(before, now) < 1).all()
    along = posterior(torch.zeros_like(unit), unit, before, now)[0][:, 0]  # the point is 0
    torch.testing.assert_close(along.square() * (1 - now) + small(before, now), 1 - before, rtol=1e-10, atol=1e-15)


@claim
def the_whole_chain_finds_the_data():
    """With the exact noise of a data set of one image, the chain back from any noise ends on that image."""
    torch.manual_seed(0)
    abar = signal()
    image, x = torch.randn(1, 1, 3, 5, dtype=torch.float64), torch.randn(4, 1, 3, 5, dtype=torch.float64)
    level = lambda times: abar[(times * STEPS).round().long()].view(-1, 1, 1, 1)
    exact = lambda x, times: (x - level(times).sqrt() * image) / (1 - level(times)).sqrt()
    torch.testing.assert_close(sample(exact, x), image.expand_as(x), rtol=1e-9, atol=1e-9)


@claim.measured(paper="CIFAR-10: FID 3.17 without the weights of the bound, 13.51 with them (Table 2)")
def samples_are_better_without_the_weights(lab):
    """Trained without the weights of the bound, the network draws digits nearer to held-out ones, by the whole chain,
    than trained with them: their energy distance is less by at least a fifth."""
    held_out = lab.task("ddpm").all("validation").images
    labels = torch.arange(300) % 10
    plain = lab.recipe("ddpm")
    gains, numbers = [], {}
    for seed in lab.seeds(3):
        distances = {}
        for name, recipe in (("without weights", plain), ("with weights", plain.fill("objective", bound))):
            model = lab.train(recipe, seed=seed).model
            torch.manual_seed(seed)
            images = sample(lambda x, times, model=model: model(x, times, labels), torch.randn(300, 1, 8, 8))
            distances[name] = energy_distance(images, held_out)
            numbers.setdefault(f"{name}: distance", []).append(distances[name])
        gains.append(1 - distances["without weights"] / distances["with weights"])
    return lab.at_least(gains, 0.2, unit="of the distance with weights", numbers=numbers)
