"""Trainer saves, resumes and picks checkpoints of a patched model as of any other: in the stock model's layout."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tepatch
from tepatch.errors import UnsupportedError

pytest.importorskip("accelerate", reason="Trainer needs accelerate")

Make = Callable[..., Any]
Save = Callable[..., Path]

STEPS, SAVED = 6, 3


CONFIG = {"num_hidden_layers": 2, "tie_word_embeddings": True, "attention_bias": True}


@pytest.fixture
def folder(tiny_llama: Make, save_checkpoint: Save) -> Path:
    return save_checkpoint(tiny_llama(**CONFIG))


def load(folder: Path) -> Any:
    return tepatch.load("llama", folder, backend="reference")


def examples(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, 128, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer_for(model: Any, out: Path, **arguments: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    made_for_trainer = {name: arguments.pop(name) for name in ("compute_metrics", "eval_dataset") if name in arguments}
    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "save_steps": SAVED,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "optim": "adamw_torch",
        "seed": 11,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(**{**defaults, **arguments})
    return Trainer(model=model, args=args, train_dataset=examples(32, seed=0), **made_for_trainer)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def optimizer_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The optimizer's state in a checkpoint of Trainer, flat."""
    stored = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    out = {f"{n}.{key}": value for n, state in stored["state"].items() for key, value in state.items()}
    assert len(out) == 3 * 18  # step and two moments, for each parameter
    return out


@pytest.fixture(params=["one file", "many shards"])
def cut(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """How checkpoints of a model are cut, as a function that arranges it."""

    def arrange(model: Any) -> Any:
        if request.param == "many shards":  # gate and up, q, k and v in different ones
            model.save_pretrained = partial(model.save_pretrained, max_shard_size="30KB")
        return model

    return arrange


def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    cut: Callable[[Any], Any], folder: Path, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    whole = cut(load(folder))
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    trainer_for(whole, tmp_path / "whole").train()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items()), "it has learnt"

    # Other weights than the first run began with: all that is right afterwards is from the checkpoint.
    others = tiny_llama(**CONFIG, seed=5)
    resumed = cut(load(save_checkpoint(others, name="others")))
    checkpoint = tmp_path / "whole" / f"checkpoint-{SAVED}"
    trainer_for(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(checkpoint))

    assert_equal(dict(resumed.named_parameters()), dict(whole.named_parameters()))
    last = f"checkpoint-{STEPS}"
    assert_equal(optimizer_tensors(tmp_path / "resumed" / last), optimizer_tensors(tmp_path / "whole" / last))


def test_a_checkpoint_is_for_plain_transformers_and_for_tepatch(
    cut: Callable[[Any], Any], folder: Path, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    model = cut(load(folder))
    trainer_for(model, tmp_path / "run").train()
    saved = tmp_path / "run" / f"checkpoint-{STEPS}"
    if (index := saved / "model.safetensors.index.json").exists():
        places = json.loads(index.read_text())["weight_map"]
        assert (
            len({places[f"model.layers.0.{name}_proj.weight"] for name in ("mlp.gate", "mlp.up", "self_attn.v")}) == 3
        )
    stock, told = LlamaForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(told.values()), told
    assert_equal(stock.state_dict(), model.state_dict())
    assert_equal(dict(load(saved).named_parameters()), dict(model.named_parameters()))


def test_the_best_model_is_taken_back_at_the_end(cut: Callable[[Any], Any], folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    scores = iter([1.0, 5.0, 3.0])
    model = cut(load(folder))
    trainer = trainer_for(
        model,
        tmp_path,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        eval_dataset=examples(4, seed=1),
        compute_metrics=lambda prediction: {"score": next(scores)},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best, last = (LlamaForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}").state_dict() for step in (4, 6))
    assert_equal(model.state_dict(), best)
    assert not any(torch.equal(best[name], last[name]) for name in best)


def test_trainers_own_save_and_a_wrapped_model_write_the_stock_layout(folder: Path, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from transformers import LlamaForCausalLM

    model = load(folder)
    expected = model.state_dict()
    trainer_for(model, tmp_path / "run").save_model(str(tmp_path / "saved"))
    assert_equal(LlamaForCausalLM.from_pretrained(tmp_path / "saved").state_dict(), expected)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.unwrap_model(prepared).save_pretrained(
        tmp_path / "unwrapped",
        is_main_process=accelerator.is_main_process,
        state_dict=accelerator.get_state_dict(prepared),
    )
    assert_equal(LlamaForCausalLM.from_pretrained(tmp_path / "unwrapped").state_dict(), expected)
    accelerator.save_state(str(tmp_path / "state"))
    kept = {name: tensor.clone() for name, tensor in expected.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert_equal(model.state_dict(), kept)


def test_a_run_of_the_stock_model_is_not_resumed(folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    trainer_for(LlamaForCausalLM.from_pretrained(folder), tmp_path / "stock").train()
    checkpoint = tmp_path / "stock" / f"checkpoint-{SAVED}"
    for model in (load(folder), copy.deepcopy(load(folder))):
        with pytest.raises(UnsupportedError, match=r"other parameters than those of the patched model") as error:
            trainer_for(model, tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
        assert (error.value.problems[0].expected, error.value.problems[0].found) == (
            "groups of [9, 9] parameters",
            "groups of [15, 13] parameters".removesuffix(" parameters"),
        )
    # The advice: the run's weights, and no optimizer.
    assert "tepatch.load(patch, checkpoint), and train() without resume_from_checkpoint" in error.value.problems[0].fix
    trainer_for(load(checkpoint), tmp_path / "new").train()


@pytest.mark.parametrize("make", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)])
def test_moments_of_other_shapes_are_refused_and_nothing_is_taken(make: Any, folder: Path, tiny_llama: Make) -> None:
    model, stock = load(folder), tiny_llama(**CONFIG)
    ours = make([model.model.layers[0].self_attn.qkv.weight], lr=1e-3)
    theirs = make([stock.model.layers[0].self_attn.q_proj.weight], lr=1e-3)
    for each, optimizer in ((model, ours), (stock, theirs)):
        each(torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
        optimizer.step()
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(UnsupportedError, match=r"for parameter 0"):
        ours.load_state_dict(theirs.state_dict())
    assert str(ours.state_dict()) == str(before)
    ours.load_state_dict(before)
    with pytest.raises(ValueError, match="doesn't match the size"):  # of a stock model's optimizer: torch's own words
        make(stock.parameters(), lr=1e-3).load_state_dict(before)
