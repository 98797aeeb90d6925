"""Reading a model's config, and showing its fields to a mapping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tepatch.checkpoint.containment import file_inside
from tepatch.errors import CheckpointError, PlanError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def read_config(folder: Path) -> PreTrainedConfig:
    """The config in ``folder/config.json``. Raises ``CheckpointError`` if there is none that can be read."""
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
    file_inside(folder, path.name)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and its validators raise errors of many unrelated types
        raise CheckpointError(
            Problem(where=str(path), what="transformers can not read this config", details=told(error))
        ) from error
    return config


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that Hugging Face would build: the config's own architecture, else the causal LM of its type.

    Raises ``PlanError`` if transformers has no such class.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    for name in config.architectures or ():
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
    try:
        return cast("type[PreTrainedModel]", AutoModelForCausalLM._model_mapping[type(config)])
    except KeyError:
        raise PlanError(
            Problem(
                where="config.json",
                what=f"transformers has no model for model_type '{config.model_type}'",
                found=f"architectures = {config.architectures}",
                fix="install a transformers that knows it",
            )
        ) from None


class ConfigFields(Mapping[str, Any]):
    """A config's fields by name, as a mapping's expressions read them (aliases of a config count too)."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config

    def __getitem__(self, name: str) -> Any:
        if name.startswith("_"):
            raise KeyError(name)
        try:
            value = getattr(self._config, name)
        except AttributeError:
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
