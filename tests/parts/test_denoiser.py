import pytest
import torch

from deltax.papers.generative.ddpm import ddpm
from deltax.papers.generative.flow_matching import flow_matching, sample
from deltax.parts.model.denoiser import Unlabelled
from deltax.tasks.evaluation import energy_distance
from deltax.train.initialise import construct
from deltax.train.job import Job
from deltax.train.loop import train

FACTS = {"channels": 2, "size": 5, "classes": 3}


def network(recipe=flow_matching):
    model = construct(lambda: recipe().build(FACTS), 0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_it_looks_at_the_image_the_time_and_the_label():
    model = network()
    x, times, labels = torch.randn(4, 2, 5, 5), torch.rand(4), torch.tensor([0, 1, 2, 0])
    out = model(x, times, labels)
    assert out.shape == x.shape
    for other in (
        model(x + 1, times, labels),
        model(x, times + 0.01, labels),
        model(x, times, (labels + 1) % 3),
        model(x, times),
    ):
        assert (other - out).flatten(1).norm(dim=1).min() > 1e-3


def test_images_do_not_wait_for_each_other():
    model = network()
    x, times, labels = torch.randn(4, 2, 5, 5), torch.rand(4), torch.tensor([0, 1, 2, 0])
    alone = torch.cat([model(*(t[i : i + 1] for t in (x, times, labels))) for i in range(4)])
    torch.testing.assert_close(alone, model(x, times, labels))


def test_without_a_label_part_classes_are_not_seen():
    model = network(flow_matching.fill("label", Unlabelled))
    x, times = torch.randn(4, 2, 5, 5), torch.rand(4)
    assert torch.equal(model(x, times, torch.tensor([0, 1, 2, 0])), model(x, times))


@pytest.mark.parametrize("recipe", [flow_matching, ddpm])
def test_a_few_steps_are_learnt_from(recipe):
    out = train(Job(recipe.put("loop.steps", 60).put("model.dim", 32), seed=0, steps=60))
    early, late = ([loss for _, loss in out.progress.losses[at]] for at in (slice(5), slice(-10, None)))
    assert sum(late) / len(late) < 0.85 * sum(early) / len(early)
    assert out.evaluation.score == pytest.approx(sum(late) / len(late), rel=0.3)


def test_energy_distance_is_zero_for_equal_and_not_for_shifted():
    torch.manual_seed(0)
    a, b = torch.randn(2, 800, 3)
    assert abs(energy_distance(a, b)) < 0.01 < 0.2 < energy_distance(a, b + 1)


def test_samples_have_the_shape_and_dtype_of_the_noise():
    noise = torch.randn(3, 2, 5, 5)
    images = sample(network(), noise, steps=2)
    assert images.shape == noise.shape and images.dtype == noise.dtype
