"""Rotary positions stay exact whatever the model's dtype, for each of Hugging Face's rope types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rounding import assert_close
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tepatch.errors import UnsupportedError
from tepatch.te import rope
from tepatch.te.rope import Float32Rotary, apply_rotary, take_rows

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "short_factor": [1.0 + i / 10 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "to": lambda model: model.to(torch.bfloat16),
    "to device and dtype": lambda model: model.to(device="cpu", dtype=torch.float16),
}


class TERotaryEmbedding(Float32Rotary, LlamaRotaryEmbedding):
    pass


def config(rope_type: str) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=256 if rope_type in ("llama3", "yarn", "longrope") else 64,
        rope_parameters={"rope_type": rope_type, "rope_theta": 500000.0, **ROPES[rope_type]},
    )


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("rope_type", ROPES)
def test_cos_and_sin_are_those_of_hugging_face_in_float32_after_any_cast(rope_type: str, cast: str) -> None:
    theirs = LlamaRotaryEmbedding(config(rope_type))
    ours = TERotaryEmbedding(config(rope_type))
    model = CASTS[cast](nn.ModuleDict({"rotary": ours, "other": nn.Linear(2, 2)}))
    x = torch.zeros(1, dtype=next(model.parameters()).dtype)
    # Short, past the original length (dynamic and longrope change their frequencies), and short again.
    for length in (20, 200, 30, 100):
        positions = torch.arange(length).unsqueeze(0)
        assert_same(ours(x, positions), theirs(torch.zeros(1), positions))
        for name, buffer in theirs.named_buffers():
            mine = ours.get_buffer(name)
            assert mine.dtype == torch.float32
            assert torch.equal(mine, buffer)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_cast_between_calls_past_the_original_length_changes_nothing(rope_type: str) -> None:
    theirs, ours = LlamaRotaryEmbedding(config(rope_type)), TERotaryEmbedding(config(rope_type))
    for length in (100, 120, 20):
        positions = torch.arange(length).unsqueeze(0)
        assert_same(ours.bfloat16()(torch.zeros(1), positions), theirs(torch.zeros(1), positions))


def test_hugging_faces_own_module_does_lose_its_frequencies_to_a_cast() -> None:
    # What the mixin is for: should this fail, Hugging Face has mended it.
    positions = torch.tensor([[8191]])
    exact, _ = LlamaRotaryEmbedding(config("llama3"))(torch.zeros(1), positions)
    rounded, _ = LlamaRotaryEmbedding(config("llama3")).bfloat16()(torch.zeros(1), positions)
    assert (exact - rounded).abs().max() > 0.5


def test_buffers_follow_the_model_to_another_device_and_to_meta_in_their_own_dtype() -> None:
    rotary = TERotaryEmbedding(config("default"))
    moved = rotary.to(device="meta", dtype=torch.bfloat16)
    assert moved is rotary
    assert {(b.device.type, b.dtype) for b in rotary.buffers()} == {("meta", torch.float32)}
    rotary.to_empty(device="cpu")
    assert {(b.device.type, b.dtype) for b in rotary.buffers()} == {("cpu", torch.float32)}


def test_the_tables_of_a_partial_rotary_leave_the_tail_alone() -> None:
    partial = config("linear")
    partial.rope_parameters["partial_rotary_factor"] = 0.5
    x, positions = torch.randn(1, 5, 4, 16).bfloat16(), torch.arange(5).unsqueeze(0)
    cos, sin = TERotaryEmbedding(partial).bfloat16()(x, positions)
    assert_same((cos, sin), LlamaRotaryEmbedding(partial)(torch.zeros(1), positions))
    assert cos.shape == (1, 5, 8)
    out = apply_rotary(x, cos, sin)
    assert torch.equal(out[..., 8:], x[..., 8:])
    assert not torch.equal(out[..., :8], x[..., :8])


def tables(batch: int, length: int, rot: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angles = torch.rand(batch, length, rot // 2, dtype=dtype).repeat(1, 1, 2) * 6
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("batch", [1, 2])
def test_rotating_in_float32_is_what_hugging_face_does(batch: int) -> None:
    q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16)
    cos, sin = tables(batch, 5, 16)
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    assert torch.equal(apply_rotary(q, cos, sin), expected[0])
    assert torch.equal(apply_rotary(k, cos, sin), expected[1])


def test_rotating_bfloat16_rounds_once() -> None:
    x = torch.randn(2, 5, 4, 16).bfloat16()
    cos, sin = tables(1, 5, 16)
    out = apply_rotary(x, cos, sin)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, apply_rotary(x.float(), cos, sin).bfloat16())


def test_a_partial_rotation_leaves_the_tail_alone() -> None:
    x = torch.randn(2, 5, 4, 16)
    cos, sin = tables(1, 5, 6)
    out = apply_rotary(x, cos, sin)
    assert torch.equal(out[..., 6:], x[..., 6:])
    assert torch.equal(out[..., :6], apply_rotary(x[..., :6], cos, sin))


def test_a_rotation_keeps_lengths_and_has_the_gradients_of_one() -> None:
    x = torch.randn(2, 5, 4, 16, dtype=torch.float64, requires_grad=True)
    cos, sin = tables(2, 5, 16, torch.float64)
    out = apply_rotary(x, cos, sin)
    assert_close(out.norm(dim=-1), x.norm(dim=-1), terms=16 + 4)  # the norm, and two products of a cosine and a sine
    assert torch.autograd.gradcheck(lambda inp: apply_rotary(inp, cos, sin), (x,))


@pytest.mark.parametrize(
    ("x_shape", "table_shape"),
    [
        ((2, 5, 16), (1, 5, 16)),
        ((2, 5, 4, 16), (5, 16)),
        ((2, 5, 4, 16), (1, 4, 16)),
        ((2, 5, 4, 16), (3, 5, 16)),
        ((2, 5, 4, 16), (1, 5, 18)),
        ((2, 5, 4, 16), (1, 5, 5)),
    ],
)
def test_tables_that_do_not_fit_are_refused(x_shape: tuple[int, ...], table_shape: tuple[int, ...]) -> None:
    table = torch.zeros(table_shape)
    with pytest.raises(UnsupportedError, match=r"(?s)do not fit.*rot even"):
        apply_rotary(torch.zeros(x_shape), table, table)


def test_cos_and_sin_of_different_shapes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="do not fit"):
        apply_rotary(torch.zeros(2, 5, 4, 16), torch.zeros(1, 5, 16), torch.zeros(1, 5, 8))


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_of_the_tables_are_those_of_their_tokens(batch: int) -> None:
    """Of every table and every list of rows: layers ask one after another, a window's with rows of their own."""
    tables = [torch.randn(batch, 5, 4) for _ in range(4)]
    everything = [torch.tensor([0, 1, 4, 7, 11, 14]), torch.tensor([2, 3, 13]), torch.tensor([2, 3, 13]) + 1]
    for _ in range(2):
        for cos, sin in (tables[:2], tables[2:]):
            for rows in everything:
                taken = take_rows(cos, sin, rows, 3)
                for found, table in zip(taken, (cos, sin), strict=True):
                    expected = [table[row // 5 if batch > 1 else 0, row % 5] for row in rows.tolist()]
                    assert torch.equal(found, torch.stack(expected)[None])
                assert all(a is b for a, b in zip(taken, take_rows(cos, sin, rows, 3), strict=True)), "taken once"


def test_what_is_known_of_angles_is_known_of_the_rows_that_are_taken() -> None:
    cos, sin, rows = torch.ones(1, 5, 4), torch.zeros(1, 5, 4), torch.tensor([1, 3])
    assert take_rows(cos, sin, rows, 1)[0] not in rope._angles
    cos = cos.clone()
    rope._angles[cos] = None
    assert take_rows(cos, sin, rows, 1)[0] in rope._angles
