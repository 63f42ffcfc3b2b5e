import copy
import warnings

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from deltax.errors import UserError
from deltax.papers.language.adaptation.lora import LoRA, lora, merge
from deltax.papers.language.models.gpt import gpt
from deltax.papers.language.norm.dyt import DyT, dyt
from deltax.papers.language.norm.rms_norm import RMSNorm, rms_norm
from deltax.papers.language.position.alibi import alibi
from deltax.papers.language.position.rope import rope
from deltax.papers.optimization.optimizers.muon import muon
from deltax.parts.model.linear import LinearNoBias
from deltax.parts.model.mlp import relu
from deltax.parts.rewriting.living import Fused, gain
from deltax.parts.rewriting.surgery import apply
from deltax.recipe import Part

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings(r"ignore:dyt(\(alpha=0.7\))? also changes embedding")


class Net(nn.Module):
    """What a person might have written: shared and unshared parts, a list, a Sequential, batch norm."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(5, 8)
        self.batch = nn.BatchNorm1d(8)
        self.norm = nn.LayerNorm(8, eps=3e-4)
        self.again = self.norm
        self.layers = nn.ModuleList(
            nn.ModuleDict({"to_q": nn.Linear(8, 6, bias=False), "to_v": nn.Linear(8, 6), "other": nn.Linear(6, 8)})
            for _ in range(2)
        )
        self.mlp = nn.Sequential(nn.RMSNorm(8, eps=None), nn.GELU(), nn.LayerNorm([8], elementwise_affine=False))

    def forward(self, x):
        x = self.again(self.batch(self.norm(self.read(x)).mT).mT)
        for layer in self.layers:
            x = x + layer["other"](layer["to_q"](x).sigmoid() * layer["to_v"](x))
        return self.mlp(x)


def gpt2():
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=11, n_positions=9, n_embd=12, n_layer=2, n_head=3, **quiet)
    return transformers.GPT2LMHeadModel(config)


def llama(**given):
    sizes = {"vocab_size": 11, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2, rms_norm_eps=2e-6, **given)
    return transformers.LlamaForCausalLM(config)


def bert():
    sizes = {"vocab_size": 11, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
    return transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=3, max_position_embeddings=9))


def encoder():
    layer = nn.TransformerEncoderLayer(12, 4, 20, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(12))


def own():
    return Net()


def house():
    return gpt.put("model.dim", 12)().build({"vocab": 11, "context": 9})


MODULES = {f.__name__: f for f in (gpt2, llama, bert, encoder, own, house)}
INPUTS = {"encoder": lambda: torch.randn(2, 7, 12), "own": lambda: torch.randn(2, 7, 5)}
NORMS = {"gpt2": 5, "llama": 5, "bert": 5, "encoder": 5, "own": 3, "house": 7}
ADAPTERS = {"gpt2": 4, "llama": 4, "bert": 4, "encoder": 4, "own": 4, "house": 6}


@pytest.fixture(params=MODULES)
def name(request):
    torch.manual_seed(0)
    return request.param


def made(name):
    module = MODULES[name]()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def given(name):
    return INPUTS.get(name, lambda: torch.randint(11, (2, 7)))()


def output(module, x):
    out = module(x)
    for name in ("logits", "last_hidden_state"):
        out = getattr(out, name, out)
    return out


def count(module, kind):
    return sum(isinstance(m, kind) for m in module.modules())


def check_it_trains_saves_and_loads(name, delta, module, path):
    x = given(name)
    module.train()
    trained = [p for p in module.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    output(module, x).square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(p, q) for p, q in zip(trained, before, strict=True))
    save_model(module, path)
    other = delta.apply(made(name))
    load_model(other, path)
    module.eval(), other.eval()
    with torch.no_grad():
        assert torch.equal(output(module, x), output(other, x))


def test_dyt_replaces_every_norm_and_nothing_else(name, tmp_path):
    module = made(name)
    kept = {n: p for n, p in module.named_parameters() if p.ndim > 1}
    modules = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Embedding | nn.BatchNorm1d)}
    gains = [gain(m) for m in module.modules() if type(m).__name__ in ("LayerNorm", "RMSNorm", "LlamaRMSNorm")]
    assert dyt.apply(module, alpha=0.7) is module
    assert count(module, DyT) == NORMS[name]
    assert not any(type(m).__name__.endswith(("LayerNorm", "RMSNorm")) for m in module.modules())
    after = dict(module.named_parameters())
    assert kept and all(after[n] is p for n, p in kept.items())
    assert all(dict(module.named_modules())[n] is m for n, m in modules.items())
    for new, old in zip((m for m in module.modules() if isinstance(m, DyT)), gains, strict=True):
        assert new.alpha.item() == pytest.approx(0.7)
        assert torch.equal(new.gain, torch.ones_like(new.gain) if old is None else old)
    check_it_trains_saves_and_loads(name, dyt, module, tmp_path / "model.safetensors")


def test_lora_adapts_queries_and_values_and_freezes_the_rest(name, tmp_path):
    module, x = made(name).eval(), given(name)
    before, kept = output(module, x), list(module.parameters())
    lora.apply(module, rank=3)
    assert count(module, LoRA) == ADAPTERS[name]
    assert torch.equal(output(module, x), before)
    adapters = {id(t) for m in module.modules() if isinstance(m, LoRA) for t in (m.a, m.b)}
    assert {id(p) for p in module.parameters() if p.requires_grad} == adapters
    assert len(adapters) == 2 * ADAPTERS[name]
    assert {id(p) for p in module.parameters()} == adapters | {id(p) for p in kept}
    check_it_trains_saves_and_loads(name, lora(rank=3), module, tmp_path / "model.safetensors")


def test_merging_leaves_the_module_as_it_was_built(name):
    module, x = lora.apply(made(name).double().eval(), rank=3), given(name)
    x = x.double() if x.is_floating_point() else x
    for m in module.modules():
        if isinstance(m, LoRA):
            nn.init.normal_(m.b)
    adapted = output(module, x)
    bare = merge(copy.deepcopy(module))
    assert set(bare.state_dict()) == set(made(name).state_dict())
    assert [type(m) for m in bare.modules()] == [type(m) for m in made(name).modules()]
    torch.testing.assert_close(output(bare, x), adapted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output(module, x), adapted, rtol=0, atol=0)
    merge(module)
    torch.testing.assert_close(output(module, x), output(bare, x), rtol=0, atol=0)


def test_rms_norm_takes_gain_and_eps_from_another_class():
    torch.manual_seed(0)
    model, tokens = made("llama").eval(), given("llama")
    before = output(model, tokens)
    rms_norm.apply(model)
    assert count(model, RMSNorm) == 5 and model.model.norm.eps == 2e-6
    torch.testing.assert_close(output(model, tokens), before)


def test_a_gain_that_is_stored_less_one_is_taken_as_it_acts():
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 13, "intermediate_size": 20, "num_hidden_layers": 1, "head_dim": 4}
    config = transformers.GemmaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-5)
    model = transformers.GemmaForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(11, (2, 7))
    before, weight = output(model, tokens), model.model.norm.weight
    rms_norm.apply(model)
    assert torch.equal(model.model.norm.gain, 1 + weight)
    torch.testing.assert_close(output(model, tokens), before)


def test_norms_of_queries_and_keys_are_no_norms_of_the_stream():
    sizes = {"vocab_size": 11, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "head_dim": 4}
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**sizes, num_attention_heads=3, num_key_value_heads=3)
    )
    attention = model.model.layers[0].self_attn
    query_norm = attention.q_norm
    dyt.apply(model)
    assert count(model, DyT) == 3 and attention.q_norm is query_norm


def test_dtype_device_and_mode_are_the_old_parts():
    with torch.device("meta"):
        module = Net()
    module = dyt.apply(lora.apply(module.to(torch.bfloat16).eval()))
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in module.parameters())
    assert not any(m.training for m in module.modules())


class TwoKinds(nn.Module):
    """Attention to itself by `qkv`, and to the sum of all positions by `c_attn`, which is no attention."""

    def __init__(self):
        super().__init__()
        self.qkv, self.c_attn, self.query_key_value = nn.Linear(6, 18), nn.Linear(6, 12), nn.Linear(6, 18)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.c_attn(x.sum(-2, keepdim=True)).chunk(2, -1)[1]


def test_a_fused_projection_is_adapted_where_its_layout_is_known():
    module = TwoKinds()
    reasons = r"leaves c_attn \(its rows are not those of .*\), query_key_value \(the forward pass does not call it\)"
    with pytest.warns(UserWarning, match=reasons):
        lora.apply(module, rank=2)
    assert [list(m.parts) for m in module.modules() if isinstance(m, Fused)] == [["query", "value"]]
    assert isinstance(module.c_attn, nn.Linear) and isinstance(module.query_key_value, nn.Linear)
    with pytest.raises(UserError, match=r"\(qkv cannot be taken apart\); query: .*; qkv: no input for the module"):
        lora.apply(nn.ModuleDict({"qkv": nn.Linear(6, 18)}))


def only_keys(recipe: Part) -> Part:
    return recipe.fill("key", LinearNoBias)


def widened(recipe: Part) -> Part:
    return recipe.fill("activation", relu).fill("up", LinearNoBias)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "own", "house"])
def test_filling_a_linear_slot_keeps_the_weight(name):
    torch.manual_seed(0)
    if name == "own":
        with pytest.raises(UserError, match="key: a linear map called key"):
            apply(only_keys, made(name))
        return
    module, x = made(name).eval(), given(name)
    with torch.no_grad():  # a Matrix has no bias
        for n, p in module.named_parameters():
            if n.endswith("bias"):
                p.zero_()
    before = output(module, x)
    apply(only_keys, module)
    assert count(module, LinearNoBias) == {"gpt2": 2, "llama": 2, "bert": 2, "house": 3}[name]
    torch.testing.assert_close(output(module, x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "encoder"])
def test_filling_up_and_activation(name):
    torch.manual_seed(0)
    module, x = made(name).eval(), given(name)
    before = output(module, x)
    apply(widened, module)
    assert count(module, LinearNoBias) == 2
    with torch.no_grad():
        assert output(module, x).isfinite().all() and not torch.allclose(output(module, x), before)


def test_an_encoder_layer_in_evaluation_uses_the_new_parts():
    torch.manual_seed(0)
    module, x = dyt.apply(made("encoder")), torch.randn(2, 7, 12)
    trained = module.train()(x)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[:, 5:] = True
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x), trained)
        assert module(x, src_key_padding_mask=padding).shape == (2, 7, 12)


def test_the_module_itself_may_be_the_part():
    new = dyt.apply(nn.LayerNorm(7).double())
    assert isinstance(new, DyT) and new.gain.shape == (7,) and new.gain.dtype == torch.float64


def test_what_is_left_out_is_said():
    with pytest.warns(UserWarning, match=r"dyt also changes entry \(Lift\), which is left out") as told:
        dyt.apply(nn.LayerNorm(7))
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rms_norm.apply(nn.LayerNorm(7))
        lora.apply(Net())


@pytest.mark.parametrize("delta", [rope, alibi, muon])
def test_what_is_no_drop_in_part_says_so(delta):
    with pytest.raises(UserError, match=f"{delta.key} is no drop-in part: use it in a recipe"):
        delta.apply(Net())


@pytest.mark.usefixtures("unchecked")
def test_a_recipe_is_no_module():
    with pytest.raises(UserError, match=r"torch.nn.Module, not to a Part"):
        dyt.apply(gpt)


def test_errors_name_what_was_looked_for():
    with pytest.raises(
        UserError, match=r"dyt looks for parts that Linear does not have; norm: nn.LayerNorm, nn.RMSNorm"
    ):
        dyt.apply(nn.Linear(3, 3))
    with pytest.raises(UserError, match=r"lora looks for .* \(query_key_value cannot be taken apart\); query: "):
        lora.apply(nn.ModuleDict({"query_key_value": nn.Linear(6, 18)}))
    with pytest.raises(UserError, match=r"dyt takes no 'alfa'; did you mean 'alpha'"):
        dyt.apply(Net(), alfa=0.3)
    with pytest.raises(UserError, match="at least 1, not 0"):
        lora.apply(Net(), rank=0)
    with pytest.raises(UserError, match="Net has no adapters to merge"):
        merge(Net())
