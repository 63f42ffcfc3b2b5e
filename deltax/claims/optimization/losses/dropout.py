"""Claims of dropout: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import nn

from deltax import claim, part
from deltax.papers.optimization.losses.dropout import Dropout, dropout
from deltax.parts.model.perceptron import Perceptron, classifier
from deltax.tasks.images.zip_codes import ZipCodes


@claim
def in_use_it_is_not_there():
    """In evaluation, and with p = 0 also in training, the input comes back to the bit."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7, dtype=torch.float64)
    assert Dropout(p=0.6).eval()(x) is x and Dropout(p=0.0)(x) is x
    assert not torch.equal(Dropout(p=0.6)(x), x)


@claim
def what_stays_makes_up_for_what_goes():
    """Each unit is 0 or x / (1 - p), its gradient 0 or 1 / (1 - p) with it, and the mean over masks is x: within 5
    standard errors over 100,000 masks."""
    torch.manual_seed(0)
    for p in (0.2, 0.5, 0.75):
        x = torch.randn(7, dtype=torch.float64).requires_grad_()
        many = x.expand(100_000, 7)
        gave = Dropout(p=p)(many)
        dropped = gave == 0
        torch.testing.assert_close(gave[~dropped], (many / (1 - p))[~dropped])
        (slopes,) = torch.autograd.grad(gave.sum(), x)
        torch.testing.assert_close(slopes, (~dropped).sum(0).double() / (1 - p))
        error = (p / (1 - p) / 100_000) ** 0.5 * x.detach().abs()
        assert ((gave.mean(0) - x).abs() < 5 * error).all()


@claim
def dropped_linear_regression_is_ridge():
    """For a linear model of squared error, the mean over all 2^n masks, each by its chance, is the plain loss plus
    p / (1 - p) sum_j w_j^2 sum_i x_ij^2 (section 9.1), gradients too."""
    torch.manual_seed(0)
    p = 0.3
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 5)
    chance = ((1 - p) ** masks * p ** (1 - masks)).prod(-1)
    dropped = ((x * masks[:, None] / (1 - p)) @ w - y).square().sum(-1)
    ridge = (x @ w - y).square().sum() + p / (1 - p) * (w.square() * x.square().sum(0)).sum()
    a, b = (chance * dropped).sum(), ridge
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.autograd.grad(a, w), torch.autograd.grad(b, w))


@claim.parity(peer="torch.nn.Dropout")
def equals_torch():
    """With torch's own mask, values and gradients are torch's; the share that is dropped is the same within 5 standard
    deviations."""
    for p in (0.1, 0.5):
        torch.manual_seed(0)
        x = torch.randn(301, 203, requires_grad=True)
        theirs = nn.Dropout(p)(x)
        ours = x * (theirs != 0) / (1 - p)
        torch.testing.assert_close(ours, theirs)
        weights = torch.randn_like(x)
        torch.testing.assert_close(*(torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, theirs)))
        shares = [(y == 0).double().mean().item() for y in (Dropout(p=p)(x), theirs)]
        assert abs(shares[0] - shares[1]) < 5 * (2 * p * (1 - p) / x.numel()) ** 0.5


@claim.measured(paper="1.35 % of MNIST against 1.60 % without, the same network (Table 2)")
def fewer_errors_from_few_images(lab):
    """Trained on 300 digits, a network with two hidden layers of 256 reads more held-out digits with half of its hidden
    units dropped in training than without."""
    without = classifier(part(Perceptron), part(ZipCodes), batch=30, steps=600)
    with_it = without + dropout(p=0.5)
    gains = [lab.train(without, seed=s).score - lab.train(with_it, seed=s).score for s in lab.seeds(5)]
    return lab.at_least(gains, 0.0, unit="% error")
