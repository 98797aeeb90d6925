"""A patched Llama is trained as any Llama is: by hand, with gradient checkpointing, and by Trainer.

The models, and what counts as equal, are in ``conftest.py``. Gradients and weights are compared under Hugging Face's
names, tensor by tensor as one vector.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import forward_terms, gamma, gradient_terms
from torch import Tensor
from torch.nn import functional as F

STEPS = 20
EPSILON = 1e-3
"""Of AdamW, large beside the rounding errors of gradients: with a small one, an element whose gradient is nothing but
such errors takes whole steps, and a few of them decide which of two models is the nearer to the truth."""


@pytest.fixture
def trio(make_trio: Callable[..., Any]) -> Any:
    """Models of this test alone: training changes them."""
    return make_trio()


def padded(t: Any, side: str, *, seed: int = 1) -> dict[str, Tensor]:
    """A batch of mixed lengths, whose padding has no labels."""
    ids = t.tokens(seed=seed)
    place = torch.arange(t.length, device=t.device)
    lengths = torch.tensor([t.length, t.length * 2 // 3, t.length // 3, 4], device=t.device)[:, None]
    mask = place < lengths if side == "right" else place >= t.length - lengths
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def packed(t: Any, **arguments: Any) -> dict[str, Any]:
    """The same sequences one behind the other, as Hugging Face's collator flattens them."""
    from transformers import DataCollatorWithFlattening

    batch = padded(t, "right")
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    out = DataCollatorWithFlattening(**arguments)([{"input_ids": row} for row in rows])
    out = {key: value.to(t.device) if isinstance(value, Tensor) else value for key, value in out.items()}
    return {**out, "use_cache": False}


def prefixes(t: Any) -> dict[str, Tensor]:
    ids = t.tokens()
    mask = torch.ones(t.length, t.length, dtype=torch.bool, device=t.device).tril()
    mask[:5, :5] = True
    return {"input_ids": ids, "attention_mask": mask.repeat(len(ids), 1, 1, 1), "labels": ids}


BATCHES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "no mask": lambda t: {"input_ids": t.tokens(), "labels": t.tokens()},
    "right padded": lambda t: padded(t, "right"),
    "left padded": lambda t: padded(t, "left"),
    "packed": packed,
    "packed, with lengths": lambda t: packed(t, return_flash_attn_kwargs=True),
    "prefixes": prefixes,
    "so many tokens": lambda t: {
        "input_ids": t.tokens(),
        "labels": t.tokens(),
        "num_items_in_batch": torch.tensor(31, device=t.device),
    },
}


def losses_of_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of every token that has one, [n]: a mean of these may be right to any digit by chance."""
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).double(), labels[:, 1:], reduction="none")
    return losses[labels[:, 1:] != -100]


@pytest.mark.parametrize("name", BATCHES)
def test_losses_and_gradients_are_those_of_hugging_face(name: str, trio: Any) -> None:
    batch = BATCHES[name](trio)
    losses, gradients = [], []
    for model in trio.all:
        model.train()
        out = model(**batch)
        out.loss.backward()
        losses.append(torch.cat([losses_of_tokens(out.logits, batch["labels"]), out.loss.double()[None]]))
        gradients.append(trio.flat(trio.gradients(model)))
    trio.judge_values(*losses, f"{name}: losses")
    trio.judge_values(*gradients, f"{name}: gradients")


def test_twenty_steps_of_adamw_go_the_same_way(trio: Any) -> None:
    losses, ways = [], []
    for model in trio.all:
        before = {key: value.double().clone() for key, value in model.state_dict().items()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, eps=EPSILON)
        found = []
        model.train()
        for step in range(STEPS):
            batch = padded(trio, "left", seed=step)
            out = model(**batch)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found += [losses_of_tokens(out.logits, batch["labels"]), out.loss.double()[None]]
        losses.append(torch.cat(found).detach())
        ways.append(trio.flat({key: value.double() - before[key] for key, value in model.state_dict().items()}))
    trio.judge_values(*losses, f"losses of {STEPS} steps")
    trio.judge_values(*ways, f"what {STEPS} steps have changed")


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["right padded", "packed, with lengths"])
def test_gradient_checkpointing_computes_layers_again_and_the_same(name: str, use_reentrant: bool, trio: Any) -> None:
    batch = BATCHES[name](trio)
    gradients = []
    for model in trio.all:
        calls = []
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.register_forward_hook(lambda *_, index=index, calls=calls: calls.append(index))
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": use_reentrant})  # the second name is that of transformers before 5.23
        model.train()
        model(**batch).loss.backward()
        numbers = list(range(len(model.model.layers)))
        assert calls == numbers + numbers[::-1], "each layer forwards, and once more on the way back"
        gradients.append(trio.flat(trio.gradients(model)))
    trio.judge_values(*gradients, "gradients")


# Trainer


def examples(t: Any, *, fixed: bool = False) -> list[dict[str, Tensor]]:
    rows = t.tokens(32, seed=7).cpu()
    lengths = [t.length if fixed else 5 + 7 * index % (t.length - 5) for index in range(len(rows))]
    return [{"input_ids": row[:length], "labels": row[:length]} for row, length in zip(rows, lengths, strict=True)]


def pad_left(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    longest = max(len(each["input_ids"]) for each in features)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows = [{**each, "attention_mask": torch.ones_like(each["input_ids"])} for each in features]
    return {
        key: torch.stack([F.pad(row[key], (longest - len(row[key]), 0), value=value) for row in rows])
        for key, value in fill.items()
    }


def flatten(**arguments: Any) -> Any:
    from transformers import DataCollatorWithFlattening

    return DataCollatorWithFlattening(**arguments)


TRAINERS: dict[str, dict[str, Any]] = {
    "padded": {"data_collator": pad_left},
    "gradient accumulation": {"data_collator": pad_left, "gradient_accumulation_steps": 3},
    "label smoothing": {"data_collator": pad_left, "label_smoothing_factor": 0.1},
    "flattened": {"data_collator": flatten()},
    "flattened with lengths": {"data_collator": flatten(return_flash_attn_kwargs=True)},
    "gradient checkpointing": {"activation_checkpointing": True},
    "weight decay": {
        "optim": "adamw_torch",
        "weight_decay": 0.5,
        "learning_rate": 1e-3,
        "adam_epsilon": EPSILON,
    },
    "bf16": {"bf16": True, "data_collator": pad_left},
    "bf16 flattened": {"bf16": True, "data_collator": flatten(return_flash_attn_kwargs=True)},
}


def trainer_for(model: Any, t: Any, out: Path, **arguments: Any) -> Any:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    collator = arguments.pop("data_collator", None)
    if not hasattr(TrainingArguments, "activation_checkpointing") and "activation_checkpointing" in arguments:
        arguments["gradient_checkpointing"] = arguments.pop("activation_checkpointing")  # transformers before 5.23
    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        # Steps of SGD are as long as the gradients: a wrong scale is seen, which AdamW takes out.
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "use_cpu": t.device == "cpu",
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    }
    training = TrainingArguments(**{**defaults, **arguments})
    data = examples(t, fixed=collator is None)
    trainer = Trainer(model=model, args=training, train_dataset=data, data_collator=collator)
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_trains_it_like_any_model(name: str, make_trio: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    t = make_trio(dtype=torch.float32)  # the precision of the weights; on a GPU all is computed in bfloat16
    losses, ways = [], []
    for model in t.all:
        arguments = dict(TRAINERS[name])
        arguments["bf16"] = model is not t.truth and (arguments.get("bf16", False) or t.device != "cpu")
        before = {key: value.double().clone() for key, value in model.state_dict().items()}
        trainer = trainer_for(model, t, tmp_path, **arguments)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        ways.append(t.flat({key: value.double() - before[key] for key, value in model.state_dict().items()}))
    # A loss is off by what the way to it adds, and by what gradients have added to steps that are a tenth of them.
    config, tokens = t.ours.config, 4 * t.length
    terms = forward_terms(config, t.length) + gradient_terms(config, t.length, tokens)
    assert losses[2] == pytest.approx(losses[0], rel=1e-2 if arguments["bf16"] else gamma(terms))
    assert len(losses[2]) == 6
    t.judge_values(*ways, f"{name}: what Trainer has changed")


def test_weight_decay_takes_the_same_elements(trio: Any, tmp_path: Path) -> None:
    """Trainer chooses by the names of parameters; ours have other names, and one holds what several held."""
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    decays = []
    for model in (trio.theirs, trio.ours):
        optimizer = trainer_for(model, trio, tmp_path, optim="adamw_torch", weight_decay=0.5).create_optimizer()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.fill_(group["weight_decay"])
        decays.append({key: value.unique().tolist() for key, value in model.state_dict().items()})
    assert decays[1] == decays[0]
    assert sorted({value for values in decays[0].values() for value in values}) == [0.0, 0.5]
