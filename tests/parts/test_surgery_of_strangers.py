"""`Y.apply` on models that somebody else wrote: the right rows, nothing inert, and nothing changed after a refusal."""

import copy
import importlib
import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

import deltax
from deltax import catalog, cli
from deltax.errors import UserError
from deltax.papers.language.adaptation.lora import LoRA, lora, merge
from deltax.papers.language.models.gpt import gpt
from deltax.papers.language.norm.dyt import DyT, dyt
from deltax.papers.language.norm.rms_norm import RMSNorm, rms_norm
from deltax.papers.systems.decentralized.subspace_networks import subspace_networks
from deltax.parts.rewriting.surgery import apply
from deltax.recipe import Part

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings(r"ignore:dyt also changes entry")

IDS = {"bos_token_id": 0, "eos_token_id": 0}
PAD = {**IDS, "pad_token_id": 0}
GPT = {"vocab_size": 64, "n_positions": 32, "n_embd": 24, "n_layer": 1, "n_head": 3, **IDS}
LLAMA = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64, **PAD}
WIDE = {**LLAMA, "intermediate_size": 48}
IMAGE = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
SMALL = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 64, **PAD}
HYBRID = {"layers_block_type": ["mamba", "attention", "mlp"], "num_key_value_heads": 2, "head_dim": 8, "n_groups": 1}


def model(name, **config):
    """A model of transformers by its name without `Config`, in evaluation, with random matrices."""
    family, _, head = name.partition(":")
    torch.manual_seed(0)
    made = getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**config)).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return made


FUSED = {
    "gpt2": lambda: model("GPT2:LMHeadModel", **GPT),
    "codegen": lambda: model("CodeGen:ForCausalLM", **{**GPT, "n_embd": 32, "n_head": 4, "rotary_dim": 4, "n_ctx": 32}),
    "bigcode, one key head": lambda: model("GPTBigCode:ForCausalLM", **GPT),
    "bigcode, two heads": lambda: model("GPTBigCode:ForCausalLM", **{**GPT, "n_head": 2}),
    "bigcode, interleaved": lambda: model("GPTBigCode:ForCausalLM", **GPT, multi_query=False),
    "phi3": lambda: model("Phi3:ForCausalLM", **WIDE),
    "phi3, half the key heads": lambda: model("Phi3:ForCausalLM", **WIDE, num_key_value_heads=2),
    "gpt-neox": lambda: model("GPTNeoX:ForCausalLM", **WIDE),
    "bloom": lambda: model("Bloom:ForCausalLM", vocab_size=64, hidden_size=32, n_layer=1, n_head=4, **PAD),
    "falcon": lambda: model("Falcon:ForCausalLM", **LLAMA),
    "falcon, groups": lambda: model("Falcon:ForCausalLM", **LLAMA, num_kv_heads=2, new_decoder_architecture=True),
    "mpt": lambda: model("Mpt:ForCausalLM", vocab_size=64, d_model=32, n_heads=4, n_layers=1, max_seq_len=32),
    "persimmon": lambda: model("Persimmon:ForCausalLM", **WIDE),
}  # fmt: skip


def first_layer(module, tokens):
    layer = module(tokens, use_cache=True).past_key_values.layers[0]
    return layer.keys.clone(), layer.values.clone()


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_an_adapter_moves_the_rows_of_its_role(name):
    module, tokens = FUSED[name]().double(), torch.randint(1, 60, (2, 7))
    keys, values = first_layer(module, tokens)
    logits = module(tokens).logits
    lora.apply(module, rank=3)
    assert torch.equal(module(tokens).logits, logits)
    adapters = {path.rpartition(".")[2]: m for path, m in module.named_modules() if isinstance(m, LoRA)}
    assert set(adapters) == {"query", "value"}
    for role, adapter in adapters.items():
        nn.init.normal_(adapter.b)
        k, v = first_layer(module, tokens)
        assert torch.equal(k, keys) and torch.equal(v, values) == (role == "query")
        assert not torch.allclose(module(tokens).logits, logits)
    adapted = module(tokens).logits
    torch.testing.assert_close(merge(module)(tokens).logits, adapted)


class GatedAttention(nn.Module):
    """Rows of a fused projection that are no query, key or value, though they move one position as a query does."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(12, 48)
        self.out_proj = nn.Linear(12, 12)

    def forward(self, x):
        q, k, v, gate = self.qkv(x).unflatten(-1, (4, 3, 4)).permute(2, 0, 3, 1, 4)
        return self.out_proj((scaled_dot_product_attention(q, k, v) * gate.sigmoid()).transpose(1, 2).flatten(2))


def test_a_layout_that_is_not_attention_is_refused_with_its_reason():
    with pytest.raises(UserError, match=r"\(qkv cannot be taken apart\).*qkv: its rows are not those of queries"):
        lora.apply(GatedAttention())


def test_a_layout_cannot_be_probed_on_the_meta_device():
    with torch.device("meta"):
        module = GatedAttention()
    with pytest.raises(UserError, match=r"qkv: no pass can be made on the meta device"):
        lora.apply(module)


class ReadsWeights(nn.Module):
    """Attention that calls none of its projections, as EVA-02's, BEiT's and Swin V2's in timm."""

    def __init__(self, fused):
        super().__init__()
        self.norm = nn.LayerNorm(12)
        names = ("qkv",) if fused else ("q_proj", "k_proj", "v_proj")
        self.projections = nn.ModuleDict({name: nn.Linear(12, 36 // len(names)) for name in names})

    def forward(self, x):
        parts = self.projections.values()
        weight, bias = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
        if len(parts) == 1:
            weight = self.projections["qkv"].weight
        y = layer_norm(x, (12,), self.norm.weight, self.norm.bias)
        q, k, v = linear(y, weight, bias).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        return x + scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class OwnsFused(ReadsWeights):
    """The same, but the fused projection is the attention's own."""

    def __init__(self):
        super().__init__(True)
        self.qkv = self.projections.pop("qkv")

    def forward(self, x):
        y = layer_norm(x, (12,), self.norm.weight, self.norm.bias)
        q, k, v = linear(y, self.qkv.weight, self.qkv.bias).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        return x + scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("made", [lambda: ReadsWeights(False), OwnsFused], ids=["apart", "fused"])
def test_adapters_act_where_the_owner_reads_the_weight(made):
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(5, 12), made()).double(), torch.randn(2, 7, 5, dtype=torch.float64)
    before = module(x)
    lora.apply(module, rank=2)
    assert torch.equal(module(x), before)
    assert {(old, new) for _, old, new in deltax.applied(module)[-1].replaced} == {("Linear", "LoRA")}
    for m in module.modules():
        if isinstance(m, LoRA):
            nn.init.normal_(m.b)
    adapted = module(x)
    assert not torch.allclose(adapted, before)
    torch.testing.assert_close(merge(module)(x), adapted, rtol=0, atol=1e-12)
    assert [type(m) for m in module.modules()] == [type(m) for m in nn.Sequential(nn.Linear(5, 12), made()).modules()]
    with pytest.raises(UserError, match=r"at 1\.norm: its owner reads its weight and does not call it.*skip='1\.norm'"):
        dyt.apply(module)


class Shared(nn.Module):
    """Maps that share one weight: as one Parameter, or as views of one storage."""

    def __init__(self, how):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o = (nn.Linear(12, 12, bias=False) for _ in range(4))
        self.again = nn.ModuleDict({"q_proj": nn.Linear(12, 12, bias=False)})
        for other in (self.k_proj, self.again["q_proj"]):
            if how == "parameter":
                other.weight = self.q_proj.weight
            else:
                other.weight.data = self.q_proj.weight.data

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (3, 4)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.again["q_proj"](scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("how", ["parameter", "storage"])
def test_merging_into_a_shared_weight_leaves_its_other_users(how):
    torch.manual_seed(0)
    module, x = lora.apply(Shared(how).double(), rank=2), torch.randn(2, 5, 12, dtype=torch.float64)
    for m in module.modules():
        if isinstance(m, LoRA):
            nn.init.normal_(m.b)
    adapted, keys = module(x), module.k_proj(x)
    merge(module)
    torch.testing.assert_close(module(x), adapted, rtol=0, atol=1e-12)
    assert torch.equal(module.k_proj(x), keys) and not any(p.requires_grad for p in module.parameters())


def only_keys(recipe: Part) -> Part:
    return recipe.fill("key", nn.Linear)


def test_a_filled_part_goes_on_sharing_its_weight():
    module = Shared("parameter")
    apply(only_keys, module)
    assert module.k_proj.weight is module.q_proj.weight


def test_rescaled_weights_are_refused_and_the_model_is_as_it_was():
    rwkv = model("Rwkv:ForCausalLM", **{**SMALL, "num_hidden_layers": 3}, rescale_every=1, context_length=32)
    untouched = as_it_is(rwkv)
    with pytest.raises(UserError, match="lora looks for parts that RwkvForCausalLM does not have; query"):
        lora.apply(rwkv)
    assert untouched(rwkv)
    with pytest.raises(UserError, match=r"blocks\.1\.feed_forward\.value: with its weight merged .* skip='rwkv"):
        lora.apply(rwkv, where="value")
    assert untouched(rwkv)
    lora.apply(rwkv, where="value", skip="*feed_forward*")
    assert len(deltax.applied(rwkv)[-1].replaced) == 3


NEIGHBOURS = {
    "mamba": lambda: model("Mamba:ForCausalLM", **SMALL),
    "mamba2": lambda: model("Mamba2:ForCausalLM", **SMALL, num_heads=8, head_dim=8, n_groups=1),
    "falcon-mamba": lambda: model("FalconMamba:ForCausalLM", **SMALL),
    "nemotron-h": lambda: model(
        "NemotronH:ForCausalLM", **{**WIDE, **HYBRID, "num_hidden_layers": 3}, mamba_num_heads=8, ssm_state_size=4
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEIGHBOURS)
@pytest.mark.parametrize(("delta", "kind"), [(dyt, DyT), (rms_norm, RMSNorm)], ids=["dyt", "rms-norm"])
def test_a_norm_answers_what_its_neighbours_read(name, delta, kind):
    module, tokens = NEIGHBOURS[name](), torch.randint(1, 60, (2, 7))
    before = module(tokens).logits
    delta.apply(module)
    norms = [m for m in module.modules() if isinstance(m, kind)]
    assert len(norms) >= 3 and all(m.weight is m.gain for m in norms)
    assert torch.allclose(module(tokens).logits, before, atol=1e-4) == (delta is rms_norm)


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.LayerNorm(8)
        self.norm = ConditionalLayerNorm(8)

    def forward(self, x):
        return self.norm(self.first(x), x.mean(-1, keepdim=True))


class ConditionalLayerNorm(nn.LayerNorm):
    def forward(self, x, condition):
        return super().forward(x) * condition


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8, elementwise_affine=i > 0) for i in range(3))
        self.norms[2].requires_grad_(False)

    def forward(self, x):
        for norm in self.norms:
            x = norm(x)
        return x


def test_conditional_norms_and_norms_of_other_shapes_are_refused_by_name():
    module = Conditional()
    untouched = as_it_is(module)
    with pytest.raises(UserError, match=r"cannot replace norm of Conditional: .* missing 1 .* skip='norm'"):
        dyt.apply(module)
    assert untouched(module)
    assert isinstance(dyt.apply(module, skip="norm").first, DyT) and isinstance(module.norm, ConditionalLayerNorm)
    xlstm = model("xLSTM:ForCausalLM", hidden_size=32, num_blocks=1, num_heads=2, vocab_size=64, qk_dim_factor=1.0)
    with pytest.raises(UserError, match=r"multihead_norm of xLSTM.* does not take x"):
        dyt.apply(xlstm)


def test_frozen_stays_frozen_and_a_norm_without_a_gain_learns_none():
    module = dyt.apply(Listed())
    trained = [[n for n, p in norm.named_parameters() if p.requires_grad] for norm in module.norms]
    assert trained == [["alpha"], ["alpha", "gain", "bias"], []]
    assert set(module.state_dict()) == {"norms.0.alpha", *(f"norms.{i}.{n}" for i in (1, 2) for n in trained[1])}


def test_an_adapter_is_put_in_once():
    for module in (FUSED["gpt2"](), nn.TransformerEncoderLayer(12, 3, 20), gpt().build({"vocab": 11, "context": 9})):
        lora.apply(module)
        with pytest.raises(UserError, match=r"has a LoRA at .* already"):
            lora.apply(module)
        lora.apply(merge(module))
    with pytest.raises(UserError, match="has lora already"):
        gpt + lora + lora(rank=2)


def test_a_selection_is_kept_to_and_reported():
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), 3)
    untouched = as_it_is(module)
    with pytest.raises(UserError, match=r"where='layer\.0\*' matches no part .* there are layers\.0\.norm1"):
        dyt.apply(module, where="layer.0*")
    assert untouched(module)
    dyt.apply(module, where=[0, "layers.2.*"], skip="*.norm2")
    replaced = [path for path, m in module.named_modules() if isinstance(m, DyT)]
    assert replaced == ["layers.0.norm1", "layers.2.norm1"]
    (record,) = deltax.applied(module)
    assert record.replaced == tuple((path, "LayerNorm", "DyT") for path in replaced) and not record.unchecked
    assert ("layers.1.norm1", "not selected") in record.left and "layers.0.norm1: LayerNorm -> DyT" in str(record)
    lora.apply(module, where="value")
    assert sum(isinstance(m, LoRA) for m in module.modules()) == 3 and len(deltax.applied(module)) == 2


def test_wrapped_and_compiled_models_are_refused():
    for wrapped in (nn.DataParallel(Listed()), torch.compile(Listed()), nn.Sequential(torch.compile(Listed()))):
        with pytest.raises(UserError, match="apply it to the model first"):
            dyt.apply(wrapped)


def test_the_papers_that_can_be_applied_are_listed(capsys):
    assert cli.main(["apply", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert set(listed["applied"]) == {"layer-norm", "rms-norm", "dyt", "lora"}
    assert {*listed["applied"], *listed["refused"]} == set(DELTAS)
    assert "it also changes objective" in listed["refused"]["moco"] and "qk_position" in listed["refused"]["rope"]


class Unusual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, *, pieces):
        return self.norm(pieces["x"])


def test_an_example_is_used_and_its_lack_is_said():
    with pytest.warns(UserWarning, match="rms-norm was not checked: no input of Unusual was found"):
        rms_norm.apply(Unusual())
    module = rms_norm.apply(Unusual(), example={"pieces": {"x": torch.randn(2, 3, 8)}})
    assert deltax.applied(module)[-1].unchecked == ()
    with pytest.raises(UserError, match="the example does not run in Unusual: norm: RuntimeError"):
        rms_norm.apply(Unusual(), example={"pieces": {"x": torch.randn(2, 3, 7)}})


def test_half_of_a_paper_is_not_applied():
    with pytest.raises(UserError, match=r"subspace-networks is no drop-in part.*also changes embedding, position"):
        subspace_networks.apply(FUSED["gpt2"]())


class Breaks(nn.Module):
    """A neighbour that reads an attribute of its norm that nothing else has."""

    def __init__(self):
        super().__init__()
        self.norm = Odd(8)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return self.norm(x) * self.norm.special()


class Odd(nn.LayerNorm):
    def special(self):
        return 2.0


class Counts(nn.Module):
    """Batch norm, dropout, a counter and queries: what a probe must put back."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.up_proj = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.batch, self.drop, self.act = nn.BatchNorm1d(6), nn.Dropout(0.5), nn.GELU()
        self.calls, self.seen = 0, []

    def forward(self, x):
        self.calls += 1
        self.seen.append(x.shape)
        x = self.batch(self.q_proj(x).flatten(0, -2)).view(x.shape)
        return self.drop(self.act(self.up_proj(x)) * self.v_proj(x))


def as_it_is(module):
    """A function that says whether the module is still as it is now, bit for bit."""

    def state(m):
        tensors = {n: t.detach().clone() for n, t in (*m.named_parameters(), *m.named_buffers())}
        plain = [
            (type(inner), inner.training, {k: copy.copy(v) for k, v in vars(inner).items() if not k.startswith("_")})
            for inner in m.modules()
        ]
        return tensors, plain, [id(p) for p in m.parameters()], [p.requires_grad for p in m.parameters()]

    tensors, *rest = state(module)
    drawn = torch.get_rng_state()

    def same(m):
        now, *others = state(m)
        equal = list(now) == list(tensors) and all(torch.equal(now[n], t) for n, t in tensors.items())
        return equal and others == rest and torch.equal(torch.get_rng_state(), drawn)

    return same


STRANGERS = {
    "gpt2": FUSED["gpt2"],
    "phi3": FUSED["phi3, half the key heads"],
    "vit": lambda: model("ViT:Model", **IMAGE, intermediate_size=48),
    "mamba": NEIGHBOURS["mamba"],
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), 1),
    "conditional": Conditional,
    "breaks": Breaks,
    "counts": Counts,
    "linear": lambda: nn.Linear(3, 3),
}
DELTAS = [key for key, record in catalog.papers().items() if record.kind == "delta"]


@pytest.mark.parametrize("name", STRANGERS)
def test_every_delta_changes_a_stranger_or_leaves_it_bit_for_bit(name):
    served = set()
    torch.manual_seed(0)
    made = STRANGERS[name]()
    untouched = as_it_is(made)
    for key in DELTAS:
        record = catalog.find(key)
        delta = getattr(importlib.import_module(record.module), record.function)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                delta.apply(made)
            except UserError as refusal:
                assert "\n" not in str(refusal) and key in str(refusal)
                assert untouched(made), key
                continue
        assert deltax.applied(made)[-1].replaced and not untouched(made), key
        served.add(key)
        made = STRANGERS[name]()
        untouched = as_it_is(made)
    norms = {"layer-norm", "rms-norm", "dyt"}
    expected = {"gpt2": {*norms, "lora"}, "phi3": {*norms, "lora"}, "vit": {*norms, "lora"}, "mamba": norms}
    expected |= {"encoder": {*norms, "lora"}, "counts": {"lora"}}
    assert served == expected.get(name, set())
