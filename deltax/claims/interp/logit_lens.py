"""Claims of logit-lens: the paper's equations, parity with peers, and what it measures."""

import torch
from torch import Tensor, nn

from deltax import claim
from deltax.papers.interp.logit_lens import distance_to_last, logit_lens, picture
from deltax.papers.language.models.gpt import gpt
from deltax.parts.model.language_model import LanguageModel


@claim
def at_the_last_layer_it_is_the_model():
    """After the last block the lens gives the model's own log-probabilities, to the bit, and leaves no hook behind."""
    model, tokens = _tiny()
    lens = logit_lens(model, tokens)
    assert lens.shape == (4, *tokens.shape, 11)
    assert torch.equal(lens[-1], torch.log_softmax(model(tokens), -1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@claim
def a_block_that_adds_nothing_changes_no_guess():
    """With the last two branches silenced the last two readings agree to the bit; a block that writes changes them."""
    model, tokens = _tiny()
    last = model.stack.blocks[-1]
    with torch.no_grad():
        for out in (last.mixer.project.out, last.mlp.down):
            out.weight.zero_(), out.bias.zero_()
    lens = logit_lens(model, tokens)
    assert torch.equal(lens[-1], lens[-2]) and not torch.allclose(lens[-2], lens[-3])
    distance = distance_to_last(lens)
    assert not distance[-2:].any() and (distance[:-2] > 0).all()


@claim.parity(peer="transformers GPT2LMHeadModel and LlamaForCausalLM (output_hidden_states)")
def equals_transformers():
    """The lens reads what last norm and head make of transformers' hidden states, in their models and in ours."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from deltax.weights.language.models.gpt import to_hf

    ours, tokens = _tiny()
    sizes = {"vocab_size": 11, "bos_token_id": None, "eos_token_id": None}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=9, n_embd=12, n_layer=3, n_head=3)).double().eval()
    theirs.load_state_dict(to_hf(ours.state_dict()))
    llama = LlamaForCausalLM(
        LlamaConfig(**sizes, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3)
    ).double()
    for parameter in llama.parameters():
        nn.init.normal_(parameter, std=0.5)
    for model, norm in ((theirs, theirs.transformer.ln_f), (llama, llama.model.norm)):
        *states, last = model(tokens, output_hidden_states=True).hidden_states  # the last one is normed already
        expected = torch.log_softmax(model.lm_head(torch.stack([*map(norm, states), last])), -1)
        torch.testing.assert_close(logit_lens(model, tokens), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logit_lens(ours, tokens), logit_lens(theirs, tokens), rtol=1e-10, atol=1e-10)


@claim.measured(paper="in GPT-2 the guesses converge on the last one layer by layer (figures of the post)")
def guesses_converge_layer_by_layer(lab):
    """In a trained gpt of 6 blocks each block brings the reading nearer to the last: KL to it falls at every layer."""
    recipe = lab.recipe("gpt").put("model.dim", 48).put("model.stack.depth", 6)
    falls, curves = [], []
    for seed in lab.seeds(3):
        run = lab.train(recipe, seed=seed, steps=200)
        batch = next(iter(run.task.held_out_batches(16)))
        with torch.no_grad():
            lens = logit_lens(run.model, batch.inputs)
        curves.append(distance_to_last(lens)[:, batch.targets >= 0].mean(1).tolist())
        falls.append(min(a - b for a, b in zip(curves[-1], curves[-1][1:], strict=False)))
    shown = picture(lens[:, :1, :24], batch.inputs[:1, :24], run.task.decode)
    caption = "What each block would say next, first 24 bytes of held-out text, last seed"
    numbers = {"nats to the last layer, by layer, for each seed": curves}
    drawn = {caption: lab.figure(shown)}
    return lab.at_least(falls, 0.0, unit="nats at the least fall", numbers=numbers, figures=drawn)


def _tiny() -> tuple[LanguageModel, Tensor]:
    torch.manual_seed(0)
    recipe = gpt.put("model.dim", 12).put("model.stack.depth", 3)
    model = recipe().build({"vocab": 11, "context": 9}).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model, torch.randint(11, (2, 9))
