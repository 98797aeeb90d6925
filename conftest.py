"""What all tests share: checkpoints, and the reason why a test for the GPU is skipped."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tepatch.te import probe

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may wait for a network
os.environ["TEPATCH_PROVE"] = "0"  # patches of tests are of no plugin, and each would be proven at every load
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: there is a worker for each core

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
"""A Llama that a laptop runs in milliseconds, with grouped heads and layers enough to be confused."""


@pytest.fixture(scope="session")
def smollm2(pytestconfig: pytest.Config) -> Path:
    """The folder of a real checkpoint: SmolLM2-135M-Instruct, bfloat16, several shards, tied embeddings."""
    checkpoint = pytestconfig.rootpath / ".demo" / "SmolLM2-135M-Instruct"
    if not checkpoint.is_dir():
        pytest.skip("needs the real checkpoint: run make demo first")
    return checkpoint


@pytest.fixture
def tiny_llama() -> Callable[..., Any]:
    """Makes a stock ``LlamaForCausalLM`` with random weights in which no two tensors are alike.

    ``tiny_llama(dtype=torch.float32, seed=0, **config)``; also norms and biases are random, so that a swap or
    a loss of any tensor shows.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(*, dtype: Any = torch.float32, seed: int = 0, **config: Any) -> Any:
        generator = torch.Generator().manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**TINY, **config}))
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.1 + (1 if parameter.dim() == 1 else 0))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)  # .to(dtype) would round the rotary frequencies too
        model.config.dtype = dtype
        return model.eval()

    return make


@pytest.fixture
def save_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model as a checkpoint folder and returns it.

    ``save_checkpoint(model, shards=1, kind="safetensors", variant="", drop=(), place=None)``: ``place`` says
    which shard (from 0) a tensor goes to; by default tensors are dealt out in turn, so that q, k and v, or gate
    and up, are in different files.
    """
    import torch
    from safetensors.torch import save_file

    def write(
        model: Any,
        *,
        shards: int = 1,
        kind: str = "safetensors",
        variant: str = "",
        drop: tuple[str, ...] = (),
        place: Callable[[str], int] | None = None,
        name: str = "checkpoint",
        extra: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
        tensors = {k: v.contiguous() for k, v in model.state_dict().items() if k not in tied and k not in drop}
        tensors |= extra or {}
        groups: list[dict[str, Any]] = [{} for _ in range(shards)]
        for index, (key, tensor) in enumerate(tensors.items()):
            groups[place(key) if place else index % shards][key] = tensor
        stem = "model" if kind == "safetensors" else "pytorch_model"
        dot = f".{variant}" if variant else ""
        weight_map = {}
        for index, group in enumerate(groups):
            part = f"-{index + 1:05}-of-{shards:05}" if shards > 1 else ""
            file = f"{stem}{part}{dot}.{kind}" if shards > 1 else f"{stem}{dot}.{kind}"
            weight_map |= dict.fromkeys(group, file)
            if kind == "safetensors":
                save_file(group, folder / file, metadata={"format": "pt"})
            else:
                torch.save(group, folder / file)
        if shards > 1:
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            index_json = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (folder / f"{stem}.{kind}.index{dot}.json").write_text(json.dumps(index_json))
        return folder

    return write


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tepatch")
    group.addoption("--first-case", action="store_true", help="run only the first case of each conformance kit")
    what = "end at once if another version of a package is imported"
    group.addoption("--expect", action="append", default=[], metavar="NAME==VERSION", help=what)


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # which ignores interrupts, and so would all processes that tests start
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for expected in config.getoption("--expect"):
        name, _, version = expected.partition("==")
        module = importlib.import_module(name)
        if module.__version__ != version:
            raise pytest.UsageError(f"expected {expected}, and {module.__file__} is {module.__version__}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips tests marked ``gpu`` where Transformer Engine cannot be used, and says why in the summary."""
    if config.getoption("--first-case"):
        dropped = _of_later_cases(items)
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return  # the probe imports torch
    status = probe()
    for item in gpu_items if not status.usable else []:
        item.add_marker(pytest.mark.skip(reason=f"needs a GPU with Transformer Engine: {status.reason}"))


def _of_later_cases(items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests of the conformance kit that are not of the first case of their family."""
    if "tepatch.testing" not in sys.modules:
        return []  # it imports torch
    from tepatch.testing import Case

    first: dict[Any, Case] = {}
    dropped = []
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if isinstance(case, Case) and first.setdefault(item.function, case) is not case:
            dropped.append(item)
    return dropped
