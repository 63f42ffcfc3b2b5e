"""A model beside a frozen copy of what it started as."""

from typing import Any

from torch import Tensor, nn

from deltax.contract import TOKENS_TO_LOGITS, needs
from deltax.recipe import Part
from deltax.shapes import Logits, Tokens


@needs(model=TOKENS_TO_LOGITS)
class Referenced(nn.Module):
    """The inner model, and as `reference` the same model as it was when the run began, which never learns.

    Tokens (B, T) -> logits (B, T, V), the inner model's. Both are in the state, so a resumed run has the same
    reference; the state of a plain model, loaded to start from, becomes both.
    """

    def __init__(self, vocab: int, context: int, *, inner: Part):
        super().__init__()
        self.policy, self.reference = (inner(vocab=vocab, context=context) for _ in range(2))
        self.reference.requires_grad_(False)
        self.register_load_state_dict_pre_hook(_begin_from_plain)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.reference.load_state_dict(self.policy.state_dict())

    def forward(self, tokens: Tokens, *ctx: Any) -> Logits:
        return self.policy(tokens, *ctx)


def _begin_from_plain(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    ours = [key for key in state if key.startswith(prefix)]
    if not any(key.startswith(f"{prefix}policy.") for key in ours):
        for key in ours:
            value, rest = state.pop(key), key.removeprefix(prefix)
            state[f"{prefix}policy.{rest}"] = state[f"{prefix}reference.{rest}"] = value
