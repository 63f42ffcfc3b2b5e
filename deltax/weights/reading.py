"""Foreign state dicts and configs are read whole: a key or a field that a map does not read is refused by name.

A map declares the names that it reads, and the values of a config under which its model computes the same. In a name,
`#` is a number and `{a,b}` one of several words.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from deltax.errors import UserError, nearest

State = dict[str, Tensor]
Map = TypeVar("Map", bound=Callable[..., Any])

# Fields of a config that change no output in evaluation: names, return types, starts, dropout, losses, special tokens.
_FREE = """_name_or_path architectures auto_map chunk_size_feed_forward dtype torch_dtype id2label label2id num_labels
    is_encoder_decoder model_type output_attentions output_hidden_states output_auxiliary_logits problem_type
    return_dict transformers_version use_cache bos_token_id eos_token_id pad_token_id task_specific_params
    stage_names out_features out_indices auxiliary_loss use_auxiliary_loss"""
_TRAINING = (
    r".*(dropout|pdrop|drop_rate|dropout_prob|layerdrop|_cost|_weight|_coefficient)|init(ializer)?_\w+|drop_path_rate"
)


@dataclass(frozen=True)
class Fields:
    """What a map knows of a config.

    values  field -> the values under which its model computes the same; for a config in a config, its own `Fields`
    sizes   fields that the shapes of the weights show, or that the model's recipe is given, in one string
    """

    values: Mapping[str, "tuple[Any, ...] | Fields"] = field(default_factory=dict)
    sizes: str = ""

    def check(self, config: Any, of: str) -> None:
        """Raise UserError for a value that the model does not compute, a field that is lacking, and an unknown one."""
        given = dict(config if isinstance(config, Mapping) else config.to_dict())
        for name, allowed in self.values.items():
            if name not in given:
                raise UserError(
                    f"the config of {of} lacks {name}{nearest(name, given)}; load it by the config class of its library"
                )
            value = given.pop(name)
            if isinstance(allowed, Fields):
                allowed.check(value, f"{of}'s {name}")
            elif (list(value) if isinstance(value, tuple) else value) not in allowed:
                raise UserError(
                    f"{of} with {name}={value!r} is not computed here: the map knows "
                    f"{' or '.join(map(repr, allowed))} alone; convert a model with that value"
                )
        known = {*self.sizes.split(), *_FREE.split()}
        for name, value in given.items():
            if name not in known and not re.fullmatch(_TRAINING, name):
                raise UserError(
                    f"no map reads the field {name}={value!r} of {of}'s config{nearest(name, [*self.values, *known])}; "
                    "leave it out if it changes no output"
                )


# A block of two branches with layer norms and biases, under our names.
OUR_BLOCK = (
    "stack.blocks.#.{mixer_residual,mlp_residual}.norm.{gain,bias}",
    "stack.blocks.#.{mixer.project.query,mixer.project.key,mixer.project.value,mixer.project.out}.{weight,bias}",
    "stack.blocks.#.{mlp.up,mlp.down}.{weight,bias}",
)


def reads(of: str, *names: str, left_out: Iterable[str] = (), prefix: str = "", config: Fields | None = None) -> Any:
    """Declare what a map reads of the state dict that it is given first; any other key is refused by name.

    So does a map of ours to another library's: what the other model has no place for is not left behind silently.

    of        the class whose state it is
    left_out  names that the map leaves out: derived buffers, and what stands behind or beside the part that it maps
    prefix    what each name may begin with
    config    what the map knows of a config: it then takes `config=`, a config or a mapping, and checks it
    """
    wanted, unused = _pattern(names), _pattern(left_out)

    def declare(convert: Map) -> Map:
        @functools.wraps(convert)
        def checked(state: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            if config is not None and (given := kwargs.pop("config", None)) is not None:
                config.check(given, of)
            kept = _Read()
            for key, value in state.items():
                name = key.removeprefix(prefix)
                if unused.fullmatch(name):
                    continue
                if name in kept:
                    raise UserError(
                        f"the state of {of} has {name!r} twice, once as {prefix + name!r}: give one of them"
                    )
                if not wanted.fullmatch(name):
                    raise UserError(
                        f"no map reads {key!r} of the state of {of}{nearest(name, _plain(names))}: leave it out if the "
                        "model does not need it"
                    )
                kept[name] = value
            try:
                ours = convert(kept, *args, **kwargs)
            except KeyError as error:
                raise UserError(f"the state of {of} lacks {error.args[0]!r}: give the whole state dict") from error
            if unread := sorted(kept.keys() - kept.names):
                raise UserError(
                    f"no map reads {unread[0]!r} of the state of {of}, which has nothing that leads to it: is a block "
                    "before it missing?"
                )
            return ours

        checked.reads = config or Fields()  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    return declare


class _Read(State):
    """A state dict with the names of the values that were read; a walk over it reads all."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        self.names.add(name)
        return super().pop(name, *default)

    def __iter__(self) -> Any:  # a copy, dict(state), goes this way
        self.names.update(super().keys())
        return super().__iter__()

    def items(self) -> Any:
        self.names.update(super().keys())
        return super().items()


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    """One pattern of all names, each separated by blanks."""
    words = [word for name in names for word in name.split()]
    escaped = (re.escape(word).replace(r"\#", r"\d+").replace(r"\{", "(?:").replace(r"\}", ")") for word in words)
    return re.compile("|".join(each.replace(",", "|") for each in escaped) or r"(?!)")


def _plain(names: Iterable[str]) -> list[str]:
    """Names without alternatives, for a suggestion."""
    return [word for name in names for word in name.split() if not set(word) & set("#{")]
