"""Dropout: A Simple Way to Prevent Neural Networks from Overfitting. Srivastava, Hinton, Krizhevsky, Sutskever,
Salakhutdinov, 2014.

A network, but in training each hidden unit is left out at random.

A unit that cannot count on its neighbours must be of use by itself, and what is used in the end is an average of all
the thinner networks that were trained. The paper halves the weights at test time where half of the units were dropped;
as everywhere since, here the units that stay are made larger in training instead, which is the same in expectation
and leaves the network that is used as it is. In a stack of blocks it is each branch that is thinned, as in the
Transformer (section 5.4 there).
"""

import torch
from torch import Tensor, nn

from deltax import Part, UserError, claim, paper, part
from deltax.papers.vision.lenet_1989 import lenet_1989
from deltax.parts.context import takes_context
from deltax.parts.perceptron import Perceptron, classifier
from deltax.tasks.zip_codes import ZipCodes


class Dropout(nn.Module):
    """x * mask / (1 - p) in training, with mask 1 at a chance of 1 - p; x otherwise. Any shape.

    Raises UserError where p is not in [0, 1).
    """

    def __init__(self, *, p: float = 0.5):
        super().__init__()
        if not 0 <= p < 1:
            raise UserError(f"a share p of the units is dropped, 0 <= p < 1, not {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        kept = torch.rand_like(x, dtype=torch.float32) >= self.p
        return x * kept / (1 - self.p)


class Thinned(nn.Module):
    """dropout(inner(x)): a branch of a block, thinned before it joins the stream. (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, *, inner: Part, p: float = 0.1):
        super().__init__()
        self.inner, self.dropout = inner(dim), Dropout(p=p)
        self.told = takes_context(self.inner)

    def forward(self, x: Tensor, ctx: object = None) -> Tensor:
        return self.dropout(self.inner(x, ctx) if self.told else self.inner(x))


@paper(on=lenet_1989, year=2014, url="https://jmlr.org/papers/v15/srivastava14a.html")
def dropout(recipe: Part, *, p: float = 0.5) -> Part:
    """On hidden units where a network has a place for it; else on the branches of its blocks."""
    if "dropout" in recipe.slots():
        return recipe.fill("dropout", Dropout, p=p)
    return recipe.wrap("mixer", Thinned, p=p).wrap("mlp", Thinned, p=p)


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
