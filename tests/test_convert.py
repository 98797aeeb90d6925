"""``tepatch.convert`` as a whole: there and back bit for bit, and nothing half-done whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from xxhash import xxh3_128_hexdigest

import tepatch
from tepatch.errors import CheckpointError, PlanError, SaveError, TepatchError
from tepatch.hf.model_plan import plan_of

Make = Callable[..., Any]
Save = Callable[..., Path]


def convert(source: Path, destination: Path, **arguments: Any) -> Any:
    return tepatch.convert("llama", source, destination, **arguments)


def load(folder: Path, **arguments: Any) -> Any:
    return tepatch.load("llama", folder, backend="reference", **arguments)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that the weight files of a folder hold, whatever their kind."""
    out: dict[str, torch.Tensor] = {}
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        part = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        assert not part.keys() & out.keys()
        out |= part
    return out


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stamps(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """What would tell that a file was written, renamed or replaced."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir() if p.is_file()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_there_and_back(folder: Path, **arguments: Any) -> None:
    """hf to te to hf: the same tensors; and te holds the very parameters of a direct load."""
    te, back = folder.parent / "te", folder.parent / "back"
    there = convert(folder, te, **arguments)
    again = convert(te, back, **arguments)
    assert (there.found, there.layout, again.found, again.layout) == ("hf", "te", "te", "hf")
    assert_equal(tensors_in(back), tensors_in(folder))
    for made, each in ((there, te), (again, back)):
        assert made.files == {path.name: path.stat().st_size for path in each.iterdir()}
        assert made.bytes_written == sum(path.stat().st_size for path in each.glob("*.safetensors"))
    mapping = arguments.get("mapping")
    assert_same_parameters(load(te, mapping=mapping), load(folder, mapping=mapping))


def assert_same_parameters(model: Any, expected: Any) -> None:
    found, wanted = (dict(each.named_parameters(remove_duplicate=False)) for each in (model, expected))
    assert_equal(found, wanted)
    assert len({id(each) for each in found.values()}) == len({id(each) for each in wanted.values()}), "ties"


SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "one key head": {"num_key_value_heads": 1},
    "as many key heads": {"num_key_value_heads": 4},
    "all biases, wide heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "narrow heads": {"head_dim": 8},
    "tied": {"tie_word_embeddings": True},
}
INTERLEAVED = """
version: 1
extends: tepatch_llama:llama.tepatch.yaml
parameters:
  model.layers.{layer}:
    self_attn.qkv.weight:
      interleave: [self_attn.q_proj.weight, self_attn.k_proj.weight, self_attn.v_proj.weight]
      over: num_key_value_heads
      sizes: [num_attention_heads // num_key_value_heads * d, d, d]
    self_attn.proj.weight: {of: self_attn.o_proj.weight, transpose: true}
    mlp.fc1_weight: {interleave: [mlp.gate_proj.weight, mlp.up_proj.weight], block: 1}
"""


@pytest.fixture
def interleaved(tmp_path: Path) -> Path:
    """A mapping in which nothing is a run of bytes."""
    path = tmp_path / "interleaved.yaml"
    path.write_text(INTERLEAVED)
    return path


# -- there and back --


@pytest.mark.parametrize("shape", SHAPES)
def test_a_checkpoint_of_any_shape_comes_back(shape: str, tiny_llama: Make, save_checkpoint: Save) -> None:
    assert_there_and_back(save_checkpoint(tiny_llama(**SHAPES[shape]), shards=7), max_shard_size="100KB")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_of_any_kind_and_dtype_comes_back(
    kind: str, shards: int, dtype: torch.dtype, tiny_llama: Make, save_checkpoint: Save
) -> None:
    assert_there_and_back(save_checkpoint(tiny_llama(dtype=dtype), kind=kind, shards=shards))


def test_what_has_to_be_put_together_comes_back(
    interleaved: Path, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama(), shards=3)
    assert_there_and_back(folder, mapping=interleaved)
    fused = tensors_in(tmp_path / "te")["model.layers.1.mlp.fc1_weight"]
    assert torch.equal(fused[1::2], tensors_in(folder)["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_copy_of_a_tied_tensor_comes_back_too(kind: str, tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama(tie_word_embeddings=True)
    head = stock.lm_head.weight.detach().clone()
    folder = save_checkpoint(stock, shards=2, kind=kind, extra={"lm_head.weight": head})
    assert_there_and_back(folder)
    assert "lm_head.weight" not in tensors_in(folder.parent / "te")
    assert "lm_head.weight" in tensors_in(folder.parent / "back")


def test_a_copy_of_a_tied_tensor_that_differs_is_an_error(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    """As when loading: else the conversion would drop one of two tensors that are not alike."""
    stock = tiny_llama(tie_word_embeddings=True)
    folder = save_checkpoint(stock, extra={"lm_head.weight": stock.lm_head.weight.detach() + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        convert(folder, tmp_path / "te")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint"]


def test_what_the_mapping_ignores_stays_behind_and_is_noted(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama()
    ignored = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(3)}
    convert(save_checkpoint(stock, extra=ignored, shards=2), tmp_path / "te")
    manifest = json.loads((tmp_path / "te" / "tepatch.json").read_text())
    assert manifest["ignored"].keys() == ignored.keys()
    assert all("computed from the config" in reason for reason in manifest["ignored"].values())
    assert manifest["originals"].keys() == stock.state_dict().keys()
    convert(tmp_path / "te", tmp_path / "back")
    assert_equal(tensors_in(tmp_path / "back"), stock.state_dict())


def test_the_real_checkpoint_comes_back(smollm2: Path, tmp_path: Path) -> None:
    convert(smollm2, tmp_path / "te")
    convert(tmp_path / "te", tmp_path / "back")
    assert_equal(tensors_in(tmp_path / "back"), tensors_in(smollm2))
    companions = {"config.json", "tokenizer.json", "tokenizer_config.json"} & set(os.listdir(smollm2))
    assert len(companions) > 1
    for name in companions:
        assert (tmp_path / "back" / name).read_bytes() == (smollm2 / name).read_bytes()


@pytest.mark.parametrize("after", [torch.float32, torch.bfloat16, torch.float16])
def test_another_dtype_is_written_when_it_is_asked_for(
    after: torch.dtype, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama(dtype=torch.bfloat16)
    folder = save_checkpoint(stock, shards=2)
    convert(folder, tmp_path / "te", dtype=after)
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "te").values()} == {after}
    assert_same_parameters(load(tmp_path / "te"), load(folder, dtype=after))
    for to, folder_name in ((None, "original"), (torch.float32, "wide")):
        convert(tmp_path / "te", tmp_path / folder_name, **({} if to is None else {"dtype": to}))
        wanted = to or torch.bfloat16
        expected = {name: tensor.to(after).to(wanted) for name, tensor in stock.state_dict().items()}
        assert_equal(tensors_in(tmp_path / folder_name), expected)
        config = json.loads((tmp_path / folder_name / "config.json").read_text())
        assert config["dtype"] == str(wanted).removeprefix("torch.")


def test_tensors_that_a_dtype_rounds_are_counted(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    made = convert(save_checkpoint(tiny_llama()), tmp_path / "te", dtype="bfloat16")
    assert len(made.plan.inexact()) == 30
    assert "30 tensors do not come back bit for bit" in str(made)
    assert len(made.to_json()["inexact"]) == 30


def test_a_value_that_float16_can_not_hold_is_an_error(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    stock = tiny_llama()
    with torch.no_grad():
        stock.model.layers[1].mlp.up_proj.weight[3, 3] = 1e6
    folder = save_checkpoint(stock)
    with pytest.raises(TepatchError, match=r"layers\.1\.mlp\.up_proj\.weight: values that float16 can not hold"):
        convert(folder, tmp_path / "te", dtype="float16")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint"]


# -- the folder that is written --


def test_plain_transformers_refuses_the_folder(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    """An error, and not a model with random weights."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    folder = save_checkpoint(tiny_llama())
    for name, size in (("one", "5GB"), ("many", "100KB")):
        convert(folder, tmp_path / name, max_shard_size=size)
        for cls in (AutoModelForCausalLM, LlamaForCausalLM):
            with pytest.raises(OSError, match="no file named"):
                cls.from_pretrained(tmp_path / name)


def test_companions_come_along_byte_for_byte_both_ways(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_llama(), shards=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mine": "ü"}, indent=7))  # as nobody else writes it
    wanted = ["README.md", "LICENSE", "tokenizer.json", "tokenizer.model", "chat_template.jinja", ".gitattributes"]
    unwanted = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"]
    unwanted += ["pytorch_model.bin", "model.fp16.safetensors", "flax_model.msgpack", "weights.gguf", ".hidden"]
    for index, name in enumerate((*wanted, *unwanted)):
        (folder / name).write_bytes(bytes([index, 0, 255]))
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    convert(folder, tmp_path / "te")
    convert(tmp_path / "te", tmp_path / "back")
    kept = {*wanted, "config.json", "generation_config.json"}
    assert set(os.listdir(tmp_path / "te")) == {*kept, "tepatch.json", "tepatch.safetensors"}
    assert set(os.listdir(tmp_path / "back")) == {*kept, "model.safetensors"}
    for name in kept:
        assert (tmp_path / "te" / name).read_bytes() == (folder / name).read_bytes()
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()


def test_a_link_out_of_the_folder_is_not_followed(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_llama())
    (tmp_path / "secret").write_text("mine")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        convert(folder, tmp_path / "te")
    assert not (tmp_path / "te").exists()


def test_the_manifest_tells_where_it_comes_from(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:

    stock = tiny_llama(dtype=torch.bfloat16)
    folder = save_checkpoint(stock, shards=2)
    convert(folder, tmp_path / "te", dtype="float32")
    manifest = json.loads((tmp_path / "te" / "tepatch.json").read_text())
    assert manifest["patch"] == "llama"
    assert manifest["plugin"].startswith("tepatch-llama ")
    assert (manifest["model_class"], manifest["dtype"]) == ("LlamaForCausalLM", "float32")
    assert manifest["source"] == str(folder)
    assert manifest["source_files"] == {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    digests = {n: xxh3_128_hexdigest(t.view(torch.uint8).numpy().tobytes()) for n, t in tensors_in(folder).items()}
    assert manifest["source_digests"] == digests
    assert {entry["dtype"] for entry in manifest["originals"].values()} == {"BF16"}


@pytest.mark.parametrize("direction", ["to te", "to hf", "interleaved"])
def test_the_bytes_do_not_depend_on_the_workers_or_the_run(
    direction: str, interleaved: Path, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    source, mapping = save_checkpoint(tiny_llama(), shards=5), interleaved if direction == "interleaved" else None
    if direction == "to hf":
        source = convert(source, tmp_path / "te", max_shard_size="80KB").destination
    found = []
    for run, workers in enumerate((1, 3, 1, 8)):
        made = convert(source, tmp_path / str(run), workers=workers, max_shard_size="100KB", mapping=mapping)
        found.append(bytes_in(made.destination))
    assert len(found[0]) > 5
    assert all(each == found[0] for each in found[1:])


def test_no_file_stays_open_and_nothing_is_drawn_at_random(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama(), shards=2)
    before, threads = torch.get_rng_state(), threading.active_count()
    convert(folder, tmp_path / "te", workers=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert threading.active_count() == threads
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    links = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    assert not [link for link in links if link.startswith(str(tmp_path))]


# -- what is refused --


@pytest.mark.parametrize("layout", ["te", "hf"])
def test_the_layout_that_it_is_in_already_is_refused(
    layout: str, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama())
    if layout == "te":
        folder = convert(folder, tmp_path / "te").destination
    with pytest.raises(PlanError, match=f"in the layout '{layout}' already"):
        convert(folder, tmp_path / "out", to=layout)
    assert not (tmp_path / "out").exists()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such layout": ({"to": "onnx"}, "no such layout"),
    "no workers": ({"workers": 0}, "at least one worker"),
    "half a worker": ({"workers": 1.5}, "at least one worker"),
    "no size": ({"max_shard_size": "big"}, "max_shard_size"),
    "no dtype": ({"dtype": "int4"}, "bfloat16"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_arguments_that_make_no_sense_are_refused(
    kind: str, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    arguments, message = WRONG[kind]
    folder = save_checkpoint(tiny_llama())
    with pytest.raises(PlanError, match=message):
        convert(folder, tmp_path / "out", **arguments)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint"]


def test_a_broken_checkpoint_is_refused_before_anything_is_written(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama(), drop=("model.layers.1.mlp.up_proj.weight",))
    with pytest.raises(PlanError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        convert(folder, tmp_path / "te")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint"]


@pytest.mark.parametrize("place", ["the source", "in the source", "around it", "a file"])
def test_no_place_that_holds_something_else_is_written_to(
    place: str, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama(), name="outer/checkpoint")
    (tmp_path / "file").write_text("mine")
    places = {"the source": folder, "in the source": folder / "te", "around it": folder.parent}
    before = bytes_in(tmp_path)
    with pytest.raises(SaveError, match="choose another destination"):
        convert(folder, places.get(place, tmp_path / "file"), overwrite=True)
    assert bytes_in(tmp_path) == before


def test_overwrite_replaces_a_checkpoint_as_a_whole(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    first, second = (save_checkpoint(tiny_llama(seed=seed), name=f"checkpoint{seed}") for seed in (1, 2))
    convert(first, tmp_path / "te", max_shard_size="50KB")
    with pytest.raises(SaveError, match=r"exists(.*\n)*.*--overwrite"):
        convert(second, tmp_path / "te")
    convert(second, tmp_path / "te", overwrite=True)
    convert(second, tmp_path / "fresh")
    assert bytes_in(tmp_path / "te") == bytes_in(tmp_path / "fresh")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint1", "checkpoint2", "fresh", "te"]


# -- mappings and versions --


def test_another_wording_of_the_mapping_is_no_other_layout(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama())
    (tmp_path / "worded.yaml").write_text(
        "version: 1\nextends: tepatch_llama:llama.tepatch.yaml\nparameters:\n"
        "  model.layers.{layer}:\n    mlp.fc2_weight: {of: mlp.down_proj.weight}\n"
    )
    convert(folder, tmp_path / "te", mapping=tmp_path / "worded.yaml")
    manifest = json.loads((tmp_path / "te" / "tepatch.json").read_text())
    assert_same_parameters(load(tmp_path / "te"), load(folder))
    assert plan_of(load(tmp_path / "te")).rules.digest != manifest["mapping_digest"]
    convert(tmp_path / "te", tmp_path / "back")
    assert_equal(tensors_in(tmp_path / "back"), tensors_in(folder))


def test_a_folder_of_another_layout_is_refused_with_the_way_on(
    interleaved: Path, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama())
    te = convert(folder, tmp_path / "te", mapping=interleaved).destination
    manifest = json.loads((te / "tepatch.json").read_text())
    ours = plan_of(load(folder)).rules.digest
    for call in (load, lambda path: tepatch.plan("llama", path), lambda path: convert(path, tmp_path / "back")):
        with pytest.raises(PlanError, match="places tensors elsewhere than the mapping that this was") as caught:
            call(te)
        text = str(caught.value)
        assert str(te / "tepatch.json") in text
        assert manifest["mapping_digest"][:12] in text
        assert ours[:12] in text
        assert str(interleaved) in text
        assert f"converted by {manifest['plugin']}, tepatch {tepatch.__version__}" in text
        assert "--mapping" in text
        assert f"from {folder}" in text
    assert not (tmp_path / "back").exists()
    assert_same_parameters(load(te, mapping=interleaved), load(folder, mapping=interleaved))  # the way that it names


def test_a_folder_of_another_patch_is_refused(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    from dataclasses import replace

    from tepatch.plugins import default_host

    te = convert(save_checkpoint(tiny_llama()), tmp_path / "te").destination
    mine = replace(default_host().patch("llama"), name="mine")
    with pytest.raises(PlanError, match=r"converted with another patch(.*\n)*  fix: name the patch 'llama'"):
        tepatch.load(mine, te, backend="reference")


def test_a_patch_that_was_passed_by_hand_is_named_so(
    interleaved: Path, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    from dataclasses import replace

    from tepatch.plugins import default_host

    mine = replace(default_host().patch("llama"), name="mine")
    folder = save_checkpoint(tiny_llama())
    tepatch.convert(mine, folder, tmp_path / "te", mapping=interleaved)
    with pytest.raises(PlanError, match="converted by a patch that was passed by hand") as caught:
        tepatch.load(mine, tmp_path / "te", backend="reference")
    assert "pip install" not in str(caught.value)
    tepatch.convert(mine, tmp_path / "te", tmp_path / "back", mapping=interleaved)
    assert_equal(tensors_in(tmp_path / "back"), tensors_in(folder))


# -- the manifest --


def lose(te: Path) -> None:
    (te / "tepatch.json").unlink()


def empty(te: Path) -> None:
    (te / "tepatch.json").write_text("")


def cut(te: Path) -> None:
    text = (te / "tepatch.json").read_text()
    (te / "tepatch.json").write_text(text[: len(text) // 2])


def nest(te: Path) -> None:
    (te / "tepatch.json").write_text("[" * 100_000)


def inflate(te: Path) -> None:
    with (te / "tepatch.json").open("ab") as stream:
        stream.truncate(200_000_000)  # a sparse file: nothing of it is written, nor must be read


def link_out(te: Path) -> None:
    (te / "tepatch.json").rename(te.parent / "elsewhere.json")
    (te / "tepatch.json").symlink_to(te.parent / "elsewhere.json")


def make_a_folder_of_it(te: Path) -> None:
    (te / "tepatch.json").unlink()
    (te / "tepatch.json").mkdir()


def change(**values: Any) -> Callable[[Path], None]:
    def spoil(te: Path) -> None:
        data = json.loads((te / "tepatch.json").read_text())
        (te / "tepatch.json").write_text(json.dumps(data | values))

    return spoil


def add_an_original(te: Path) -> None:
    originals = json.loads((te / "tepatch.json").read_text())["originals"]
    change(originals=originals | {"model.extra": {"shape": [1], "dtype": "F32"}})(te)


def widen_an_original(te: Path) -> None:
    originals = json.loads((te / "tepatch.json").read_text())["originals"]
    change(originals=originals | {"model.norm.weight": {"shape": [65], "dtype": "F32"}})(te)


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lose, "no checkpoint was found"),
    "empty": (empty, r"tepatch\.json"),
    "cut short": (cut, r"tepatch\.json"),
    "deeply nested": (nest, r"tepatch\.json"),
    "200 MB": (inflate, r"tepatch\.json: is larger than"),
    "a link outside": (link_out, r"tepatch\.json"),
    "a folder": (make_a_folder_of_it, r"tepatch\.json: is not a file"),
    "of a later format": (change(format="tepatch-checkpoint-9"), "use the version that wrote it"),
    "no text for a patch": (change(patch=3), r"tepatch\.json: patch: is not what a manifest has"),
    "control characters": (change(source="\x1b[2J"), r"tepatch\.json: source: is not"),
    "a list of originals": (change(originals=[]), r"tepatch\.json: originals: is not"),
    "a negative shape": (change(originals={"a": {"shape": [-1], "dtype": "F32"}}), r"originals\.a: is not"),
    "a shape of True": (change(originals={"a": {"shape": [True], "dtype": "F32"}}), r"originals\.a: is not"),
    "no dtype": (change(originals={"a": {"shape": [1], "dtype": "F33"}}), r"originals\.a: is not"),
    "a dtype that is a list": (change(originals={"a": {"shape": [1], "dtype": ["F32"]}}), r"originals\.a: is not"),
    "an original that is null": (change(originals={"a": None}), r"originals\.a: is not"),
    "digests that are none": (change(source_digests={"a": "abc"}), r"source_digests: is not"),
    "sizes that are text": (change(source_files={"a": "1"}), r"source_files: is not"),
    "reasons that are none": (change(ignored={"a": 1}), r"ignored: is not"),
    "another layout": (change(layout_digest="0" * 64), "or this file has been changed since"),
    "no originals": (change(originals={}), "'originals' are not what the parameters are made of"),
    "an original too many": (add_an_original, r"'originals' are not(.*\n)*  model\.extra\n"),
    "an original of another shape": (widen_an_original, r"'originals' are not(.*\n)*  model\.norm\.weight\n"),
}


@pytest.fixture
def converted(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> Path:
    te: Path = convert(save_checkpoint(tiny_llama()), tmp_path / "te").destination
    return te


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_manifest_that_makes_no_sense_is_an_error_of_ours(kind: str, converted: Path, tmp_path: Path) -> None:
    spoil, message = HOSTILE[kind]
    spoil(converted)
    for call in (load, lambda path: convert(path, tmp_path / "back")):
        with pytest.raises((CheckpointError, PlanError), match=message) as caught:
            call(converted)
        assert "\x1b" not in str(caught.value)
    assert not (tmp_path / "back").exists()


def test_tensors_that_do_not_fit_the_manifest_are_named(converted: Path, tmp_path: Path) -> None:
    tensors = load_file(converted / "tepatch.safetensors")
    tensors["stray"] = torch.zeros(1)
    tensors["model.norm.weight"] = torch.zeros(65)
    del tensors["model.layers.1.mlp.fc1_weight"]
    save_file(tensors, converted / "tepatch.safetensors")
    with pytest.raises(PlanError) as caught:
        load(converted)
    text = str(caught.value)
    assert "parameters without a tensor (1)" in text
    for name in ("stray", "model.norm.weight", "model.layers.1.mlp.fc1_weight"):
        assert name in text
    assert len(caught.value.problems) == 3


def test_a_dtype_of_the_manifest_that_holds_no_weights_is_an_error(converted: Path, tmp_path: Path) -> None:
    change(dtype="int8")(converted)
    with pytest.raises(PlanError, match="int8"):
        convert(converted, tmp_path / "back")
    assert not (tmp_path / "back").exists()


# -- killed --

# One process imports all that is needed and forks what is killed: a start would take seconds each time. The n-th kill
# comes when n files are complete, and a moment that is left to chance later.
KILL = """
import os, random, signal, sys, time
from pathlib import Path
import torch, tepatch, tepatch.conversion, tepatch_llama.layer
from transformers import LlamaForCausalLM

kills, places = int(sys.argv[1]), sys.argv[2:]
torch.set_num_threads(1)
chance = random.Random(0)

def lines(journal):
    try:
        return journal.read_bytes().count(bytes([10]))
    except FileNotFoundError:  # not there yet, or tidied up already
        return 0

for source, root in zip(places[::2], map(Path, places[1::2])):
    for number in range(kills):
        journal = root / str(number) / ".out.tepatch-partial" / "journal"
        child = os.fork()
        if child == 0:
            try:
                tepatch.convert("llama", source, root / str(number) / "out", max_shard_size="40KB", progress=False)
                os._exit(0)
            except BaseException as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(1)
        # A run that is done before it is seen at work is no error; how many were killed is counted in the end.
        status = (0, 0)
        while status == (0, 0) and lines(journal) < 1 + number:
            status = os.waitpid(child, os.WNOHANG)
        if status == (0, 0):
            time.sleep(chance.random() * 0.01)
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)
        if os.WIFEXITED(status[1]) and os.WEXITSTATUS(status[1]) != 0:
            sys.exit(f"{number} has failed")
"""


def journaled(folder: Path) -> dict[str, tuple[int, int]]:
    """The weight files that a killed run has finished, each with what would change if it were written again."""
    staged = folder / ".out.tepatch-partial"
    if not (staged / "journal").exists():
        return {}
    found = {}
    for line in (staged / "journal").read_text().splitlines()[1:]:
        path = staged / "new" / json.loads(line)["file"]
        if path.suffix == ".safetensors" and path.exists():
            found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def test_a_conversion_that_was_killed_goes_on_where_it_was(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama(), shards=4)
    te = convert(folder, tmp_path / "te", max_shard_size="90KB").destination
    kills, roots = 8, {folder: tmp_path / "to te", te: tmp_path / "to hf"}
    before = {source: stamps(source) for source in roots}
    command = [sys.executable, "-c", KILL, str(kills)]
    for source, root in roots.items():
        command += [str(source), str(root)]
        for number in range(kills):
            (root / str(number)).mkdir(parents=True)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for source, root in roots.items():
        whole = convert(source, tmp_path / f"undisturbed {root.name}", max_shard_size="40KB")
        states = [finish(source, root / str(number), whole) for number in range(kills)]
        print(f"{root.name}: shards complete at the kill, of {len(whole.files)} files: {states}")
        killed = [state for state in states if state is not None]
        assert len(killed) > kills // 2, "else this has shown nothing"
        assert max(killed) > 2
    assert before == {source: stamps(source) for source in roots}


def finish(source: Path, folder: Path, whole: Any) -> int | None:
    """Look at what a kill has left, run the same again, and hold it against an undisturbed conversion.

    Returns the number of shards that were complete; None if all was complete when the kill came.
    """
    if (folder / "out").exists():
        assert bytes_in(folder / "out") == bytes_in(whole.destination)
        if os.listdir(folder) != ["out"]:  # killed after the last rename: the next run tidies up, and changes nothing
            with pytest.raises(SaveError, match="only tidying up was not"):
                convert(source, folder / "out", max_shard_size="40KB")
        assert os.listdir(folder) == ["out"]
        assert bytes_in(folder / "out") == bytes_in(whole.destination)
        return None
    assert os.listdir(folder) == [".out.tepatch-partial"], "the destination is absent"
    finished = journaled(folder)
    for name in finished:
        staged = folder / ".out.tepatch-partial" / "new" / name
        assert staged.read_bytes() == (whole.destination / name).read_bytes()
    made = convert(source, folder / "out", max_shard_size="40KB")
    shards = {name: size for name, size in whole.files.items() if name.endswith(".safetensors")}
    assert made.bytes_written == sum(size for name, size in shards.items() if name not in finished)
    assert not finished or "going on" in str(made)
    for name, stamp in finished.items():
        status = (folder / "out" / name).stat()
        assert (status.st_ino, status.st_mtime_ns) == stamp, f"{name} was complete, and was written again"
    assert os.listdir(folder) == ["out"]
    assert bytes_in(folder / "out") == bytes_in(whole.destination)
    return len(finished)


@pytest.mark.parametrize("other", ["another dtype", "other shards", "another source", "another mapping"])
def test_the_files_of_another_conversion_are_not_gone_on_with(
    other: str, interleaved: Path, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path, after_shard: Any
) -> None:
    folder = save_checkpoint(tiny_llama(), shards=2)

    def interrupt() -> None:
        raise KeyboardInterrupt

    after_shard(3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "te", max_shard_size="60KB")
    assert 3 <= len(os.listdir(tmp_path / ".te.tepatch-partial" / "new")) < 10
    arguments: dict[str, Any] = {"max_shard_size": "60KB"}
    if other == "another source":
        folder = save_checkpoint(tiny_llama(seed=1), shards=2)  # in its place: the same names and sizes
    else:
        arguments |= {
            "another dtype": {"dtype": "bfloat16"},
            "other shards": {"max_shard_size": "61KB"},
            "another mapping": {"mapping": interleaved},
        }[other]
    fresh = convert(folder, tmp_path / "fresh", **arguments)
    made = convert(folder, tmp_path / "te", **arguments)
    is_same = other == "other shards" and made.files == fresh.files
    assert made.bytes_written == fresh.bytes_written or is_same
    assert bytes_in(tmp_path / "te") == bytes_in(tmp_path / "fresh")


# -- disturbed --


@pytest.fixture
def after_shard(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """``after_shard(count, action)``: the action is done once, as soon as that many weight files have their names."""
    replace = os.replace
    armed: list[tuple[int, Callable[[], object]]] = []
    seen: list[str] = []

    def replacing(before: Any, after: Any) -> None:
        replace(before, after)
        if str(after).endswith(".safetensors"):
            seen.append(str(after))
        if armed and len(seen) == armed[0][0]:
            armed.pop()[1]()

    monkeypatch.setattr(os, "replace", replacing)

    def arm(count: int, action: Callable[[], object]) -> None:
        seen.clear()
        armed.append((count, action))

    return arm


def touch(path: Path) -> None:
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))


def append(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"more")


def put_another_in_its_place(path: Path) -> None:
    shutil.copyfile(path, path.with_name("copy"))
    os.rename(path.with_name("copy"), path)


def delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("disturb", [touch, append, put_another_in_its_place, delete], ids=lambda each: each.__name__)
@pytest.mark.parametrize(("moment", "kind"), [("early", "safetensors"), ("late", "safetensors"), ("late", "bin")])
def test_a_source_that_changes_meanwhile_is_an_error(
    disturb: Callable[[Path], None],
    moment: str,
    kind: str,
    tiny_llama: Make,
    save_checkpoint: Save,
    tmp_path: Path,
    after_shard: Any,
) -> None:
    """Also when it changes after its last tensor was read: what was read before may be of either version."""
    folder = save_checkpoint(tiny_llama(), shards=3, kind=kind)
    victim = sorted(folder.glob(f"*.{kind}"))[1]
    whole = convert(folder, tmp_path / "undisturbed", max_shard_size="60KB")
    shards = [name for name in whole.files if name.endswith(".safetensors")]
    after_shard(1 if moment == "early" else len(shards), lambda: disturb(victim))
    with pytest.raises(CheckpointError, match=rf"{victim.name}: (has changed|is gone) since its header was read"):
        convert(folder, tmp_path / "te", max_shard_size="60KB")
    assert not (tmp_path / "te").exists()
    if disturb in (touch, put_another_in_its_place):  # the next run is of a source that is whole, and another job
        made = convert(folder, tmp_path / "te", max_shard_size="60KB")
        assert made.bytes_written == whole.bytes_written
        assert "removed the unfinished files of another job" in str(made)
        assert bytes_in(tmp_path / "te") == bytes_in(whole.destination)


def test_an_interrupt_stops_all_workers_and_the_next_run_goes_on(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path, after_shard: Any
) -> None:
    folder = save_checkpoint(tiny_llama(), shards=2)
    before, threads = stamps(folder), threading.active_count()

    def interrupt() -> None:
        raise KeyboardInterrupt

    after_shard(2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "te", max_shard_size="60KB", workers=4)
    assert threading.active_count() == threads
    assert not (tmp_path / "te").exists()
    whole = convert(folder, tmp_path / "whole", max_shard_size="60KB")
    made = convert(folder, tmp_path / "te", max_shard_size="60KB")
    assert 0 < made.bytes_written < whole.bytes_written
    assert bytes_in(tmp_path / "te") == bytes_in(tmp_path / "whole")
    assert stamps(folder) == before


SMALL_DISK = """
import json, os, subprocess, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import tepatch

disk, folder = Path(sys.argv[1]), sys.argv[2]
model = tepatch.load("llama", folder, backend="reference")
work = {
    "save": lambda: tepatch.save(model, disk / "out", max_shard_size="60KB"),
    "convert": lambda: tepatch.convert("llama", folder, disk / "out", max_shard_size="60KB"),
}

def attempt(what):
    try:
        work[what]()
        outcome, text = "done", ""
    except tepatch.TepatchError as error:
        outcome, text = type(error).__name__, str(error)
    names = sorted(str(path.relative_to(disk)) for path in disk.rglob("*") if path.is_file())
    print(json.dumps([what, outcome, text, names]))
    if outcome == "done":
        print(json.dumps({path.name: path.read_bytes().hex() for path in (disk / "out").iterdir()}))
        subprocess.run(["rm", "-r", disk / "out"], check=True)

def fill(nbytes):
    with open(disk / "blob", "wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, nbytes)

def free():
    status = os.statvfs(disk)
    return status.f_bavail * status.f_bsize

for what in work:
    # full from the start: of 2 MB, 0.2 are free, and 0.44 are wanted
    fill(free() - 200_000)
    attempt(what)
    os.unlink(disk / "blob")
    # full after the check, when three files are written
    replace, seen = os.replace, []
    def replacing(before, after):
        replace(before, after)
        seen.append(after)
        if len(seen) == 4:  # the journal is the first
            fill(free())
    os.replace = replacing
    attempt(what)
    os.replace = replace
    (disk / "blob").unlink()
    attempt(what)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    attempt(what)
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
"""


def test_a_disk_that_is_full_or_read_only_is_told_and_nothing_half_stays(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder, disk = save_checkpoint(tiny_llama()), tmp_path / "disk"
    disk.mkdir()
    before = stamps(folder)
    # In a name space of its own: root is not needed, and nothing can be left mounted.
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=2m tmpfs "$0" && exec "$@"', str(disk)]
    try:
        subprocess.run([*mount, "true"], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs a mount of its own: {getattr(error, 'stderr', '') or error}")
    command = [*mount, sys.executable, "-c", SMALL_DISK, str(disk), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 10
    for what, (full, filled, again, written, read_only) in (("save", lines[:5]), ("convert", lines[5:])):
        assert full[:2] == [what, "SaveError"]
        assert "not enough space" in full[2]
        assert full[3] == ["blob"], "nothing was begun"
        assert filled[:2] == [what, "SaveError"]
        assert "No space left on device" in filled[2]
        assert "free some space" in filled[2]
        finished = [name for name in filled[3] if name.endswith(".safetensors")]
        assert 3 <= len(finished) < 10 if what == "convert" else not finished
        staged = {f".out.tepatch-partial/{name}" for name in ("journal", "lock")}
        assert set(filled[3]) - {*finished, "blob"} <= staged
        assert all(name.startswith(".out.tepatch-partial/new/tepatch-") for name in finished)
        assert again[:2] == [what, "done"]
        assert not [name for name in again[3] if not name.startswith("out/")]
        assert read_only[:2] == [what, "SaveError"]
        assert "read-only file system" in read_only[2]
        assert not read_only[3]
        if what == "convert":
            whole = convert(folder, tmp_path / "whole", max_shard_size="60KB").destination
        else:
            tepatch.save(load(folder), tmp_path / "saved", max_shard_size="60KB")
            whole = tmp_path / "saved"
        assert {name: bytes.fromhex(data) for name, data in written.items()} == bytes_in(whole)
    assert stamps(folder) == before


def test_two_conversions_to_one_place_do_not_mix(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    """One of them is refused, or comes when the other is done; there never is a mixture."""
    folders = [save_checkpoint(tiny_llama(seed=seed), name=f"checkpoint{seed}") for seed in (1, 2)]
    wanted = [bytes_in(convert(folder, tmp_path / f"alone{n}").destination) for n, folder in enumerate(folders)]
    outcomes: list[str] = []

    def work(folder: Path) -> None:
        try:
            convert(folder, tmp_path / "te", max_shard_size="5GB")
            outcomes.append("done")
        except SaveError as error:
            outcomes.append(str(error))

    workers = [threading.Thread(target=work, args=(folder,)) for folder in folders]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert outcomes.count("done") == 1
    (refused,) = [outcome for outcome in outcomes if outcome != "done"]
    assert "another process is writing" in refused or "exists" in refused
    assert bytes_in(tmp_path / "te") in wanted
    assert not (tmp_path / ".te.tepatch-partial").exists()
