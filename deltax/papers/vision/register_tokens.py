"""Vision Transformers Need Registers. Darcet, Oquab, Mairal, Bojanowski, 2023. arXiv:2309.16588

A ViT, but with a few learned tokens more, which nobody reads at the end.

Large ViTs, trained long, take patches that show little, a stretch of sky, and keep there what concerns the whole image:
their norms stand out, and what the patch itself showed is lost. Registers are places of their own for that. They have
no position and are dropped after the last block; where in the sequence they stand does not matter, and here it is
behind the patches. The paper uses four.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from deltax import Part, UserError, claim, paper
from deltax.contract import needs
from deltax.paper import paper_of
from deltax.papers.vision.vit import from_hf as vit_from_hf
from deltax.papers.vision.vit import renamed, vit
from deltax.parts.checking import gradients, randomise, same_gradients
from deltax.parts.context import Context
from deltax.parts.roles import tag
from deltax.shapes import Stream


@needs(outside=("PooledBlock",))
class WithRegisters(nn.Module):
    """The inner stack, on the stream and `registers` learned vectors behind it, which are then dropped.

    Stream (B, T, D) -> (B, T, .width). Positions, where ctx has any, are 0 for registers.
    """

    can_be_zero = ("registers",)
    hides_context = ("grid",)

    def __init__(self, dim: int, *, inner: Part, registers: int = 4, std: float = 0.02):
        super().__init__()
        self.std = std
        self.inner = inner(dim)
        self.width = self.inner.width
        self.registers = tag(nn.Parameter(torch.empty(registers, dim)), "embedding")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.registers, std=self.std)

    def forward(self, x: Stream, ctx: Context) -> Stream:
        if ctx.positions is not None:
            ctx = replace(ctx, positions=nn.functional.pad(ctx.positions, (0, len(self.registers))))
        out = self.inner(torch.cat([x, self.registers.expand(len(x), -1, -1)], 1), ctx)
        if out.shape[1] != x.shape[1] + len(self.registers):
            raise UserError(
                "registers stand behind the patches to the end, and this stack pools or merges them: leave one out"
            )
        return out[:, : x.shape[1]]


@paper(on=vit, year=2023, arxiv="2309.16588")
def register_tokens(recipe: Part, *, registers: int = 4) -> Part:
    return recipe.wrap("stack", WithRegisters, registers=registers)


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `transformers` Dinov2WithRegistersModel as that of a `ViT` with registers.

    Layer scale is folded into the maps that it follows, which are linear.
    """
    state = {k.replace("encoder.layer.", "layers."): v for k, v in state.items()}
    registers = state.pop("embeddings.register_tokens")[0]
    for name in [k for k in state if k.endswith(".lambda1")]:
        branch = {"layer_scale1.lambda1": "attention.o_proj", "layer_scale2.lambda1": "mlp.fc2"}
        block, _, scale = name.partition(".layer_scale")
        last, gain = f"{block}.{branch[f'layer_scale{scale}']}", state.pop(name)
        state[f"{last}.weight"] = gain[:, None] * state[f"{last}.weight"]
        state[f"{last}.bias"] = gain * state[f"{last}.bias"]
    norms = (("norm1", "layernorm_before"), ("norm2", "layernorm_after"))
    ours = vit_from_hf({renamed(k, norms): v for k, v in state.items()})
    ours = {k.replace("stack.blocks", "stack.inner.blocks"): v for k, v in ours.items()}
    return {**ours, "stack.registers": registers}


@claim
def no_registers_is_a_vit():
    """With none, the stream is the ViT's, to the bit."""
    plain = randomise(_tiny["model.trunk"](2, (6, 9)))
    none = (_tiny + register_tokens(registers=0))["model.trunk"](2, (6, 9)).double()
    none.load_state_dict(_moved(plain.state_dict()) | {"stack.registers": torch.empty(0, 12)})
    images = torch.randn(2, 2, 6, 9, dtype=torch.float64)
    assert torch.equal(none(images), plain(images))


@claim
def the_order_of_registers_is_not_seen():
    """Permuting the registers changes nothing; changing one changes every element of the stream."""
    trunk = randomise((_tiny + register_tokens)["model.trunk"](2, (6, 9)))
    images = torch.randn(2, 2, 6, 9, dtype=torch.float64)
    before = trunk(images)
    with torch.no_grad():
        trunk.stack.registers.copy_(trunk.stack.registers.flip(0))
        torch.testing.assert_close(trunk(images), before)
        trunk.stack.registers[0].normal_()
    assert ((trunk(images) - before).abs().amax(-1) > 1e-9).all()


@claim.parity(peer="transformers Dinov2WithRegistersModel")
def equals_transformers():
    """The same random weights give transformers' class token and patches, and the gradients of the registers."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    shape = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, image_size=9, patch_size=3)
    theirs = randomise(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape, num_channels=2)))
    ours = (_tiny + register_tokens)["model.trunk"](2, 9).double()
    ours.load_state_dict(from_hf(theirs.state_dict()))
    images = torch.randn(2, 2, 9, 9, dtype=torch.float64)
    peer = theirs(images).last_hidden_state
    same_gradients(ours(images), torch.cat([peer[:, :1], peer[:, 5:]], 1))
    mine, yours = gradients(ours), gradients(theirs)
    torch.testing.assert_close(mine["stack.registers"], yours["embeddings.register_tokens"][0])
    torch.testing.assert_close(mine["class_token.token"], yours["embeddings.cls_token"][0, 0])


@claim.measured(
    paper="with registers no patch's norm stands out; LOST on VOC07 35.3 to 55.4 corloc with DINOv2-L (Table 3)"
)
def no_patch_stands_out(lab):
    """Trained on digits in 64 patches, many of them blank, the largest norm among an image's patches over their median
    is at least a tenth larger without registers than with four."""
    falls, numbers = [], {}
    for seed in lab.seeds(3):
        ratios = {}
        for registers in (0, 1, 4):
            recipe = paper_of(vit)(patch=1, depth=3)
            run = lab.train(recipe + register_tokens(registers=registers) if registers else recipe, seed=seed)
            norms = run.watch("trunk.stack")[1][:, 1:].norm(dim=-1)
            ratios[registers] = (norms.amax(1) / norms.median(1).values).mean().item()
            numbers.setdefault(f"{registers} registers: largest over median norm", []).append(ratios[registers])
            numbers.setdefault(f"{registers} registers: accuracy", []).append(run.evaluation.metrics["accuracy"])
        falls.append(ratios[0] / ratios[4] - 1)
    return lab.at_least(falls, 0.1, unit="of the ratio with four registers", numbers=numbers)


def _moved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace("stack.", "stack.inner.", 1): v for k, v in state.items()}


_tiny = paper_of(vit)(dim=12, depth=2, heads=3, patch=3)
