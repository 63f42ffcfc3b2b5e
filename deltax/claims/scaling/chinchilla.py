"""Claims of chinchilla: the paper's equations, parity with peers, and what it measures."""

import numpy as np

from deltax import claim
from deltax.papers.scaling.chinchilla import PRINTED, REFITTED, Law, fit, isoflop


@claim
def the_closed_form_is_the_optimum():
    """At five budgets no split on a fine grid has less loss, and the best of the grid lies within 0.1 %."""
    for law in (PRINTED, REFITTED):
        for flops in np.logspace(18, 26, 5):
            parameters, tokens = law.optimal(flops)
            assert abs(6 * parameters * tokens / flops - 1) < 1e-12
            grid = parameters * np.exp(np.linspace(-3, 3, 12_001))
            losses = law.loss(grid, flops / (6 * grid))
            assert law.loss(parameters, tokens) <= losses.min() * (1 + 1e-14)
            assert abs(grid[losses.argmin()] / parameters - 1) < 1e-3


@claim
def the_exponents_are_those_of_the_optimum():
    """A hundred times the compute multiplies the best size by 100^a; with equal slopes, size and tokens grow alike."""
    for law in (PRINTED, REFITTED, Law(2, 300, 500, 0.3, 0.3)):
        (n0, d0), (n1, d1) = law.optimal(1e20), law.optimal(1e22)
        np.testing.assert_allclose([n1 / n0, d1 / d0], [100**law.exponent, 100 ** (1 - law.exponent)], rtol=1e-12)
    assert Law(2, 300, 500, 0.3, 0.3).exponent == 0.5


@claim
def the_printed_coefficients_are_not_chinchilla():
    """For Gopher's 5.76e23 FLOPs the printed law asks for 32B parameters on 3.0T tokens, the refit for about 70B.

    Chinchilla has 70B on 1.4T, after the first two estimates; the refitted law must come within a tenth of both.
    """
    parameters, tokens = PRINTED.optimal(5.76e23)
    assert round(parameters / 1e9) == 32 and round(tokens / 1e12, 1) == 3.0
    parameters, tokens = REFITTED.optimal(5.76e23)
    assert abs(parameters / 70e9 - 1) < 0.1 and abs(tokens / 1.4e12 - 1) < 0.1
    assert abs(REFITTED.exponent - 0.5) < 0.02 < abs(PRINTED.exponent - 0.5)


@claim
def the_fit_recovers_known_coefficients():
    """From 200 runs with 0.5 % of noise the fit finds alpha and beta within 0.02, and without noise all five."""
    generator = np.random.default_rng(0)
    parameters = np.exp(generator.uniform(np.log(5e7), np.log(1.6e10), 200))
    tokens = np.exp(generator.uniform(np.log(5e9), np.log(5e11), 200))
    for law in (PRINTED, REFITTED):
        exact = law.loss(parameters, tokens)
        noisy = fit(parameters, tokens, exact * np.exp(0.005 * generator.standard_normal(200)))
        assert abs(noisy.alpha - law.alpha) < 0.02 and abs(noisy.beta - law.beta) < 0.02
        found = fit(parameters, tokens, exact)
        np.testing.assert_allclose([*vars(found).values()], [*vars(law).values()], rtol=1e-3)


@claim
def profiles_of_equal_compute_find_the_exponent():
    """Parabolas through runs of a known law find its exponent; 90 to 99 % of noisy repeats have it inside."""
    law = Law(1.8, 400, 400, 0.33, 0.33)
    generator = np.random.default_rng(0)
    budgets = np.repeat([1e19, 1e20, 1e21], 4)
    parameters = law.optimal(budgets)[0] * np.tile([0.4, 0.8, 1.6, 3.2], 3)
    losses = law.loss(parameters, budgets / (6 * parameters))
    exact = isoflop(budgets, parameters, losses)
    assert exact.interior and abs(exact.exponent - 0.5) < 1e-6
    repeats = [isoflop(budgets, parameters, losses + 2e-4 * generator.standard_normal(12)) for _ in range(400)]
    assert 0.9 < np.mean([r.interval[0] <= 0.5 <= r.interval[1] for r in repeats]) < 0.99
    assert not isoflop(budgets, parameters, losses + 0.1 * np.log(parameters)).interior


@claim.measured(paper="N_opt ~ C^0.49 by profiles of equal compute (approach 2, Table 2)")
def parameters_grow_as_the_root_of_compute(lab):
    """Each profile of equal compute has its best size inside, and these grow as C^a with a from 0.3 to 0.7."""
    from matplotlib.figure import Figure

    widths = {1e11: (12, 18, 30, 48), 4e11: (18, 27, 42, 66), 1.6e12: (24, 36, 60, 96)}
    flops, parameters, losses = [], [], []
    for budget, dims in widths.items():
        for dim in dims:
            # Batches of one: at such budgets larger ones leave too few steps, and steps, not tokens, are scarce.
            recipe = lab.recipe("gpt").put("model.dim", dim).put("loop.batch", 1)
            size, each = _size_and_flops(recipe, lab.task(recipe))
            steps = round(budget / each)
            run = lab.train(recipe, seed=lab.seeds(1)[0], steps=steps)
            flops.append(budget), parameters.append(size), losses.append(run.score)
    found = isoflop(flops, parameters, losses)
    low, high = found.interval
    if not found.interior or high < 0.3 or low > 0.7:
        outcome = "not seen at this scale"
    else:
        outcome = "supported at this scale" if low > 0.3 and high < 0.7 else "inconclusive"
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for budget, optimum in zip(found.budgets, found.optima, strict=True):
        runs = [(n, l) for c, n, l in zip(flops, parameters, losses, strict=True) if c == budget]
        (line,) = axes.semilogx(*zip(*runs, strict=True), marker="o", label=f"{budget:.1e} FLOPs")
        axes.axvline(optimum, color=line.get_color(), linestyle=":")
    axes.set(xlabel="parameters", ylabel=lab.task(recipe).unit)
    axes.legend(frameon=False)
    numbers = {"flops": flops, "parameters": parameters, "losses": losses, "best sizes": found.optima.tolist()}
    caption = "Profiles of equal compute, one run a point, and the bottom of the parabola through each"
    return lab.verdict(
        outcome,
        estimate=found.exponent,
        interval=found.interval,
        numbers=numbers,
        figures={caption: lab.figure(figure)},
    )


def _size_and_flops(recipe, task) -> tuple[int, int]:
    """Parameters that multiply (all but the positions), and FLOPs of a step: 6 N a token and attention's products."""
    model = recipe().build(task.task_spec)
    size = sum(p.numel() for p in model.parameters()) - model.position.table.numel()
    products = 12 * len(model.stack.blocks) * recipe["model.dim"] * task.context
    return size, (6 * size + products) * task.tokens(recipe["loop"]().batch)
