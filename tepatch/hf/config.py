"""Reading a model's config, and showing its fields to a mapping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            Problem(where=str(path), what="transformers can not read this config", found=_first_line(error))
        ) from error
    return config


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that Hugging Face would build: the config's own architecture, else the causal LM of its type.

    Raises ``PlanError`` if transformers has no such class.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    for name in config.architectures or ():
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
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


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
