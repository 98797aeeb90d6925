"""Certificates: what came back passes, and whatever was lost, changed, swapped or added is named."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tepatch
from tepatch.certification import Certificate, certify, check_certificate
from tepatch.certification.certificate import CERTIFICATE, PAGE, body_digest, certificate_text
from tepatch.certification.comparison import Operation, deviation, difference
from tepatch.certification.sides import encoded
from tepatch.dtypes import torch_dtype
from tepatch.errors import CheckpointError, PlanError, SaveError
from tepatch.planning import Copy
from tepatch.planning.bind import IDENTITY, Affine
from tepatch.views import Pair

Make = Callable[..., Any]
Save = Callable[..., Path]
Q = "model.layers.{}.self_attn.q_proj.weight"
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}

TE_LLAMA = {
    "input_layernorm.weight": "self_attention.layernorm_qkv.layer_norm_weight",
    "self_attn.q_proj.weight": "self_attention.layernorm_qkv.query_weight",
    "self_attn.k_proj.weight": "self_attention.layernorm_qkv.key_weight",
    "self_attn.v_proj.weight": "self_attention.layernorm_qkv.value_weight",
    "self_attn.o_proj.weight": "self_attention.proj.weight",
    "post_attention_layernorm.weight": "layernorm_mlp.layer_norm_weight",
    "mlp.down_proj.weight": "layernorm_mlp.fc2_weight",
}


@pytest.fixture
def small(tiny_llama: Make, save_checkpoint: Save) -> Callable[..., Path]:
    """Writes a small Llama with a tokenizer and a readme beside it; keywords are those of ``save_checkpoint``."""

    def write(*, dtype: torch.dtype = torch.float32, config: dict[str, Any] | None = None, **keywords: Any) -> Path:
        folder = save_checkpoint(tiny_llama(dtype=dtype, **{**SMALL, **(config or {})}), **keywords)
        (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}}}')
        (folder / "README.md").write_text("A small model.\n")
        return folder

    return write


def converted(folder: Path, name: str, **options: Any) -> Path:
    made = folder.parent / name
    tepatch.convert("llama", folder, made, **options)
    return made


def as_te_llama(tensors: dict[str, torch.Tensor]) -> None:
    """Gives a checkpoint's tensors the layout of the te_llama example."""
    for layer in range(SMALL["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for old, new in TE_LLAMA.items():
            tensors[at + new] = tensors.pop(at + old)
        parts = [tensors.pop(f"{at}mlp.{part}_proj.weight") for part in ("gate", "up")]
        tensors[f"{at}layernorm_mlp.fc1_weight"] = torch.cat(parts)


def proof(source: Path, destination: Path, **options: Any) -> Certificate:
    return certify("llama", source, destination, **options)


def statuses(certificate: Certificate) -> set[str]:
    return {tensor.status for tensor in certificate.tensors}


def failed(certificate: Certificate) -> dict[str, str]:
    """Tensors that did not come back, each with its status; and all of them have a problem that names them."""
    out = {t.name: t.status for t in certificate.tensors if t.status in ("differs", "missing", "extra")}
    for name in out:
        assert any(problem.where.endswith(f": {name}") for problem in certificate.problems), name
    assert certificate.passed is not bool(out or certificate.problems)
    return out


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any], file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def named(result: Any) -> str:
    """All places that the problems of a check name."""
    assert not result.passed
    return "\n".join(problem.where for problem in result.problems)


# What came back


@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_conversion_and_the_way_back_are_bit_for_bit(shards: int, dtype: torch.dtype, small: Make) -> None:
    source = small(dtype=dtype, shards=shards)
    te = converted(source, "te", max_shard_size="20KB")
    back = converted(te, "back")
    for first, second in ((source, te), (source, back), (te, back)):
        certificate = proof(first, second)
        assert certificate.passed, certificate.problems
        assert statuses(certificate) == {"equal"}
        assert [t.source_sha256 for t in certificate.tensors] == [t.destination_sha256 for t in certificate.tensors]
        assert check_certificate(second, source=first).passed
    names = [name for file in sorted(source.glob("*.safetensors")) for name in load_file(file)]
    assert sorted(tensor.name for tensor in certificate.tensors) == sorted(names)


def test_what_a_model_saves_is_certified_against_what_was_loaded(small: Make, tmp_path: Path) -> None:
    source = small()
    model: Any = tepatch.load("llama", source, backend="reference")
    tepatch.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "pretrained")
    for folder in ("saved", "pretrained"):
        certificate = proof(source, tmp_path / folder)
        assert certificate.passed, certificate.problems
        assert statuses(certificate) == {"equal"}


def test_a_pickled_source_is_certified(small: Make) -> None:
    source = small(kind="bin")
    te = converted(source, "te")
    assert proof(source, te).passed
    assert check_certificate(te, source=source).passed


def test_a_pickled_destination_is_certified_and_its_damage_named(small: Make) -> None:
    source, pickled = small(), small(kind="bin", name="pickled")
    assert proof(source, pickled).passed
    assert check_certificate(pickled).passed
    path = pickled / "pytorch_model.bin"
    tensors = torch.load(path)
    tensors[Q.format(1)][2, 3] += 1
    torch.save(tensors, path)
    found = named(check_certificate(pickled))
    assert str(path) in found
    assert Q.format(1) in found
    assert Q.format(0) not in found


@pytest.mark.parametrize("is_copied", [False, True])
def test_a_copy_of_a_tied_tensor_may_be_left_out(is_copied: bool, small: Make, tiny_llama: Make) -> None:
    config = {"tie_word_embeddings": True}
    weights = tiny_llama(**SMALL, **config).get_input_embeddings().weight.detach().clone()
    source = small(config=config, extra={HEAD: weights})
    without = small(config=config, name="without")
    te = converted(source, "te")
    for first, second in ((source, without), (source, te), (te, without), (te, source)):
        certificate = proof(first, second)
        assert certificate.passed, certificate.problems
        head = next(tensor for tensor in certificate.tensors if tensor.name == HEAD)
        assert (head.status, head.note) == ("tied copy", f"equal to {EMBED}")
    # The other way, there is one more than there was: the same numbers again.
    certificate = proof(without, source)
    assert certificate.passed
    assert next(t.status for t in certificate.tensors if t.name == HEAD) == "tied copy"
    if is_copied:
        change(source, lambda tensors: tensors[HEAD].add_(1))
        assert failed(proof(source, without)) == {HEAD: "differs"}
        assert failed(proof(without, source)) == {HEAD: "extra"}


def test_ignored_tensors_need_not_come_back_and_may_not_come_back_changed(small: Make) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)}
    source, without = small(extra=extra), small(name="without")
    te = converted(source, "te")
    for second in (without, te):
        certificate = proof(source, second)
        assert certificate.passed, certificate.problems
        entry = next(tensor for tensor in certificate.tensors if tensor.name in extra)
        assert entry.outcome == "ignored, written by old versions of transformers, computed from the config"
    assert any("inv_freq" in note for note in proof(te, without).notes)
    same = small(extra=extra, name="same")
    assert proof(source, same).passed
    change(same, lambda tensors: tensors[next(iter(extra))].add_(1))
    assert failed(proof(source, same)) == {next(iter(extra)): "differs"}
    assert failed(proof(without, same)) == {next(iter(extra)): "extra"}


def test_a_checkpoint_in_another_layout_of_the_patch_is_certified(small: Make, tmp_path: Path) -> None:
    source = small(config={"num_key_value_heads": 2})
    other = small(config={"num_key_value_heads": 2}, name="other")
    change(other, as_te_llama)
    for first, second in ((other, source), (source, other), (other, converted(other, "te"))):
        certificate = proof(first, second)
        assert certificate.passed, certificate.problems
        assert statuses(certificate) == {"equal"}
        assert "te_llama" in (certificate.source.layout, certificate.destination.layout)
        assert check_certificate(second, source=first).passed
    # Whatever dtype its config says: what is compared is what is stored.
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert statuses(proof(other, source)) == {"equal"}
    name = "model.layers.1.self_attention.layernorm_qkv.key_weight"
    change(other, lambda tensors: tensors[name][0].mul_(2))
    assert failed(proof(source, other)) == {"model.layers.1.self_attn.k_proj.weight": "differs"}


def test_a_copy_in_another_layout_has_to_be_one(small: Make) -> None:
    config = {"tie_word_embeddings": True}
    source, other = small(config=config), small(config=config, name="other")
    change(other, as_te_llama)
    change(other, lambda tensors: tensors.update({HEAD: tensors[EMBED].clone()}))
    assert proof(other, source).passed
    change(other, lambda tensors: tensors[HEAD].add_(1))
    (problem,) = proof(other, source).problems
    assert (problem.where, problem.what) == (f"{other}: {HEAD}", "differs from the tensor that it is a copy of")


# What was rounded, as it was declared


@pytest.mark.parametrize(("dtype", "code", "unit"), [("bfloat16", "BF16", 2**-8), ("float16", "F16", 2**-11)])
def test_a_declared_rounding_is_exactly_that_and_its_deviation_within_the_bound(
    dtype: str, code: str, unit: float, small: Make
) -> None:
    source = small()
    te = converted(source, "te", dtype=dtype)
    certificate = proof(source, te)
    assert certificate.passed, certificate.problems
    embed = next(tensor for tensor in certificate.tensors if tensor.name == EMBED)
    assert (embed.status, embed.operation, embed.bound) == ("converted", f"rounded F32 -> {code}", unit)
    assert unit / 2 < (embed.deviation or 0) <= unit  # 2048 random numbers come near it
    assert embed.source_sha256 != embed.destination_sha256
    back, rounded = converted(te, "back"), converted(te, "rounded", dtype=dtype)
    assert proof(te, back).passed
    assert proof(source, rounded).passed
    # From original to original nothing says what happened in between.
    certificate = proof(source, back)
    assert failed(certificate)[EMBED] == "differs"
    assert "--dtype" in certificate.problems[0].fix
    assert dtype in certificate.problems[0].fix
    certificate = proof(source, back, dtype=dtype)
    assert certificate.passed
    embed = next(tensor for tensor in certificate.tensors if tensor.name == EMBED)
    assert embed.operation == f"rounded F32 -> {code}, widened {code} -> F32"
    assert embed.bound == unit


def test_one_unit_in_the_last_place_is_no_rounding(small: Make) -> None:
    source = small()
    rounded = converted(converted(source, "te", dtype="bfloat16"), "rounded", dtype="bfloat16")
    assert proof(source, rounded).passed

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EMBED].view(torch.int16)[3, 4] += 1

    change(rounded, nudge)
    certificate = proof(source, rounded)
    assert failed(certificate) == {EMBED: "differs"}
    assert certificate.problems[0].what == "1 of 2,048 elements differ from the source's"
    assert "[3, 4]" in certificate.problems[0].details[0]


def test_wider_parameters_are_compared_in_all_their_bits(small: Make) -> None:
    source = small(dtype=torch.bfloat16)
    te = converted(source, "te", dtype="float32")
    assert proof(source, te).passed

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EMBED].view(torch.int32)[0, 0] += 1  # rounded back to bfloat16, this would vanish

    change(te, nudge, "tepatch.safetensors")
    assert failed(proof(source, te)) == {EMBED: "differs"}


def test_the_digests_are_those_of_what_is_stored_also_in_another_dtype(small: Make) -> None:
    source = small(dtype=torch.bfloat16)
    te = converted(source, "te", dtype="float32")
    wide = converted(te, "wide", dtype="float32")
    for first, second in ((te, wide), (source, wide), (wide, te)):
        assert proof(first, second).passed
        assert check_certificate(second, source=first).passed


def test_a_rounding_that_the_config_suggests_is_not_declared(small: Make) -> None:
    source = small()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    te = converted(source, "te")
    back = converted(te, "back")
    assert proof(source, te).passed  # its parameters say what they are
    assert failed(proof(source, back))[EMBED] == "differs"
    assert proof(source, back, dtype="bfloat16").passed


def test_parts_of_a_tensor_in_parameters_of_several_dtypes_are_rounded_each_to_its_own() -> None:
    x = torch.full((4,), 1 + 2.0**-12)
    copies = [
        Copy("x", target, Pair((2,), (1,), (1,), start, 0), IDENTITY, 0) for target, start in (("a", 0), ("b", 2))
    ]
    assert encoded(x, copies, {"a": "F32", "b": "BF16"}).tolist() == [1 + 2.0**-12] * 2 + [1.0] * 2
    assert encoded(x, copies, {"a": "F16", "b": "BF16"}).dtype == torch.float32


def test_what_is_widened_is_exact(small: Make) -> None:
    source = small(dtype=torch.bfloat16)
    certificate = proof(source, converted(source, "te", dtype="float32"))
    assert {tensor.outcome for tensor in certificate.tensors} == {"widened BF16 -> F32"}
    assert {(tensor.bound, tensor.deviation) for tensor in certificate.tensors} == {(0.0, 0.0)}


def test_numbers_that_become_infinite_are_lost(small: Make) -> None:
    source = small()
    te = converted(source, "te", dtype="bfloat16")
    change(source, lambda tensors: tensors[NORM].fill_(3.4e38))  # more than bfloat16 has
    certificate = proof(source, te)
    assert failed(certificate) == {NORM: "differs"}
    assert certificate.problems[0].what == "values that bfloat16 can not hold"
    # A program that rounds them to infinity, as torch does, has lost them.
    rounded = source.with_name("rounded")
    shutil.copytree(source, rounded)
    change(rounded, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    certificate = proof(source, rounded)
    assert failed(certificate) == {NORM: "differs"}
    assert certificate.problems[0].what == "numbers were lost (rounded F32 -> BF16)"


def test_values_that_float16_can_not_hold_are_named(small: Make) -> None:
    source, other = small(), small(dtype=torch.float16, name="other")
    te = converted(other, "te")
    change(source, lambda tensors: tensors[NORM].fill_(1e6))
    certificate = proof(source, te)
    assert failed(certificate)[NORM] == "differs"
    assert "float16 can not hold" in next(p.what for p in certificate.problems if p.where.endswith(NORM))
    # Nor can it be given back where parameters are wider than the original.
    wide = converted(other, "wide", dtype="float32")
    change(wide, lambda tensors: tensors[NORM].fill_(1e6), "tepatch.safetensors")
    for first, second in ((other, wide), (wide, other)):
        assert failed(proof(first, second))[NORM] == "differs"


def test_scaled_tensors_are_held_against_the_scale_that_the_mapping_says(small: Make, tmp_path: Path) -> None:
    mapping = tmp_path / "scaled.yaml"
    mapping.write_text(
        "version: 1\nextends: tepatch_llama:llama.tepatch.yaml\nparameters:\n"
        f"  {NORM}: {{of: {NORM}, scale: 3, offset: 1}}\n"
    )
    source = small()
    te = converted(source, "te", mapping=mapping)
    back = converted(te, "back", mapping=mapping)
    for first, second in ((source, te), (te, back), (source, back)):
        certificate = proof(first, second, mapping=mapping)
        assert certificate.passed, certificate.problems
        row = next(tensor for tensor in certificate.tensors if tensor.name == NORM)
        assert row.operation.startswith("scaled or offset (3 x + 1)") or row.status == "equal"
        assert (row.deviation or 0) <= (row.bound or 0)
    change(te, lambda tensors: tensors[NORM][5:6].add_(1e-3), "tepatch.safetensors")
    assert failed(proof(source, te, mapping=mapping)) == {NORM: "differs"}


def test_nan_payloads_count_where_nothing_was_converted(small: Make) -> None:
    def poison(tensors: dict[str, torch.Tensor], payload: int = 0x7FC00001) -> None:
        tensors[NORM].view(torch.int32)[:3] = payload

    source = small()
    change(source, poison)
    same, te = converted(converted(source, "te"), "same"), converted(source, "rounded", dtype="bfloat16")
    assert proof(source, same).passed
    assert proof(source, te).passed
    change(same, lambda tensors: poison(tensors, 0x7FC00002))
    assert failed(proof(source, same)) == {NORM: "differs"}


def test_a_conversion_keeps_no_nan_payload_and_makes_no_number_of_a_nan() -> None:
    one, other = (torch.tensor([bits, 0x3F800000], dtype=torch.int32).view(torch.float32) for bits in (-1, 0x7FC00000))
    assert difference(one, other, is_converted=True) is None
    assert difference(one, other, is_converted=False) is not None
    found = difference(one, torch.ones(2), is_converted=True)
    assert found is not None
    assert (found.count, found.largest) == (1, float("inf"))


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32])
def test_no_rounding_of_torch_exceeds_its_bound(target: torch.dtype) -> None:
    codes = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50_000, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-45, 4, 50_000, dtype=torch.float64)
    # Torch goes by way of float32. Just above the middle of two subnormal numbers, that rounds twice, and down.
    middle = torch.finfo(target).tiny * torch.finfo(target).eps / 2 * torch.tensor([5.0], dtype=torch.float64)
    x = torch.cat([x, middle * (1 + 2.0**-40)])
    operation = Operation(roundings=(("F64", codes[target]),))
    assert 0 < deviation(x, x.to(target), operation) <= operation.bound


@pytest.mark.parametrize(("outer", "inner"), [("F32", "BF16"), ("F32", "F16"), ("F64", "F64")])
def test_no_scale_exceeds_its_bound(outer: str, inner: str) -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch_dtype(outer))
    for scale, offset in ((1.0, 1.0), (1e-3, 5.0), (-700.0, 0.1)):
        operation = Operation(roundings=((outer, inner), (inner, outer)), affines=(Affine(scale, offset),))
        y = (((x.double() * scale + offset).to(torch_dtype(inner)).double() - offset) / scale).to(x.dtype)
        assert 0 < deviation(x, y, operation) <= operation.bound


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16, torch.int64, torch.complex64, torch.float16])
def test_tensors_of_any_dtype_are_compared(dtype: torch.dtype) -> None:
    one = torch.ones(2, 3, dtype=torch.uint8).to(dtype)
    other = one.clone()
    assert difference(one, other, is_converted=False) is None
    other[1, 1] = 0
    found = difference(one, other, is_converted=False)
    assert found is not None
    assert (found.count, found.first) == (1, (1, 1))


# What did not come back


@pytest.mark.parametrize("to", ["te", "hf"])
def test_one_changed_bit_is_found_and_its_tensor_named(to: str, small: Make) -> None:
    source = small()
    made = converted(source, "made") if to == "te" else converted(converted(source, "te"), "made")
    path = next(made.glob("*.safetensors"))
    name = "model.layers.1.self_attn.qkv.weight" if to == "te" else Q.format(1)
    flip(path, place_of(path, name)[0] + 5)
    assert failed(proof(source, made)) == {Q.format(1): "differs"}


def test_swapped_layers_are_found_and_it_is_said_whose_values_they_are(small: Make) -> None:
    source, made = small(), small(name="made")

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q.format(0)], tensors[Q.format(1)] = tensors[Q.format(1)], tensors[Q.format(0)]

    change(made, swap)
    certificate = proof(source, made)
    assert failed(certificate) == {Q.format(0): "differs", Q.format(1): "differs"}
    assert certificate.problems[0].details[-1] == f"these are the values of {Q.format(1)}"


def test_missing_and_extra_tensors_are_named(small: Make) -> None:
    source, made = small(), small(name="made")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.wieght"] = tensors.pop(NORM)

    change(made, edit)
    certificate = proof(source, made)
    assert failed(certificate) == {NORM: "missing", "model.norm.wieght": "extra"}
    text = "\n".join(map(str, certificate.problems))
    assert f"these are the values of {NORM}" in text
    assert "of the checkpoint that no rule uses" in text  # and it could not be loaded


def test_another_shape_is_named(small: Make) -> None:
    source, made = small(), small(name="made", config={"intermediate_size": 64})
    found = failed(proof(source, made))
    assert {name.rpartition("mlp.")[2] for name in found} == {
        "gate_proj.weight",
        "up_proj.weight",
        "down_proj.weight",
    } | {name for name in found if "mlp" not in name}
    assert "of another shape or kind" in str(proof(source, made).problems)


def test_numbers_of_another_kind_are_named_even_if_they_are_equal(small: Make) -> None:
    source, made = small(), small(name="made")
    change(source, lambda tensors: tensors[NORM].fill_(1))
    change(made, lambda tensors: tensors.update({NORM: torch.ones(32, dtype=torch.int32)}))
    certificate = proof(source, made)
    assert failed(certificate) == {NORM: "differs"}
    assert certificate.problems[-1].found == "I32 [32]"


def test_parameters_that_are_missing_are_named_by_an_error(small: Make) -> None:
    source = small()
    te = converted(source, "te")
    change(te, lambda tensors: tensors.pop(NORM), "tepatch.safetensors")
    with pytest.raises(PlanError, match=r"(?s)parameters without a tensor \(1\).*model\.norm\.weight"):
        proof(source, te)


def test_parameters_that_should_be_constants_are_held_to_them(small: Make, tmp_path: Path) -> None:
    mapping = tmp_path / "padded.yaml"
    mapping.write_text(
        "version: 1\nextends: tepatch_llama:llama.tepatch.yaml\nparameters:\n"
        "  model.norm.weight: {create: 1.5}\nignore:\n  - model.norm.weight: replaced\n"
    )
    source = small()
    te = converted(source, "te", mapping=mapping)
    certificate = proof(source, te, mapping=mapping)
    assert certificate.passed, certificate.problems
    assert certificate.constants == 1
    change(te, lambda tensors: tensors[NORM][:1].zero_(), "tepatch.safetensors")
    certificate = proof(source, te, mapping=mapping)
    assert not certificate.passed
    assert NORM in str(certificate.problems[0])


def test_another_config_is_noted(small: Make) -> None:
    source, made = small(), small(name="made")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    certificate = proof(source, made)
    assert certificate.passed
    assert any("rms_norm_eps" in note for note in certificate.notes)


def test_a_checkpoint_proves_nothing_about_itself(small: Make) -> None:
    source = small()
    with pytest.raises(PlanError, match="would prove nothing"):
        proof(source, source)


def test_no_workers_are_refused(small: Make) -> None:
    with pytest.raises(PlanError, match="worker"):
        proof(small(), small(name="made"), workers=0)


# The certificate


def test_the_certificate_is_in_the_destination_and_says_what_was_done(small: Make) -> None:
    source = small()
    te = converted(source, "te")
    certificate = proof(source, te)
    data = json.loads((te / CERTIFICATE).read_text())
    page_sha256 = data.pop("page_sha256")
    assert data == json.loads(json.dumps(certificate.to_json()))
    assert data["format"] == "tepatch-certificate-1"
    assert data["passed"] is True
    assert page_sha256 == hashlib.sha256((te / PAGE).read_bytes()).hexdigest()
    assert data["plugin"].startswith("tepatch-llama ")
    assert {"tepatch", "torch", "transformers"} <= set(data["versions"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", data["created"])
    assert data["layout_sha256"] == json.loads((te / "tepatch.json").read_text())["layout_digest"]
    assert (data["source"]["layout"], data["destination"]["layout"]) == ("hf", "te")
    stored = data["destination"]["stored"]
    with safe_open(te / "tepatch.safetensors", "pt") as file:
        assert set(stored) == set(file.keys())
        for name in stored:
            sha256 = hashlib.sha256(file.get_tensor(name).numpy().tobytes()).hexdigest()
            assert stored[name]["sha256"] == sha256
    for name in ("config.json", "tokenizer.json", "tepatch.json", "README.md"):
        assert data["destination"]["files"][name]["sha256"] == hashlib.sha256((te / name).read_bytes()).hexdigest()
    assert data["totals"]["tensors"] == len(data["tensors"]) == data["totals"]["equal"]


def test_the_certificate_can_go_elsewhere(small: Make, tmp_path: Path) -> None:
    source = small()
    te = converted(source, "te")
    proof(source, te, out=tmp_path / "proofs" / "one")
    assert not (te / CERTIFICATE).exists()
    assert check_certificate(tmp_path / "proofs" / "one", destination=te).passed
    assert not check_certificate(tmp_path / "proofs" / "one").passed
    proof(source, te, write=False)
    assert not (te / CERTIFICATE).exists()


@pytest.mark.parametrize("name", [CERTIFICATE, PAGE])
def test_only_a_certificate_is_replaced(name: str, small: Make) -> None:
    source = small()
    te = converted(source, "te")
    (te / name).write_text('{"mine": 1}')
    with pytest.raises(SaveError, match="is no certificate itself"):
        proof(source, te)
    assert (te / name).read_text() == '{"mine": 1}'
    (te / name).unlink()
    proof(source, te)
    proof(source, te)
    assert check_certificate(te).passed
    assert not list(te.glob(".*"))


def test_a_failed_certificate_takes_the_place_of_one_that_passed(small: Make) -> None:
    source, made = small(), small(name="made")
    assert proof(source, made).passed
    change(made, lambda tensors: tensors[NORM].add_(1))
    assert not proof(source, made).passed
    assert json.loads((made / CERTIFICATE).read_text())["passed"] is False
    assert CERTIFICATE in named(check_certificate(made))


def test_the_page_holds_the_verdict_and_escapes_what_it_is_told(small: Make, tmp_path: Path) -> None:
    source, made = small(), small(name="<img src=x>&{{script}}")
    (made / "<img src=file>").write_text("")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "<img src=field>": 1}))
    certificate = proof(source, made)
    page = (made / PAGE).read_text(encoding="utf-8")
    assert "Passed: every tensor came back bit for bit" in page
    assert "<img" not in page
    assert "&lt;img src=x&gt;&amp;{{script}}" in page
    assert all(tensor.name in page for tensor in certificate.tensors)
    assert not re.search(r"https?:|//|@import|url\(", page)
    change(made, lambda tensors: tensors[NORM].add_(1))
    proof(source, made)
    page = (made / PAGE).read_text(encoding="utf-8")
    assert "Failed: 1 problem<" in page
    assert "<img" not in page
    assert {text for text in ("x", "file", "field") if f"&lt;img src={text}&gt;" not in page} == set()
    assert "32 of 32 elements differ" in page


def test_the_policy_of_the_page_admits_its_own_script_and_style(small: Make) -> None:
    import base64

    made = small(name="made")
    proof(small(), made)
    page = (made / PAGE).read_text(encoding="utf-8")
    for tag in ("style", "script"):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert text is not None
        digest = base64.b64encode(hashlib.sha256(text[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in page


def test_logits_are_compared_when_tokens_are_given(small: Make) -> None:
    source = small()
    te = converted(source, "te")
    parity = proof(source, te, token_ids=[[1, 2, 3, 4]]).parity
    assert parity is not None
    assert parity["passed"] is True
    assert parity["compared"] == "the source with the patch's layers, against transformers"
    assert parity["ours"]["top1_agreement"] == 1.0
    assert "the source with" in (te / PAGE).read_text()


def test_a_mapping_that_puts_tensors_in_the_wrong_place_shows_in_the_logits_only(small: Make, tmp_path: Path) -> None:
    mapping = tmp_path / "swapped.yaml"
    mapping.write_text(
        "version: 1\nextends: tepatch_llama:llama.tepatch.yaml\nparameters:\n  model.layers.{layer}:\n"
        "    mlp.fc1_weight: {concat: [mlp.up_proj.weight, mlp.gate_proj.weight]}\n"
    )
    source = small()
    te = converted(source, "te", mapping=mapping)
    assert proof(source, te, mapping=mapping).passed  # it comes back as it was
    certificate = proof(source, te, mapping=mapping, token_ids=[[1, 2, 3, 4]])
    assert not certificate.passed
    assert certificate.problems[0].what.startswith("the logits do not agree: FAILED")


def test_logits_need_a_side_that_transformers_loads(small: Make) -> None:
    te = converted(small(), "te")
    with pytest.raises(PlanError, match="transformers loads neither"):
        proof(te, converted(te.parent / "checkpoint", "again"), token_ids=[[1, 2]])
    assert not list(te.parent.rglob(CERTIFICATE))


@pytest.mark.parametrize(
    ("token_ids", "found"),
    [
        ([[1, 2], [3]], "expected sequence of length 2"),
        ("text", ""),
        ([["a"]], ""),
        (None, None),
        ([1, 2], "shape [2]"),
        ([], "torch.float32"),
        ([[]], "torch.float32"),
        ([[1.0]], "torch.float32"),
        ([[True]], "torch.bool"),
        ([[2**70]], ""),
        ([[-1, 2]], "from -1 to 2"),
        ([[1, 64]], "from 1 to 64"),
    ],
)
def test_tokens_that_are_none_are_refused_before_anything_is_compared(
    token_ids: Any, found: str | None, small: Make
) -> None:
    source, made = small(), small(name="made")
    change(made, lambda tensors: tensors.pop(NORM))
    if found is None:  # no logits wanted
        assert not proof(source, source.parent / "made").passed
        return
    with pytest.raises(PlanError) as caught:
        proof(source, made, token_ids=token_ids)
    (problem,) = caught.value.problems
    assert problem.where == "token_ids"
    assert found in problem.found
    assert "from 0 to 63" in problem.expected
    assert not (made / CERTIFICATE).exists()


@pytest.mark.parametrize("case", ["variant", "use_safetensors", "file"])
def test_logits_of_other_files_than_transformers_would_load_are_refused(case: str, small: Make) -> None:
    source = small()
    te = converted(source, "te")
    options: dict[str, Any] = {}
    if case == "variant":
        (source / "model.safetensors").rename(source / "model.fp16.safetensors")
        options = {"variant": "fp16"}
    elif case == "use_safetensors":
        shutil.copyfile(small(kind="bin", name="pickled") / "pytorch_model.bin", source / "pytorch_model.bin")
        options = {"use_safetensors": False}
    location = source
    if case == "file":
        location = source / "mine.safetensors"
        shutil.copyfile(source / "model.safetensors", location)
    assert proof(location, te, write=False, **options).passed
    with pytest.raises(PlanError, match="transformers would load other files than were certified"):
        proof(location, te, token_ids=[[1, 2]], **options)
    # What is the default anyway may be named.
    if case != "variant":
        assert proof(source / "model.safetensors", te, token_ids=[[1, 2]]).passed


def test_logits_are_compared_in_the_dtype_that_values_went_through(small: Make) -> None:
    source = small()
    parity = proof(source, converted(source, "te", dtype="bfloat16"), dtype="bfloat16", token_ids=[[1, 2, 3]]).parity
    assert parity is not None
    assert parity["dtype"] == "bfloat16"


# Checking again


@pytest.fixture
def certified(small: Make) -> Callable[..., Path]:
    """Makes a certified checkpoint in several files, in the layout ``to``; its source is ``checkpoint``, beside it."""

    def make(to: str = "te") -> Path:
        source = small()
        made = converted(source, "made" if to == "te" else "te", max_shard_size="20KB")
        if to == "hf":
            made = converted(made, "made", max_shard_size="20KB")
        assert proof(source, made).passed
        assert check_certificate(made).passed
        return made

    return make


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, 8 + length


def place_of(path: Path, name: str) -> tuple[int, int]:
    header, start = header_of(path)
    first, last = header[name]["data_offsets"]
    return start + first, start + last


@pytest.mark.parametrize("to", ["te", "hf"])
def test_a_flipped_bit_anywhere_is_found_and_named(to: str, certified: Make) -> None:
    folder = certified(to)
    files = sorted(path for path in folder.iterdir())
    assert {path.suffix for path in files} == {".json", ".safetensors", ".html", ".md"}
    source = random.Random(20_240_817)
    for path in files:
        whole = path.read_bytes()
        is_weights = path.suffix == ".safetensors"
        places = header_of(path) if is_weights else ({}, 0)
        for position in [0, len(whole) - 1, *(source.randrange(len(whole)) for _ in range(8))]:
            flip(path, position, source.randrange(8))
            found = named(check_certificate(folder))
            assert path.name in found, position
            for name, entry in places[0].items():
                first, last = (places[1] + offset for offset in entry["data_offsets"])
                if first <= position < last:
                    assert found == f"{path}: {name}"
            path.write_bytes(whole)
    assert check_certificate(folder).passed


@pytest.mark.parametrize("where", ["length", "header", "padding", "config.json", "index", "manifest"])
def test_a_damaged_part_does_not_keep_the_others_from_being_checked(where: str, certified: Make) -> None:
    folder = certified()
    first, *_, last = sorted(folder.glob("*.safetensors"))
    names = {"config.json": "config.json", "index": "tepatch.safetensors.index.json", "manifest": "tepatch.json"}
    damaged = folder / names.get(where, first.name)
    flip(damaged, {"length": 6, "header": 40, "padding": header_of(first)[1] - 1}.get(where, 10))
    name = next(iter(header_of(last)[0]))
    flip(last, place_of(last, name)[0])
    found = named(check_certificate(folder)).splitlines()
    assert any(str(damaged) in line for line in found)
    assert f"{last}: {name}" in found


@pytest.mark.parametrize("to", ["te", "hf"])
def test_a_truncated_file_is_named_with_the_tensors_that_are_cut_off(to: str, certified: Make) -> None:
    folder = certified(to)
    path = sorted(folder.glob("*.safetensors"))[1]
    header, _ = header_of(path)
    path.write_bytes(path.read_bytes()[:-1])
    result = check_certificate(folder)
    last = max(header, key=lambda name: header[name]["data_offsets"])
    assert named(result).splitlines() == [str(path), f"{path}: {last}"]
    assert [problem.what for problem in result.problems] == ["is truncated", "is cut off"]


def test_shards_with_swapped_contents_are_named(certified: Make) -> None:
    folder = certified("hf")
    first, second, *others = sorted(folder.glob("*.safetensors"))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    found = named(check_certificate(folder))
    assert str(first) in found
    assert str(second) in found
    assert all(str(other) not in found for other in others)
    assert "is no longer in this file" in str(check_certificate(folder).problems)


def test_swapped_tensors_are_named_and_it_is_said_whose_values_they_are(small: Make) -> None:
    source, made = small(), small(name="made")
    proof(source, made)
    path = made / "model.safetensors"
    data = bytearray(path.read_bytes())
    (a, b), (c, d) = (place_of(path, Q.format(layer)) for layer in (0, 1))
    data[a:b], data[c:d] = data[c:d], data[a:b]
    path.write_bytes(data)
    result = check_certificate(made)
    assert sorted(named(result).splitlines()) == [f"{path}: {Q.format(0)}", f"{path}: {Q.format(1)}"]
    assert {problem.details for problem in result.problems} == {
        (f"these are the values of {Q.format(0)}",),
        (f"these are the values of {Q.format(1)}",),
    }


def test_an_added_tensor_is_named(small: Make) -> None:
    source, made = small(), small(name="made")
    proof(source, made)
    change(made, lambda tensors: tensors.update(added=torch.zeros(3)))
    found = named(check_certificate(made)).splitlines()
    assert found == [str(made / "model.safetensors")] * 2 + [f"{made / 'model.safetensors'}: added"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "tepatch.json", "modeling.py", "generation_config.json"]
)
def test_an_added_file_that_could_change_what_is_loaded_is_named(name: str, certified: Make) -> None:
    folder = certified()
    (folder / name).write_bytes(b"{}")
    assert str(folder / name) in named(check_certificate(folder))


def test_an_added_file_that_changes_nothing_is_noted(certified: Make) -> None:
    folder = certified()
    (folder / "NOTES.txt").write_text("mine")
    result = check_certificate(folder)
    assert result.passed
    assert result.notes == ("NOTES.txt was not there when the checkpoint was certified",)


def test_sub_folders_are_said_not_to_be_covered(small: Make) -> None:
    source, made = small(), small(shards=2, name="made")
    (made / "runs").mkdir()
    (made / "\x1b[31m").mkdir()
    (made / ".cache").mkdir()
    (made / "parts").mkdir()
    index = made / "model.safetensors.index.json"
    first = sorted(made.glob("*.safetensors"))[0]
    index.write_text(index.read_text().replace(first.name, f"parts/{first.name}"))
    first.rename(made / "parts" / first.name)
    note = "sub-folders are not covered: '\\x1b[31m', parts (but for its weights), runs"
    certificate = proof(source, made)
    assert certificate.passed
    assert note in certificate.notes
    assert "runs" in (made / PAGE).read_text()
    assert note in check_certificate(made).notes
    assert not any("sub-folders" in note for note in proof(made, source).notes)  # of the destination only


@pytest.mark.parametrize("field", ["created", "patch", "source.location", "destination.layout", "sha256"])
def test_text_of_a_certificate_that_a_terminal_would_obey_is_named(field: str, certified: Make) -> None:
    folder = certified()
    data: dict[str, Any] = json.loads((folder / CERTIFICATE).read_text())
    inner = data
    *above, key = field.split(".")
    for each in above:
        inner = inner[each]
    inner[key] = "\x1b]0;x\x07"
    if field != "sha256":
        data["sha256"] = body_digest(data)  # as somebody who can compute digests too would do it
    (folder / CERTIFICATE).write_text(certificate_text(data))
    result = check_certificate(folder)
    (problem,) = result.problems
    assert field in str(problem)
    assert "\x1b" not in str(problem) + str(result)


def test_names_that_a_terminal_would_obey_are_shown_escaped(small: Make) -> None:
    source, made = small(), small(name="made\x1b[31m")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "\x1b[31m": 1}))
    certificate = proof(source, made)
    assert certificate.passed
    assert "\x1b" not in "".join((str(certificate), *certificate.notes))
    assert any("config.json differs in '\\x1b[31m'" in note for note in certificate.notes)
    assert check_certificate(made).passed


def test_every_file_that_is_removed_is_named(certified: Make) -> None:
    folder = certified()
    for path in sorted(folder.iterdir()):
        aside = path.rename(folder.parent / "aside")
        if path.name == CERTIFICATE:
            with pytest.raises(CheckpointError, match="no certificate here"):
                check_certificate(folder)
        elif path.name == PAGE:
            assert check_certificate(folder).notes == (f"{PAGE} is not beside the certificate",)
        else:
            (problem,) = check_certificate(folder).problems
            assert (problem.where, problem.what) == (str(path), "is missing")
            assert bool(problem.details) is (path.suffix == ".safetensors")  # the tensors that are gone with it
        aside.rename(path)
    assert check_certificate(folder).passed


def test_a_file_that_is_a_link_out_of_the_folder_is_refused(certified: Make) -> None:
    folder = certified()
    path = folder / "config.json"
    path.rename(folder.parent / "config.json")
    path.symlink_to(folder.parent / "config.json")
    assert str(path) in named(check_certificate(folder))


def test_an_edited_certificate_fails_even_when_nothing_else_does(certified: Make) -> None:
    folder = certified()
    path = folder / CERTIFICATE
    text = path.read_text()
    for edit in (
        text.replace('"patch": "llama"', '"patch": "other"'),
        text.replace("\n", "\n ", 1),
        text.replace('"llama"', '"\\u006clama"'),
    ):
        assert edit != text
        path.write_text(edit)
        assert str(path) in named(check_certificate(folder))
    path.write_text(text)


def test_a_certificate_that_makes_no_sense_is_a_failure_and_no_crash(certified: Make) -> None:
    folder = certified()
    path = folder / CERTIFICATE
    whole = json.loads(path.read_text())
    edits: dict[str, Any] = {
        "destination": {"files": {"../../x": {"bytes": 1}}, "stored": {}, "location": "", "layout": "te"},
        "passed": "yes",
        "source": [],
        "created": float("nan"),
        "page_sha256": 3,
    }
    for key, value in edits.items():
        path.write_text(json.dumps({**whole, key: value}, indent=1) + "\n")
        assert not check_certificate(folder).passed, key
    for text in ("", "[]", "{", '{"format": "tepatch-certificate-2"}', '{"format": "tepatch-certificate-1"}'):
        path.write_text(text)
        assert str(path) in named(check_certificate(folder))


def test_files_outside_the_folder_are_not_looked_at(certified: Make) -> None:
    folder = certified()
    path = folder / CERTIFICATE
    data = json.loads(path.read_text())
    (folder.parent / "x").write_bytes(b"secret")
    data["destination"]["files"]["../x"] = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    data["sha256"] = body_digest(data)
    path.write_text(certificate_text(data))  # as somebody who can compute digests too would do it
    assert "this name is refused" in str(check_certificate(folder).problems)


def test_the_source_can_be_checked_too(certified: Make) -> None:
    folder = certified()
    source = folder.parent / "checkpoint"
    assert check_certificate(folder, source=source).passed
    change(source, lambda tensors: tensors[NORM].add_(1))
    assert named(check_certificate(folder, source=source)) == f"{source}: {NORM}"
    change(source, lambda tensors: tensors.update({"x": tensors.pop(NORM)}))
    assert set(named(check_certificate(folder, source=source)).splitlines()) == {f"{source}: {NORM}", f"{source}: x"}
    shutil.rmtree(source)
    assert not check_certificate(folder, source=source).passed


def test_without_a_certificate_nothing_can_be_checked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no certificate here"):
        check_certificate(tmp_path)


def test_a_real_checkpoint_is_certified(smollm2: Path, tmp_path: Path) -> None:
    tepatch.convert("llama", smollm2, tmp_path / "te")
    certificate = proof(smollm2, tmp_path / "te")
    assert certificate.passed, certificate.problems
    assert statuses(certificate) == {"equal"}
    assert check_certificate(tmp_path / "te").passed
