"""The start that a constructor makes is the start that is trained, and is named by seed and tensor alone."""

import functools
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import strangers
import torch
from strangers import DIM, STRANGERS
from torch import nn

from deltax import UserError, catalog, recipe
from deltax.train.initialise import construct
from deltax.train.job import task_of
from deltax.train.loop import build

KNOWN = catalog.papers()
RECIPES = [key for key, record in KNOWN.items() if record.kind == "recipe"]
DELTAS = [key for key, record in KNOWN.items() if record.kind == "delta" and key != "layer-norm"]  # gpt's norm already


@functools.cache
def state(expression: str) -> dict:
    """The start, by the names that tensors have without wraps."""
    tree = recipe(expression)
    held: dict = {}
    for name, tensor in build(tree(), task_of(tree), 7).state_dict().items():
        steps = name.split(".")
        held.setdefault(".".join(step for step in steps if step != "inner"), []).append((-len(steps), tensor))
    return {name: min(tensors, key=lambda pair: pair[0])[1] for name, tensors in held.items()}


def digest(tensors: dict) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].detach().float().numpy().tobytes())
    return found.hexdigest()


def everyones(task_spec: dict[str, dict]) -> dict[str, str]:
    """A digest of the start of each recipe, given the facts of its task, and of every stranger's module."""
    makers = {key: functools.partial(recipe(key)().build, known) for key, known in task_spec.items()}
    makers |= {module.__name__: module for module in STRANGERS}
    return {name: digest(construct(make, 7).state_dict()) for name, make in makers.items()}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=24, n_layer=2, n_head=2))


@pytest.mark.parametrize("make", [*STRANGERS, gpt2], ids=lambda make: make.__name__)
def test_what_the_constructor_did_stays(make):
    """What two plain constructions have in common is there; what they draw has their spread."""
    torch.manual_seed(1)
    one = make().state_dict()
    torch.manual_seed(2)
    two, found = make().state_dict(), construct(make, 0).state_dict()
    assert list(found) == list(one)
    for name, tensor in found.items():
        alike = one[name] == two[name]
        assert torch.equal(tensor[alike], one[name][alike]), name
        if not alike.all() and tensor.numel() > 500:
            torch.testing.assert_close(tensor.std(), one[name].std(), rtol=0.2, atol=0, msg=name)


def test_relations_that_the_constructor_made_hold():
    weight = construct(strangers.Orthogonal, 0).linear.weight
    torch.testing.assert_close(weight @ weight.mT, torch.eye(DIM))
    tied, copied = construct(strangers.Tied, 0), construct(strangers.Copied, 0)
    assert tied.down.weight is tied.up.weight
    assert torch.equal(copied.teacher.weight, copied.student.weight)
    assert construct(strangers.Rejected, 0).weight.sum() >= 0.5
    experts = construct(strangers.Experts, 0).weight
    assert len({tuple(expert.flatten().tolist()) for expert in experts}) == 3


def test_another_seed_is_another_start_and_the_global_generators_go_on():
    for module in STRANGERS:
        torch.manual_seed(5)
        first, second = (digest(construct(module, seed).state_dict()) for seed in (0, 1))
        assert (first == second) == (module in (strangers.Loaded, strangers.OwnSeed)), module
        assert torch.initial_seed() == 5


def test_a_process_of_its_own_starts_alike():
    task_spec = {key: task_of(recipe(key)).task_spec for key in RECIPES}
    code = "import json, sys, test_starts; print(json.dumps(test_starts.everyones(json.load(sys.stdin))))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(task_spec),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == everyones(task_spec)


@pytest.mark.parametrize("key", DELTAS)
def test_x_and_x_with_y_share_the_start_of_their_tensors(key):
    """Equal to the bit, or, where Y changes the spread on purpose, up to a factor."""
    x = catalog.shown_on(KNOWN[key], KNOWN)
    with_x, with_y = state(x), state(f"{x}+{key}")
    shared = [name for name in with_x if name in with_y and with_x[name].shape == with_y[name].shape]
    differ = [name for name in shared if not torch.equal(with_x[name], with_y[name])]
    assert set(differ) <= OTHERWISE.get(key, set())
    for name in differ:
        factor = with_y[name].flatten()[0] / with_x[name].flatten()[0]
        torch.testing.assert_close(with_x[name] * factor, with_y[name])


# A narrower input spreads torch's biases more; a temperature has another start.
OTHERWISE = {"fsq": {"decoder.enter.bias"}, "siglip": {"logits.log"}}


class Two(nn.Module):
    """A stranger's part beside others, which draw before it, after it, and in its constructor's place."""

    def __init__(self, part: type, before: int = 0):
        super().__init__()
        self.extra = nn.ModuleList(nn.Linear(3, 3) for _ in range(before))
        torch.randn(before)
        self.part = part()
        self.apply(lambda module: nn.init.normal_(module.weight) if type(module) is nn.Embedding else None)


@pytest.mark.parametrize("module", [m for m in STRANGERS if m is not strangers.ByNumpy], ids=lambda m: m.__name__)
def test_a_stranger_starts_alike_beside_anything(module):
    x, y = (construct(functools.partial(Two, module, before), 3).part.state_dict() for before in (0, 2))
    assert digest(x) == digest(y)


def test_a_root_that_starts_all_layers_starts_each_by_its_name():
    class Wider(strangers.Applied):
        def __init__(self):
            super().__init__()
            self.layers.insert(0, nn.Identity())
            self.first = nn.Linear(DIM, DIM)
            self.layers = nn.Sequential(*self.layers[1:])
            self.apply(self._init_weights)

    x, y = construct(strangers.Applied, 0).state_dict(), construct(Wider, 0).state_dict()
    assert all(torch.equal(x[name], y[name]) for name in x) and "first.weight" in y


def test_parts_in_a_recipe_keep_their_start():
    tree = recipe("gpt", ["model.dim=6", "model.stack.depth=2"]).fill("norm", strangers.ZeroGate)
    model = build(tree(), task_of(tree), 0)
    gates = [module for module in model.modules() if isinstance(module, strangers.ZeroGate)]
    assert len(gates) == 5 and not any(gate.gate.weight.any() for gate in gates)
    plain = recipe("gpt", ["model.dim=6", "model.stack.depth=2"])
    x, y = build(plain(), task_of(plain), 0).state_dict(), model.state_dict()
    assert torch.equal(x["stack.blocks.1.mlp.up.weight"], y["stack.blocks.1.mlp.up.weight"])


def test_layers_that_wait_for_their_first_input_are_given_one():
    tree = recipe("gpt", ["model.dim=6", "model.stack.depth=1"]).fill("norm", strangers.Lazy)
    first, second = (build(tree(), task_of(tree), 0).state_dict() for _ in range(2))
    assert first["norm.linear.weight"].shape == (6, 6) and digest(first) == digest(second)


@pytest.mark.parametrize(
    "module, says", [(strangers.Meta, "linear.weight is on the meta device"), (strangers.Forgotten, "starts with NaN")]
)
def test_a_parameter_without_a_start_is_refused(module, says):
    with pytest.raises(UserError, match=says):
        construct(module, 0)


@pytest.mark.parametrize("key", RECIPES)
def test_every_part_resets_itself_when_it_is_constructed(key, monkeypatch):
    """So that a part taken out of a recipe starts as it does inside."""
    tree, called = recipe(key), []
    model = tree().build(task_of(tree).task_spec)
    classes = {base for module in model.modules() for base in type(module).__mro__}
    for made in (made for made in classes if "reset_parameters" in vars(made)):
        reset = made.reset_parameters
        monkeypatch.setattr(made, "reset_parameters", lambda self, reset=reset: called.append(self) or reset(self))
    model = tree().build(task_of(tree).task_spec)
    assert {id(m) for m in model.modules() if hasattr(m, "reset_parameters")} <= {id(m) for m in called}
