"""Small mappings, and a checkpoint that is a dictionary: real plans, really executed in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tepatch.checkpoint import TensorInfo, open_checkpoint
from tepatch.dtypes import dtype_code
from tepatch.errors import MappingError, PlanError, Problem
from tepatch.mapping import parse_mapping
from tepatch.planning import Plan, Spec, make_plan
from tepatch.transfer.fill import Destination, load_tensors, restore_tensors
from tepatch.transfer.settings import Reading
from tepatch.transfer.steps import same_bits

Tensors = dict[str, torch.Tensor]
SMALL = 64
"""Bytes: so that even the smallest tensors are read in several pieces."""


@dataclass(frozen=True)
class MemoryCheckpoint:
    """A checkpoint of one file that is held in memory."""

    held: Mapping[str, torch.Tensor]
    location: str = "memory"
    files: tuple[str, ...] = ("memory.safetensors",)
    also_present: tuple[str, ...] = ()
    wrappers: tuple[str, ...] = ()
    config_folder: Path = Path()

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        out, offset = {}, 0
        for name, tensor in self.held.items():
            shape, dtype = tuple(tensor.shape), dtype_code(tensor.dtype) or ""
            out[name] = TensorInfo(
                name=name, shape=shape, dtype=dtype, file=self.files[0], offset=offset, nbytes=tensor.nbytes
            )
            offset += tensor.nbytes
        return out

    def stamp(self, file: str, /) -> None:
        """There is no file."""

    @contextmanager
    def open(self, file: str, /) -> Iterator[MemoryCheckpoint]:
        assert file == self.files[0]
        yield self

    def read(self, info: TensorInfo, /) -> torch.Tensor:
        return self.held[info.name]


@dataclass(frozen=True)
class Trip:
    """A checkpoint that was loaded into parameters, and what came back."""

    plan: Plan
    loaded: Tensors
    restored: Tensors


@pytest.fixture
def specs() -> Callable[..., dict[str, Spec]]:
    """Makes specs of ``name=shape`` pairs, bfloat16 unless told otherwise."""

    def make(shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, Spec]:
        return {name: Spec(tuple(shape), dtype) for name, shape in shapes.items()}

    return make


@pytest.fixture
def plan_of(specs: Callable[..., dict[str, Spec]]) -> Callable[..., Plan]:
    """Makes a plan of a mapping's text (without its version line) and of shapes by name."""

    def make(
        text: str,
        sources: Mapping[str, tuple[int, ...]],
        targets: Mapping[str, tuple[int, ...]],
        *,
        ties: Mapping[str, str] | None = None,
        dtype: str = "BF16",
        target_dtype: str | None = None,
        location: str = "",
        **config: Any,
    ) -> Plan:
        return make_plan(
            parse_mapping(f"version: 1\n{text}", name="m.yaml"),
            config=config,
            sources=specs(sources, dtype),
            targets=specs(targets, target_dtype or dtype),
            ties=ties,
            location=location,
        )

    return make


@pytest.fixture
def plan_problems(plan_of: Callable[..., Plan]) -> Callable[..., list[Problem]]:
    """The problems of a plan that must not come to be; same arguments as ``plan_of``."""

    def make(*args: Any, **kwargs: Any) -> list[Problem]:
        with pytest.raises(PlanError) as caught:
            plan_of(*args, **kwargs)
        return list(caught.value.problems)

    return make


@pytest.fixture
def refused() -> Callable[..., list[Problem]]:
    """The problems of a mapping's text (without its version line) that must be refused."""

    def read(text: str, *, version: str = "version: 1\n", folder: Path | None = None) -> list[Problem]:
        with pytest.raises(MappingError) as caught:
            parse_mapping(version + text, name="m.yaml", folder=folder)
        return list(caught.value.problems)

    return read


@pytest.fixture
def travel(tmp_path: Path) -> Callable[..., Trip]:
    """Plans, loads and restores. Loads twice: tensor by tensor, and from a file in pieces of a few elements."""

    def go(
        text: str,
        sources: Tensors,
        targets: Mapping[str, tuple[int, ...]],
        *,
        ties: Mapping[str, str] | None = None,
        dtype: torch.dtype = torch.float32,
        **config: Any,
    ) -> Trip:
        checkpoint = MemoryCheckpoint(sources)
        plan = make_plan(
            parse_mapping(f"version: 1\n{text}", name="m.yaml"),
            config=config,
            sources=checkpoint.tensors,
            targets={name: Spec(tuple(shape), dtype_code(dtype) or "") for name, shape in targets.items()},
            ties=ties,
            location=checkpoint.location,
        )
        to = Destination(device=torch.device("cpu"))
        loaded, _ = load_tensors(plan, checkpoint, to=to, progress=False)
        save_file({name: tensor.contiguous() for name, tensor in sources.items()}, tmp_path / "model.safetensors")
        reading = Reading(threads=2, piece_bytes=SMALL)
        streamed, _ = load_tensors(plan, open_checkpoint(tmp_path), to=to, reading=reading, progress=False)
        assert streamed.keys() == loaded.keys()
        assert all(same_bits(streamed[name], tensor) for name, tensor in loaded.items())
        return Trip(plan, loaded, dict(restore_tensors(plan, loaded)))

    return go


LLAMA = """captures: {layer: num_hidden_layers}
sizes:
  d: head_dim or hidden_size // num_attention_heads
  q: num_attention_heads * d
  kv: num_key_value_heads * d
requires:
  - hidden_act == 'silu': this layer computes SwiGLU
ignore:
  - model.layers.{layer}.self_attn.rotary_emb.inv_freq: computed from the config
parameters:
  model.embed_tokens.weight: same
  model.norm.weight: same
  lm_head.weight:
    - {when: tie_word_embeddings, same: true}
    - same
  model.layers.{layer}:
    self_attn.qkv.layernorm_weight: input_layernorm.weight
    self_attn.qkv.weight:
      concat: [self_attn.q_proj.weight, self_attn.k_proj.weight, self_attn.v_proj.weight]
      sizes: [q, kv, kv]
    self_attn.proj.weight: self_attn.o_proj.weight
    self_attn.proj.bias: {when: attention_bias, of: self_attn.o_proj.bias}
    mlp.layernorm_weight: post_attention_layernorm.weight
    mlp.fc1_weight: {concat: [mlp.gate_proj.weight, mlp.up_proj.weight]}
    mlp.fc2_weight: mlp.down_proj.weight
"""


@dataclass
class Llama:
    """The mapping, the config, a checkpoint's tensors and a model's parameters, free to be damaged."""

    config: dict[str, Any]
    sources: dict[str, Spec]
    targets: dict[str, Spec]
    text: str = LLAMA
    ties: dict[str, str] | None = None

    def plan(self, location: str = "checkpoint") -> Plan:
        return make_plan(
            parse_mapping(f"version: 1\n{self.text}", name="llama.yaml"),
            config=self.config,
            sources=self.sources,
            targets=self.targets,
            ties=self.ties,
            patch="llama",
            location=location,
        )

    def problems(self) -> list[Problem]:
        with pytest.raises(PlanError) as caught:
            self.plan()
        return list(caught.value.problems)

    def problem(self) -> Problem:
        problems = self.problems()
        assert len(problems) == 1, "\n".join(map(str, problems))
        return problems[0]


@pytest.fixture
def llama() -> Callable[..., Llama]:
    """A Llama of any size; three small layers if nothing is said."""

    def make(
        *,
        layers: int = 3,
        hidden: int = 64,
        inner: int = 96,
        heads: int = 8,
        groups: int = 2,
        d: int = 8,
        vocab: int = 50,
    ) -> Llama:
        shared = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
        sources: dict[str, tuple[int, ...]] = {**shared, "lm_head.weight": (vocab, hidden)}
        targets = dict(sources)
        for layer in range(layers):
            at = f"model.layers.{layer}."
            sources |= {
                f"{at}input_layernorm.weight": (hidden,),
                f"{at}self_attn.q_proj.weight": (heads * d, hidden),
                f"{at}self_attn.k_proj.weight": (groups * d, hidden),
                f"{at}self_attn.v_proj.weight": (groups * d, hidden),
                f"{at}self_attn.o_proj.weight": (hidden, heads * d),
                f"{at}post_attention_layernorm.weight": (hidden,),
                f"{at}mlp.gate_proj.weight": (inner, hidden),
                f"{at}mlp.up_proj.weight": (inner, hidden),
                f"{at}mlp.down_proj.weight": (hidden, inner),
            }
            targets |= {
                f"{at}self_attn.qkv.layernorm_weight": (hidden,),
                f"{at}self_attn.qkv.weight": ((heads + 2 * groups) * d, hidden),
                f"{at}self_attn.proj.weight": (hidden, heads * d),
                f"{at}mlp.layernorm_weight": (hidden,),
                f"{at}mlp.fc1_weight": (2 * inner, hidden),
                f"{at}mlp.fc2_weight": (hidden, inner),
            }
        config = {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": None if d == hidden // heads else d,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "attention_bias": False,
        }
        as_specs = [{name: Spec(shape, "BF16") for name, shape in each.items()} for each in (sources, targets)]
        return Llama(config, *as_specs)

    return make
