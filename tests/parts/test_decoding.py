"""Decoding in pieces is the full pass, with every field of the context that mixers read; what cannot be is refused."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from deltax import UserError, catalog, contract, part, recipe
from deltax.claims.checking import randomise
from deltax.papers.language.attention.softmax_attention import Attention, CrossAttention
from deltax.papers.language.models.gpt import gpt
from deltax.papers.language.position.rope import rope
from deltax.papers.optimization.normalization.layer_norm import LayerNorm
from deltax.papers.systems.decentralized.beyond_topk import Cut
from deltax.papers.systems.parallelism.megatron import Split
from deltax.papers.vision.backbones.hiera import MaskUnits
from deltax.papers.vision.backbones.mlp_mixer import TokenMixing
from deltax.papers.vision.backbones.q_pooled_attention import PooledBlock, QPooled
from deltax.papers.vision.backbones.register_tokens import WithRegisters
from deltax.papers.vision.backbones.swin import Windows
from deltax.papers.vision.video.factorized_spacetime import AlongTime, WithinFrames
from deltax.papers.vision.video.tracks_to_4d import Axial
from deltax.parts.attention.context import Context, DecodingState
from deltax.parts.attention.deformable import DeformableAttention
from deltax.parts.attention.pages import PagedState
from deltax.parts.attention.scores import Rules, causal, everywhere
from deltax.parts.model.language_model import LanguageModel
from deltax.parts.model.stack import Stack
from deltax.parts.training.generate import generate
from deltax.tasks.language.sequences import PADDING

KNOWN = catalog.papers()
T = 7
CUTS = (1, 2, 3, [4, 1, 2], T)
REFUSED = {"register-tokens", "beyond-topk"}  # by name, since they look at the whole sequence
ROUNDED = {"sage-attention", "sage-attention-2"}  # whole numbers whose step is that of all keys read so far


def fields():
    """The contexts that a stream (2, T) can have: nothing, positions, padding on either side, several documents."""
    left = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0] * T])
    right = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0] * T])
    place = lambda padded: (1 - padded).cumsum(1).sub(1).clamp(min=0)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]])
    return {
        "nothing": {},
        "positions": {"positions": torch.arange(T) + 2},
        "positions of each": {"positions": torch.stack([torch.arange(T) + 1, torch.arange(T) + 3])},
        "left": {"segments": left, "positions": place(left)},
        "right": {"segments": right, "positions": place(right)},
        "documents": {"segments": documents},
    }


def pieces(given, cut):
    """The fields of each piece of a sequence."""
    each = {name: value.split(cut, -1) for name, value in given.items()}
    return [{name: value[i] for name, value in each.items()} for i in range(len(torch.arange(T).split(cut)))]


def decoded(model, tokens, given, cut, state):
    parts = zip(tokens.split(cut, 1), pieces(given, cut), strict=True)
    return torch.cat([model(piece, Context(**where, state=state)) for piece, where in parts], 1)


def models():
    """Of each different next-token model among the recipes its title and itself, tiny, every parameter random."""
    seen = set()
    for title in [*titles(), *pairs(20)]:
        try:
            tree = recipe(title)
        except UserError:
            continue
        if contract.interface(tree["model"]) != contract.TOKENS_TO_LOGITS:
            continue
        tree = tree.set(Stack, depth=1).set(LanguageModel, dim=12)
        if tree["model"] in seen:
            continue
        seen.add(tree["model"])
        try:
            model = tree().build({"vocab": 11, "context": 12}).eval()
            model(torch.zeros(1, T, dtype=torch.int64))
        except ValueError:  # a mixer of another number of tokens, heads that do not divide
            continue
        yield title, randomise(model)


def titles():
    """Every recipe, every delta on gpt alone, and on the recipe that it is shown on."""
    for key, record in KNOWN.items():
        if record.kind == "recipe":
            yield key
        elif record.kind == "delta":
            yield from dict.fromkeys((f"gpt+{key}", f"{catalog.shown_on(record, KNOWN)}+{key}"))


def pairs(count):
    deltas = [key for key, record in KNOWN.items() if record.kind == "delta"]
    draw = random.Random(0)
    return [f"gpt+{'+'.join(draw.sample(deltas, 2))}" for _ in range(count)]


@torch.no_grad()
def test_every_next_token_recipe_decodes_as_its_full_pass_or_is_refused():
    tokens, checked, refused = torch.randint(11, (2, T)), set(), set()
    for title, model in models():
        checked.add(title)
        near = {"rtol": 1e-9, "atol": 1e-9}
        if ROUNDED & set(title.split("+")):
            near = {"rtol": 0, "atol": 0.1 * float(model(tokens).std())}
        for name, given in fields().items():
            # padding stands where a token does, so that its own logits may depend on later padding
            real = given["segments"] == 0 if name in ("left", "right") else torch.ones(2, T, dtype=torch.bool)
            cuts = [1, 2, 3] if name == "nothing" else [[4, 1, 2]]
            try:
                full = model(tokens, Context(**given))
                for cut in cuts:
                    found = decoded(model, tokens, given, cut, DecodingState())
                    torch.testing.assert_close(found[real], full[real], **near)
            except UserError as error:
                refused |= REFUSED & set(title.split("+"))
                assert REFUSED & set(title.split("+")), (title, name, error)
            except AssertionError as error:
                raise AssertionError(f"{title} with {name}: {error}") from None
            else:
                assert not REFUSED & set(title.split("+")) or name == "positions", title
    assert len(checked) > 20 and refused == REFUSED, (len(checked), refused)


@torch.no_grad()
@pytest.mark.parametrize("tree", [gpt, gpt + rope], ids=["gpt", "rope"])
@pytest.mark.parametrize("state", [DecodingState, partial(PagedState, 20, 3)], ids=["plain", "pages"])
def test_any_pieces_are_the_full_pass(tree, state):
    """With every context, over every way to cut, at two layers; pages keep segments and positions too."""
    model = randomise(tree.set(LanguageModel, dim=12).set(Stack, depth=2)().build({"vocab": 11, "context": 12}))
    tokens = torch.randint(11, (2, T))
    for name, given in fields().items():
        full = model(tokens, Context(**given))
        real = given["segments"] == 0 if name in ("left", "right") else torch.ones(2, T, dtype=torch.bool)
        for cut in CUTS:
            torch.testing.assert_close(decoded(model, tokens, given, cut, state())[real], full[real])
        if name in ("left", "right"):
            alone = model(tokens[:1, real[0]])
            torch.testing.assert_close(full[:1, real[0]], alone)


@torch.no_grad()
@pytest.mark.parametrize("title", ["transformer", "transformer+rope", "transformer+flash-attention", "transformer+bpt"])
def test_a_decoder_of_sources_decodes_padded_inputs_in_pieces(title):
    """Rows of unlike lengths, padded on either side, source and inputs: in pieces as at once."""
    model = randomise(recipe(title).set(Stack, depth=1)().build({"vocab": 11, "context": 12}).eval())
    source, inputs = torch.randint(PADDING + 1, 11, (3, 6)), torch.randint(PADDING + 1, 11, (3, T))
    source[1, 4:], source[2, :2], inputs[1, :3], inputs[2, 5:] = (PADDING,) * 4
    memory, full = model.encode(source), model(source, inputs)
    for cut in CUTS:
        state = DecodingState()
        found = torch.cat([model.decode(piece, memory, source, state) for piece in inputs.split(cut, 1)], 1)
        torch.testing.assert_close(found, full)
    alone = model(source[1:2, :4], inputs[1:2])
    torch.testing.assert_close(full[1:2, 3:], alone[:, 3:])


@pytest.mark.parametrize("title", ["gpt", "gpt+rope", "gpt+alibi", "gpt+flash-attention-2"])
@pytest.mark.parametrize("choice", [{"temperature": 0}, {"temperature": 0.7}])
def test_a_padded_prompt_is_continued_as_it_is_alone(title, choice):
    """Left, right and both sides in one batch; the padding's token does not matter, and positions are counted in each
    row: a learned table has to hold the longest row alone."""
    tree = recipe(title).set(LanguageModel, dim=12).set(Stack, depth=2)
    model = randomise(tree().build({"vocab": 11, "context": 9}))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]]).bool()
    prompt = torch.randint(11, mask.shape)
    for padding in (0, 7):
        batch = prompt.masked_fill(~mask, padding)
        found = []
        hook = model.register_forward_hook(lambda _, given, out, found=found: found.append(out))
        torch.manual_seed(3)
        tokens = generate(model, batch, length=5, mask=mask, **choice)
        hook.remove()
        assert torch.equal(tokens[:, :6], batch) and tokens.shape == (4, 11)
        assert [len(out[0]) for out in found] == [6, 1, 1, 1, 1]
        for row, real in enumerate(mask):
            own = torch.cat([prompt[row, real], tokens[row, 6:]])[None]
            alone = model(own[:, :-1])[0, int(real.sum()) - 1 :]
            last = int(real.nonzero().max())
            torch.testing.assert_close(torch.stack([found[0][row, last], *(out[row, 0] for out in found[1:])]), alone)
            if choice["temperature"] == 0:
                assert torch.equal(tokens[row, 6:], alone.argmax(-1))


def test_a_mask_without_padding_changes_no_bit():
    model, prompt = (
        randomise(gpt.set(LanguageModel, dim=12)().build({"vocab": 11, "context": 9})),
        torch.ones(2, 4).long(),
    )
    draw = lambda **mask: generate(model, prompt, length=3, generator=torch.Generator().manual_seed(1), **mask)
    assert torch.equal(draw(), draw(mask=torch.ones(2, 4, dtype=torch.bool)))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(2, 4), "boolean and of the prompt's shape .2, 4., true at tokens, not float32"),
        (torch.ones(2, 3, dtype=torch.bool), "not bool .2, 3."),
        (torch.tensor([[True] * 4, [False] * 4]), "row 1 of the mask has no token"),
    ],
)
def test_a_mask_that_fits_no_prompt_is_refused(mask, words):
    with pytest.raises(UserError, match=words):
        generate(gpt.set(LanguageModel, dim=12)().build({"vocab": 11, "context": 9}), torch.ones(2, 4).long(), length=1,
                 mask=mask)  # fmt: skip


@pytest.mark.parametrize("left_out", [("segments",), ("positions",), ("segments", "positions")])
def test_a_field_given_with_one_piece_alone_is_refused(left_out):
    """Of a padded sequence: what the first piece had, the second lacks, and the other way round."""
    model = randomise((gpt + rope).set(LanguageModel, dim=12)().build({"vocab": 11, "context": 9}))
    first, second = pieces(fields()["left"], [4, 3])
    less = {name: value for name, value in second.items() if name not in left_out}
    tokens = torch.randint(11, (2, T))
    for before, after in ((first, less), ({k: first[k] for k in less}, second)):
        state = DecodingState()
        model(tokens[:, :4], Context(**before, state=state))
        with pytest.raises(UserError, match="positions and segments with every piece of a sequence, or with none"):
            model(tokens[:, 4:], Context(**after, state=state))


def test_segments_of_one_side_alone_are_refused():
    segments = torch.zeros(1, 3, dtype=torch.int64)
    for given in ({"k_segments": segments}, {"q_segments": segments}):
        with pytest.raises(UserError, match=r"only ._segments are given: give ._segments too"):
            Rules(mask=part(causal), **given)
    memory = torch.randn(1, 3, 4)
    with pytest.raises(UserError, match="memory_segments are compared with segments, and there are none"):
        Context(memory=memory, memory_segments=segments)
    for name in ("memory_segments", "memory_seen", "memory_place"):
        with pytest.raises(UserError, match=f"{name} is of a memory, and there is none"):
            Context(segments=segments, **{name: segments})


def test_a_memory_without_segments_is_seen_by_every_segment():
    cross, x, memory = (
        randomise(CrossAttention(4, heads=2)),
        torch.randn(1, 3, 4).double(),
        torch.randn(1, 2, 4).double(),
    )
    ctx = Context(memory=memory)
    whole = cross(x, ctx)
    assert torch.equal(cross(x, replace(ctx, segments=torch.tensor([[0, 0, 1]]))), whole)
    both = replace(ctx, segments=torch.tensor([[0, 0, 1]]), memory_segments=torch.tensor([[0, 1]]))
    assert not torch.allclose(cross(x, both), whole)


def mixers():
    """Parts that mix positions, each with what its context has besides: of width 4, for a stream of 4 elements."""
    attention = part(Attention, heads=2, mask=causal)
    block = gpt["model.stack.block"].set(Attention, heads=2)
    pooled = part(attention, mask=everywhere, project=part(QPooled, stride=2, widen=2))
    grid = {"grid": (2, 2)}
    yield "Attention", attention(4), {}
    yield "Split", part(Split, inner=attention)(4), {}
    yield "WithRegisters", part(WithRegisters, inner=part(Stack, depth=1, block=block))(4), {}
    yield "TokenMixing", part(TokenMixing, context=4)(4), {}
    yield "Windows", part(Windows, inner=attention, window=2)(4), grid
    yield "MaskUnits", part(MaskUnits, inner=attention, unit=2)(4), {}
    yield "PooledBlock", part(PooledBlock, mixer=pooled, stride=2, **_but_mixer(block))(4), {}
    yield "Axial", part(Axial, inner=block)(4), grid
    yield "WithinFrames", part(WithinFrames, inner=part(attention, mask=everywhere))(4), {"grid": (1, 2)}
    yield "AlongTime", part(AlongTime, inner=attention)(4), {"grid": (1, 2)}
    yield "DeformableAttention", part(DeformableAttention, heads=2, levels=1)(4), {"grids": ((2, 2),)}
    yield "Cut", part(Cut, inner=attention)(4), {}


def _but_mixer(block):
    return {"norm": LayerNorm, "residual": block["residual"], "mlp": block["mlp"]}


@torch.no_grad()
@pytest.mark.parametrize("field", ["segments", "state", "place"])
def test_a_mixer_reads_a_field_or_refuses_it(field):
    x, outcomes = torch.randn(2, 4, 4).double(), {}
    for name, mixer, given in mixers():
        if (name, field) == ("WithinFrames", "state"):
            continue  # what is inside a whole frame needs no memory
        value = {"segments": (torch.arange(4) % 2).expand(2, 4), "place": torch.randn_like(x), "state": DecodingState()}
        randomise(mixer)
        out = lambda ctx, mixer=mixer: found[0] if isinstance(found := mixer(x, ctx), tuple) else found
        plain, ctx = out(Context(**given)), Context(**given, **{field: value[field]})
        try:
            found = out(ctx)
            if field == "state":  # the second piece sees the first
                ctx.state.seen += 4
                found = out(ctx)
        except UserError as error:
            assert type(mixer).__name__ in str(error) and field in str(error), error
            outcomes[name] = "refused"
        else:
            assert not torch.allclose(found, plain), (name, field)
            outcomes[name] = "used"
    assert set(outcomes.values()) == {"used", "refused"}, outcomes
