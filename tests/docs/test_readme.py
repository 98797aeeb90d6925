"""The README's claims that no other test holds: its mapping is whole."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tepatch.checkpoint import open_checkpoint
from tepatch.mapping import parse_mapping
from tepatch.planning import Spec, make_plan
from tepatch.transfer.steps import assemble

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_mapping_in_the_readme_takes_every_tensor_of_a_llama(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(version: 1\n.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64, tie_word_embeddings=False)
    stock = LlamaForCausalLM(config)
    stock.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    inside = {
        **{"norm1": (32,), "norm2": (32,), "attention.qkv": (32 + 2 * 16, 32), "attention.out": (32, 32)},
        **{"mlp.fc1": (2 * 48, 32), "mlp.fc2": (32, 48)},
    }
    targets = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in inside.items()}
    targets |= {"model.embed_tokens.weight": (64, 32), "lm_head.weight": (64, 32), "model.norm.weight": (32,)}
    plan = make_plan(
        parse_mapping(text, name="README.md"),
        config=config.to_dict(),
        sources=checkpoint.tensors,
        targets={name: Spec(shape, "F32") for name, shape in targets.items()},
    )
    held = stock.state_dict()
    fused = assemble(plan, "model.layers.1.attention.qkv.weight", held.__getitem__)
    parts = [held[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(fused, torch.cat(parts))
