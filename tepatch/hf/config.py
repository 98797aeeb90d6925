"""Reading a model's config, and showing its fields to a mapping."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tepatch.checkpoint import TensorInfo
from tepatch.checkpoint.containment import name_fault
from tepatch.errors import CheckpointError, PlanError, Problem, TepatchError, visible
from tepatch.hf.texts import read_config_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

AutoClass = str | type | None
"""One of transformers' auto classes, a model class, or the name of either; None for the checkpoint's own."""


def read_config(folder: Path, tensors: Mapping[str, TensorInfo] | None = None) -> PreTrainedConfig:
    """The config in ``folder/config.json``, of a checkpoint with these ``tensors``.

    Raises ``CheckpointError`` if there is none that can be read, or one that can not be of these tensors.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            Problem(
                where=str(folder),
                what="there is no config.json beside the weights",
                fix="pass config=..., or point to the folder that holds the whole checkpoint",
            )
        )
    stated = read_config_text(folder, path.name, tensors)
    for name in stated.get("configuration_files") or ():  # of these, transformers reads the one for its version
        if name != path.name and (fault := name_fault(name)):
            what = f"the file name of a config is refused: {fault}"
            raise CheckpointError(Problem(where=f"{path}: configuration_files", what=what, found=ascii(name)))
        if os.path.lexists(folder / name):
            read_config_text(folder, name, tensors)
    with blamed(str(path), "transformers can not read this config"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _follow_type(config, stated.get("model_type"))
    return config


@contextmanager
def blamed(where: str, what: str) -> Iterator[None]:
    """Inside, whatever transformers raises about what a config holds is a ``CheckpointError``.

    It and its validators raise errors of many unrelated types. The error's own text may hold anything that the config
    does: what a terminal would obey is not handed on.
    """
    try:
        yield
    except TepatchError:
        raise
    except (Exception, RecursionError) as error:
        cause = error if visible(str(error)) == str(error) else None
        raise CheckpointError(Problem(where=where, what=what, details=told(error))) from cause


@contextmanager
def code_refused() -> Iterator[None]:
    """Inside, transformers raises an error where it would ask on the terminal whether it may run a checkpoint's code.

    ``trust_remote_code=False`` alone does not answer every question: AutoTokenizer does not hand it on, and a model
    that is made of others calls ``AutoModel.from_config(config.vision_config)`` without it.
    """
    from transformers import dynamic_module_utils

    if threading.current_thread() is not threading.main_thread():  # it asks in the main thread only, by a signal
        yield
        return
    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # how long it waits for an answer: with none it refuses at once
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


def asks_to_run_code(error: BaseException) -> bool:
    """Whether transformers has refused to run code of a checkpoint."""
    return isinstance(error, ValueError) and "trust_remote_code=True" in str(error)


def _follow_type(config: PreTrainedConfig, stated: str | None) -> None:
    """Where transformers takes a config for one of another type, name the architectures as that type does.

    It reads a Mistral with ``layer_types`` as Ministral, whose models its auto classes then build, and leaves
    ``architectures`` as the file has it.
    """
    from transformers.models.auto import modeling_auto

    if stated is None or stated == config.model_type or not config.architectures:
        return
    tables = [table for name, table in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    classes = {table[stated]: table[config.model_type] for table in tables if {stated, config.model_type} <= set(table)}
    config.architectures = [classes.get(name, name) for name in config.architectures]


def model_class(config: PreTrainedConfig, auto_class: AutoClass = None, *, stated: str = "") -> type[PreTrainedModel]:
    """The class that Hugging Face would build: what ``auto_class`` has for this config, if there is one.

    Else it is the class ``stated`` beside the weights, else the config's own architecture, else the causal LM of its
    type (of an encoder: the masked LM).
    ``auto_class`` is one of transformers' auto classes, a model class, or the name of either. Raises ``PlanError`` if
    transformers has no such class.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    if auto_class is not None:
        return _asked_for(auto_class, config)
    for name in (stated, *(config.architectures or ())):
        cls = getattr(transformers, str(name), None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            if not isinstance(config, cls.config_class or ()):
                raise PlanError(
                    Problem(
                        where="config.json",
                        what="'architectures' and 'model_type' contradict each other",
                        found=f"architectures = {config.architectures}, model_type = '{config.model_type}'",
                        fix="correct config.json",
                    )
                )
            return cls
    kinds: list[Any] = [AutoModelForCausalLM, AutoModelForMaskedLM]
    if getattr(config, "is_decoder", None) is False:  # an encoder that could be a decoder, and is asked not to be
        kinds.reverse()
    for kind in kinds:
        if type(config) in kind._model_mapping:
            return cast("type[PreTrainedModel]", kind._model_mapping[type(config)])
    raise PlanError(
        Problem(
            where="config.json",
            what=f"transformers has no model for model_type '{config.model_type}'",
            found=f"architectures = {config.architectures}",
            fix="install a transformers that knows it, or say which class: auto_class='AutoModel...'",
        )
    )


def unknown_architectures(config: PreTrainedConfig, cls: type[PreTrainedModel]) -> list[str]:
    """What to tell where ``cls`` was taken because none of the config's ``architectures`` is transformers'."""
    import transformers

    named = config.architectures or ()
    if not named or cls.__name__ in named or any(hasattr(transformers, str(name)) for name in named):
        return []
    names = ", ".join(map(str, named))
    return [f"config.json names {names}, which transformers does not have: {cls.__name__} was taken"]


def _asked_for(auto_class: str | type, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The model class that a caller's ``auto_class`` stands for."""
    import transformers

    asked = getattr(transformers, auto_class, None) if isinstance(auto_class, str) else auto_class
    name = auto_class if isinstance(auto_class, str) else getattr(auto_class, "__name__", repr(auto_class))
    if isinstance(asked, type) and issubclass(asked, transformers.PreTrainedModel):
        if isinstance(config, asked.config_class or ()):
            return asked
        raise PlanError(
            Problem(
                where="auto_class",
                what=f"{name} is not a class for this config",
                expected=getattr(asked.config_class, "__name__", "a class with a config of its own"),
                found=type(config).__name__,
            )
        )
    classes = getattr(asked, "_model_mapping", None)
    if classes is None:
        raise PlanError(
            Problem(
                where="auto_class",
                what="not a class that models are made by",
                expected="'AutoModelForSequenceClassification' or another auto class of transformers, or a model class",
                found=repr(auto_class),
            )
        )
    if type(config) not in classes:
        raise PlanError(
            Problem(
                where="auto_class",
                what=f"{name} has no model for model_type '{config.model_type}'",
                fix="choose another class, or leave auto_class out to read config.architectures",
            )
        )
    found = classes[type(config)]
    choices: Sequence[type[PreTrainedModel]] = found if isinstance(found, list | tuple) else (found,)
    named = config.architectures or ()
    return next((cls for cls in choices if cls.__name__ in named), choices[0])


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the language model inside a model that wraps one; ``config`` itself if it is no such model's."""
    try:
        found: PreTrainedConfig = config.get_text_config()
    except ValueError:  # several: then none of them is the language model
        return config
    except AttributeError:  # a part that is no config
        found = None  # type: ignore[assignment]
    if not hasattr(found, "model_type"):
        what = "the config of the language model inside is none"
        raise CheckpointError(Problem(where="config.json", what=what, fix="correct config.json"))
    return found


class ConfigFields(Mapping[str, Any]):
    """A config's fields by name, as a mapping's expressions read them (aliases of a config count too)."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config

    def __getitem__(self, name: str) -> Any:
        if name.startswith("_"):
            raise KeyError(name)
        try:
            value = getattr(self._config, name)
        except Exception:  # a property that can not be computed from the other fields is not there
            raise KeyError(name) from None
        if callable(value):
            raise KeyError(name)
        # A composite model's config holds others: text_config.hidden_size looks into one.
        return ConfigFields(value) if hasattr(value, "model_type") else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._config.to_dict())

    def __len__(self) -> int:
        return len(self._config.to_dict())


def told(error: BaseException) -> tuple[str, ...]:
    """What an error of another library says, in a few lines."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return (f"{type(error).__name__}: {lines[0] if lines else ''}", *lines[1:4])
