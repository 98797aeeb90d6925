"""Cases, and the bench on which one is tried: a checkpoint with random weights and the three models made of it.

Whether a difference is a mistake or rounding is settled before the patched model is looked at: by the error of Hugging
Face's own model in the same precision, against itself in a wider one. On a CPU that is float32 against float64, on
a GPU bfloat16 against float32.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

import tepatch
from tepatch.errors import PluginError, Problem
from tepatch.hf.config import model_class
from tepatch.patch import Patch
from tepatch.planning import Plan
from tepatch.testing.results import Broken

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LONGEST = 256
"""Tokens that a row of a batch may have: more, and the comparisons would take minutes."""
SHORTEST = 24
ROOM = 8
"""Positions that a comparison uses beyond the tokens."""
CACHE_NAMES = ("cache", "past_key_values")
"""What models call their cache: the first since transformers 5.24, the second before."""


@dataclass(frozen=True)
class Case:
    """One model that a patch has to get right: a *small* config (two or three layers, 64 wide) and what it is for.

    Give it what the real models have (grouped heads, biases, ties), and a window that a few tokens fill. Raises
    ``PluginError`` when a field has a wrong form.
    """

    name: str
    """Names the case in reports and test ids."""
    config: PreTrainedConfig
    _: KW_ONLY
    auto_class: str = ""
    """An auto class of transformers that chooses the model's class, such as ``"AutoModelForMaskedLM"``. Default: the
    config's ``architectures``, else the causal LM of its type."""
    refuse: Mapping[str, Any] | Sequence[Mapping[str, Any]] = ()
    """Changes of the config that the mapping's ``requires`` must refuse: ``{"hidden_act": "tanh"}``, each field by
    itself. A dot looks into a nested field. In a list, each entry is one change, of one or several fields."""
    skip: Mapping[str, str] = field(default_factory=dict)
    """Checks that are left out, and why: reports show the reason."""
    invisible: Mapping[str, str] = field(default_factory=dict)
    """Mistakes (as the check ``mutations`` names them) that no output can show, and why: a bias of keys alone."""
    gpu: PreTrainedConfig | None = None
    """The config of the check ``gpu``, where the errors of bfloat16 have to average out (4 layers, 512 wide)."""

    def __post_init__(self) -> None:
        from transformers import PreTrainedConfig

        if not isinstance(self.name, str) or not self.name:
            _refuse(f"case {self.name!r}", "a case needs a name", expected="a text such as 'tiny'")
        for config in (self.config, self.gpu):
            if not isinstance(config, PreTrainedConfig) and (config is not None or config is self.config):
                expected = "a config of transformers, such as LlamaConfig(...)"
                _refuse(f"case '{self.name}'", "its config is none", expected=expected, found=type(config).__name__)
        for which, entries in (("skip", self.skip), ("invisible", self.invisible)):
            if not all(isinstance(reason, str) and reason for reason in entries.values()):
                _refuse(f"case '{self.name}'", f"every entry of '{which}' needs a reason", found=repr(dict(entries)))

    def refusals(self) -> list[Mapping[str, Any]]:
        """The changes in ``refuse``, one by one."""
        if isinstance(self.refuse, Mapping):
            return [{name: value} for name, value in self.refuse.items()]
        return list(self.refuse)


def changed(config: PreTrainedConfig, fields: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy of ``config`` with other values; ``"rope_parameters.rope_type"`` sets an entry of a nested field.

    Raises ``PluginError`` for a field that the config does not have, and a value that it does not take.
    """
    out = copy.deepcopy(config)
    for name, value in fields.items():
        holder: Any = out
        *parents, last = name.split(".")
        for parent in parents:
            holder = holder.get(parent) if isinstance(holder, dict) else getattr(holder, parent, None)
            if holder is None:
                _refuse(name, "the config has no such field", found=f"no '{parent}' in a {type(config).__name__}")
        if isinstance(holder, dict):
            holder[last] = value
            continue
        try:
            setattr(holder, last, value)
        except Exception as error:  # of the validator of this field
            _refuse(name, "its own class refuses this value already", found=f"{type(error).__name__}: {error}")
    return out


def rope_tables(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """The config's rope parameters by the path of their field: one, or one for each type of layer."""
    table = getattr(config.get_text_config(), "rope_parameters", None)
    prefix = "" if config.get_text_config() is config else "text_config."
    if not isinstance(table, dict):
        return {}
    if "rope_type" in table or "rope_theta" in table:
        return {f"{prefix}rope_parameters": table}
    nested = ((name, each) for name, each in table.items() if isinstance(each, dict))
    return {f"{prefix}rope_parameters.{name}": each for name, each in nested}


def window_of(config: PreTrainedConfig) -> int | None:
    """The sliding window that some layer of the model has."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    is_used = getattr(text, "use_sliding_window", True) and (kinds is None or "sliding_attention" in kinds)
    return window if window and is_used else None


class Trio(NamedTuple):
    """One checkpoint three times."""

    truth: Any
    """Hugging Face's model in the wider precision."""
    theirs: Any
    """Hugging Face's model in the precision of ours."""
    ours: Any


@dataclass(frozen=True)
class Bench:
    """What the checks of one case share. Everything is made when it is first asked for."""

    patch: Patch
    case: Case
    folder: Path
    """An empty folder for checkpoints."""
    is_gpu: bool = False
    has_truth: bool = True
    """Whether there is a model in a wider precision. Without, ours may differ from Hugging Face's by a fixed bound."""

    @property
    def device(self) -> str:
        return "cuda" if self.is_gpu else "cpu"

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """The precision of the truth, and of the two models that are measured by it."""
        return (torch.float32, torch.bfloat16) if self.is_gpu else (torch.float64, torch.float32)

    @property
    def limit(self) -> float:
        """How many times Hugging Face's own error the patched model's may be."""
        return 1.05 if self.is_gpu else 4.0

    @cached_property
    def config(self) -> Any:
        """The case's config, naming its model class."""
        import transformers

        config = copy.deepcopy(self.case.gpu if self.is_gpu and self.case.gpu is not None else self.case.config)
        if self.case.auto_class:
            auto = getattr(transformers, self.case.auto_class, None)
            models: Any = getattr(auto, "_model_mapping", {})
            if type(config) not in models:
                found = f"{self.case.auto_class} of a {type(config).__name__}"
                _refuse(f"case '{self.case.name}'", "transformers has no such model", found=found)
            found = models[type(config)]
            config.architectures = [(found[0] if isinstance(found, tuple) else found).__name__]
        config.architectures = [model_class(config).__name__]
        config.dtype = self.dtypes[1]
        return config

    @cached_property
    def stock(self) -> Any:
        """Hugging Face's model with random weights in which no two tensors are alike: in the narrower precision."""
        model: Any = model_class(self.config)(copy.deepcopy(self.config))
        randomise(model)
        for parameter in model.parameters():
            # Not .to(dtype) of the model, which would round rotary frequencies too.
            parameter.data = parameter.data.to(self.dtypes[1])
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.eos_token_id = None  # or a comparison of texts might end with the first token
        return model.eval()

    @cached_property
    def checkpoint(self) -> Path:
        """The folder to which transformers has saved ``stock``."""
        folder = self.folder / "checkpoint"
        self.stock.save_pretrained(folder)
        return folder

    @cached_property
    def plan(self) -> Plan:
        return tepatch.plan(self.patch, self.checkpoint, dtype=self.dtypes[1], backend=self.backend)

    @property
    def backend(self) -> Any:
        return "te" if self.is_gpu else "reference"

    @cached_property
    def models(self) -> Trio:
        stock = self.stock.to(self.device)
        if not self.has_truth:
            return Trio(stock, stock, self.load())
        truth = copy.deepcopy(stock).to(self.dtypes[0])
        # torch's grouped product of experts has no float64.
        truth.set_experts_implementation("eager")
        return Trio(truth, stock, self.load())

    def load(self, folder: Path | None = None, **arguments: Any) -> Any:
        """The patched model."""
        arguments = {"dtype": self.dtypes[1], "backend": self.backend, "progress": False, "prove": False, **arguments}
        model: Any = tepatch.load(self.patch, folder or self.checkpoint, **arguments)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.eos_token_id = None
        return model

    @cached_property
    def length(self) -> int:
        """Tokens of a row: longer than any window, and than the length at which rope changes its frequencies."""
        text = self.config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None) or LONGEST
        wanted = {"192 tokens on a GPU": 192} if self.is_gpu else {"a few": SHORTEST}
        if (window := window_of(self.config)) is not None:
            wanted["sliding_window"] = 3 * window + ROOM
        for path, rope in rope_tables(self.config).items():
            if rope.get("rope_type") in ("dynamic", "longrope"):
                original = rope.get("original_max_position_embeddings") or limit
                wanted[f"the original length of {path}"] = int(original) + ROOM
        if not rope_tables(self.config):  # positions have a table of their own, and it ends
            return int(min(max(wanted.values()), limit - ROOM))
        reason, length = max(wanted.items(), key=lambda item: item[1])
        if length > LONGEST:
            _refuse(
                f"case '{self.case.name}'",
                f"{reason} is so large that {length} tokens would be needed to pass it",
                expected=f"at most {LONGEST} tokens",
                fix="give the case's config a smaller value: what is compared does not depend on it",
            )
        return length

    def tokens(self, batch: int = 4, length: int = 0, *, seed: int = 1) -> Tensor:
        """Random tokens, none of them the padding token: int64 [batch, length]."""
        generator = torch.Generator().manual_seed(seed)
        size = (batch, length or self.length)
        ids = torch.randint(3, self.config.get_text_config().vocab_size, size, generator=generator)
        if self.padding is not None:
            ids[ids == self.padding] = 2 if self.padding != 2 else 3
        return ids.to(self.device)

    @property
    def padding(self) -> int | None:
        """The padding token."""
        token: int | None = getattr(self.config.get_text_config(), "pad_token_id", None)
        return token

    def mask(self, side: str) -> Tensor:
        """Which tokens are real, bool [4, length]: rows of several lengths, with the padding on ``side``."""
        lengths = [self.length, self.length * 2 // 3, self.length // 3, 1]
        place = torch.arange(self.length)
        if side == "left":
            place = place.flip(0)
        return torch.stack([place < length for length in lengths]).to(self.device)

    def padded(self, side: str) -> tuple[Tensor, Tensor]:
        """Tokens, and which of them are real: int64 and bool, both [4, length]."""
        mask = self.mask(side)
        return self.tokens().masked_fill(~mask, self.padding or 0), mask

    def accepts(self, argument: str) -> bool:
        """Whether the model's ``forward`` has an argument of this name."""
        return argument in inspect.signature(type(self.stock).forward).parameters

    @cached_property
    def cache_argument(self) -> str | None:
        """The name under which the model takes the cache that it makes; None if it makes none.

        Raises ``Broken`` for a model that takes its cache under no name that is known here: what is not asked for by
        its right name would look like a model without a cache, and everything about caches would be left out.
        """
        from transformers import Cache

        asked = {"use_cache": True} if self.accepts("use_cache") else {}
        with torch.no_grad():
            out = self.stock(self.tokens(1, 4), **asked)
        held = [name for name, value in out.items() if isinstance(value, Cache)]
        if not held:
            return None
        name = cache_name(type(self.stock).forward)
        if name is None or name not in held:
            raise Broken(f"the model gives a cache as {held[0]}, and the kit knows {' and '.join(CACHE_NAMES)}")
        return name

    @property
    def has_cache(self) -> bool:
        """Whether the model keeps keys and values."""
        return self.cache_argument is not None

    @property
    def without_cache(self) -> dict[str, Any]:
        """What to call the model with so that it makes no cache."""
        return {"use_cache": False} if self.has_cache else {}


def cache_name(forward: Callable[..., Any]) -> str | None:
    """The name that a model's ``forward`` has for the cache, in this version of transformers; None if it takes none."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def randomise(model: Any) -> None:
    """Random weights in which no two tensors are alike: not norms and biases either, so that a swap of any shows.

    What Hugging Face initialises with ones stays near one. Matrices keep the size of what goes through them.
    """
    generator = torch.Generator().manual_seed(0)
    stored = model.state_dict(keep_vars=True)
    own = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in stored}
    with torch.no_grad():
        for tensor in own.values():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1:
                tensor.copy_(noise * 0.8 / tensor.shape[-1] ** 0.5)
            else:
                tensor.copy_(noise * 0.1 + bool((tensor == 1).all()))


def traits(config: PreTrainedConfig) -> list[str]:
    """What a case covers, in a few words each, as far as the usual fields of a config tell."""
    text: Any = config.get_text_config()
    out = []
    heads, shared = getattr(text, "num_attention_heads", None), getattr(text, "num_key_value_heads", None)
    if shared and shared != heads:
        out.append("MQA" if shared == 1 else "GQA")
    elif heads:
        out.append("MHA")
    out += [f"rope {rope['rope_type']}" for rope in rope_tables(config).values() if "rope_type" in rope]
    if window_of(config):
        out.append("windows")
    if getattr(text, "attention_bias", False) or getattr(text, "mlp_bias", False):
        out.append("biases")
    if getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None):
        out.append("experts")
    if getattr(text, "tie_word_embeddings", False):
        out.append("tied embeddings")
    return list(dict.fromkeys(out))


def named(cases: Mapping[str, PreTrainedConfig] | Sequence[Case]) -> list[Case]:
    """Cases, from what people pass. Raises ``PluginError`` if there are none, or two of one name."""
    if isinstance(cases, Mapping):
        cases = [Case(name, config) for name, config in cases.items()]
    out = list(cases)
    if not out or not all(isinstance(case, Case) for case in out):
        _refuse("cases", "no cases to check", expected="Case('tiny', config), ... or {'tiny': config}")
    names = [case.name for case in out]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        _refuse(f"case '{twice[0]}'", "two cases have this name", fix="give each a name of its own")
    return out


def layers_of(names: Mapping[str, Any], pattern: Any) -> Iterator[tuple[int, ...]]:
    """The numbers that stand for the captures in those of ``names`` that ``pattern`` matches."""
    for name in names:
        if match := pattern.match(name):
            yield tuple(int(number) for number in match.groups())


def _refuse(where: str, what: str, *, expected: str = "", found: str = "", fix: str = "") -> NoReturn:
    raise PluginError(Problem(where=where, what=what, expected=expected, found=found, fix=fix))
