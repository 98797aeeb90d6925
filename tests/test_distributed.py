"""A patched model under DDP, FSDP1 and FSDP2: two processes over gloo train and save what one process does.

All scenarios of ``ranks.py`` run once, in one pair of processes; each test looks at what they wrote. Losses, and what
training has changed, are compared as sums in another order, checkpoints bit for bit.
"""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rounding import assert_close, gradient_terms
from safetensors.torch import load_file

import tepatch
from tepatch.hf.state import patched_names

RANKS = Path(__file__).with_name("ranks.py")
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 97,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "vocab_size": 129,
    "max_position_embeddings": 64,
}
"""No first dimension of an MLP's or an embedding's parameter is divided by two."""


@dataclass
class Run:
    """What two processes found, and what one process finds."""

    folder: Path
    losses: torch.Tensor
    model: Any
    """Trained by one process, on all rows."""

    def __getitem__(self, scenario: str) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(self.folder / f"{scenario}.pt", weights_only=True)
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("distributed")
    torch.manual_seed(0)
    for name, tied in (("checkpoint", False), ("tied", True)):
        LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied)).save_pretrained(folder / name)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(rank), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(2)
    ]
    try:
        texts = [rank.communicate(timeout=120)[0].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(texts)
    single = tepatch.load("llama", folder / "checkpoint", backend="reference").train()
    losses = _ranks().train(single, _ranks().batch())
    return Run(folder=folder, losses=losses, model=single)


def _ranks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ranks", RANKS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def own_state(model: Any) -> dict[str, torch.Tensor]:
    with patched_names():
        return dict(model.state_dict())


def assert_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def assert_trained_alike(
    losses: torch.Tensor, state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], run: Run
) -> None:
    """The same losses, and the same changes of each tensor, by far more than rounding."""
    batch, steps = _ranks().batch(), _ranks().STEPS
    terms = steps * gradient_terms(run.model.config, batch.shape[1], batch.numel())
    assert_close(losses, run.losses, terms=terms, name="losses")
    start = tepatch.load("llama", run.folder / "checkpoint", backend="reference")
    before = own_state(start) if state.keys() == own_state(start).keys() else dict(start.state_dict())
    assert state.keys() == expected.keys() == before.keys()
    for name, tensor in before.items():
        change = expected[name] - tensor
        assert change.abs().max() > 1e-4, f"{name}: training has moved it"
        # A step goes g / (g + eps) of the learning rate, and gradients are up to three times as large as this epsilon.
        assert_close(state[name] - tensor, change, terms=terms, condition=1 + 3, name=name)


def translated(run: Run, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Full tensors under the parameters' own names, as a model that holds them gives them."""
    model = copy.deepcopy(run.model)
    model.load_state_dict(own)
    return dict(model.state_dict())


def test_one_process_trains_as_hugging_face_does(run: Run) -> None:
    from transformers import LlamaForCausalLM

    stock = LlamaForCausalLM.from_pretrained(run.folder / "checkpoint").train()
    losses = _ranks().train(stock, _ranks().batch())
    assert_trained_alike(losses, dict(stock.state_dict()), dict(run.model.state_dict()), run)


@pytest.mark.parametrize("scenario", ["ddp", "fsdp2", "fsdp1", "fsdp1 flat"])
def test_two_processes_train_as_one_does(scenario: str, run: Run) -> None:
    found = run[scenario]
    assert_trained_alike(found["losses"], found.get("own", found.get("full")), own_state(run.model), run)


def test_ddp_saves_an_ordinary_checkpoint(run: Run) -> None:
    found = run["ddp"]
    assert_bits(load_file(run.folder / "ddp" / "model.safetensors"), found["state"])
    assert_bits(translated(run, found["own"]), found["state"])


def test_sharded_parameters_have_their_own_names_in_a_state_dict(run: Run) -> None:
    assert run["fsdp2"]["names"] == list(own_state(run.model))


def test_a_sharded_model_says_how_it_is_saved(run: Run) -> None:
    refusal = run["fsdp2"]["refusal"]
    assert "model.layers.{0..1}.mlp.fc1_weight" in refusal, refusal
    assert "DTensor [194, 64]" in refusal
    assert "get_model_state_dict" in refusal
    assert not (run.folder / "never-written").exists()


@pytest.mark.parametrize("how", ["fsdp2-checkpoint", "fsdp2-accelerate-checkpoint"])
def test_fsdp2_is_saved_as_an_ordinary_checkpoint_bit_for_bit(how: str, run: Run) -> None:
    assert_bits(load_file(run.folder / how / "model.safetensors"), translated(run, run["fsdp2"]["full"]))


def test_fsdp2_with_tied_embeddings_is_saved_as_an_ordinary_checkpoint(run: Run) -> None:
    from transformers import LlamaForCausalLM

    full = run["fsdp2 tied"]["full"]
    for how in ("fsdp2-tied", "fsdp2-accelerate-tied"):
        stock, told = LlamaForCausalLM.from_pretrained(run.folder / how, output_loading_info=True)
        assert not any(told.values()), told
        model = tepatch.load("llama", run.folder / how, backend="reference")
        assert_bits(own_state(model), full | {"lm_head.weight": full["model.embed_tokens.weight"]})
        assert_bits(dict(model.state_dict()), dict(stock.state_dict()))


def test_sharded_checkpoints_come_back(run: Run) -> None:
    found = run["fsdp2 checkpoints"]
    assert_bits(found["by dcp"], found["full"])
    assert_bits(found["by names"], found["full"])
    assert_bits(found["full"], run["fsdp2"]["full"])


@pytest.mark.parametrize("scenario", ["fsdp1", "fsdp1 flat"])
def test_fsdp1_wraps_layers_by_their_class_name_and_is_saved(scenario: str, run: Run) -> None:
    found = run[scenario]
    assert found["wrapped"] == 1 + SHAPE["num_hidden_layers"]
    flag = scenario == "fsdp1"
    for how in (f"fsdp1-{flag}", f"fsdp1-own-{flag}"):
        assert_bits(load_file(run.folder / how / "model.safetensors"), found["state"])
    assert_bits(translated(run, found["own"]), found["state"])
