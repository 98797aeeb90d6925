"""Device maps, and accelerate's hooks: every tensor ends where it should, and the model computes and saves the same.

On a CPU the places are "cpu" and "disk"; what is on the disk is on the meta device between two uses, as weights
that wait on the CPU for a GPU are.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import attach_align_device_hook
from safetensors.torch import load_file

import tepatch
from tepatch.errors import BackendError, LoadError, PlanError, SaveError, UnsupportedError
from tepatch.hf.placement import Placement
from tepatch.hf.state import patched_names

Make = Callable[..., Any]
Save = Callable[..., Path]
IDS = torch.randint(1, 128, (2, 17), generator=torch.Generator().manual_seed(1))
PARTS = {
    "model.embed_tokens": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def load(folder: Path, **arguments: Any) -> Any:
    return tepatch.load("llama", folder, backend="reference", **arguments)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(IDS).logits
    return out


def generated(model: Any) -> torch.Tensor:
    with warnings.catch_warnings():  # of a first parameter that is away, by the older transformers
        warnings.filterwarnings("ignore", "You are calling .generate\\(\\) with the `input_ids`")
        out: torch.Tensor = model.generate(IDS, max_new_tokens=3, do_sample=False)
    return out


def away(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


# -- a map --


@pytest.mark.parametrize(
    "device_map", ["auto", "balanced", "balanced_low_0", "sequential", "cpu", torch.device("cpu"), {"": "cpu"}], ids=str
)
def test_a_model_that_is_in_one_place_has_no_hooks(device_map: Any, tiny_llama: Make, save_checkpoint: Save) -> None:
    folder = save_checkpoint(tiny_llama())
    model = load(folder, device_map=device_map)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert not hasattr(model, "hf_device_map"), "as from_pretrained has it"
    assert model.tepatch.device == "cpu"
    assert torch.equal(logits(model), logits(load(folder)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_on_the_disk_computes_the_same(
    dtype: torch.dtype, tied: bool, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama(tie_word_embeddings=tied), shards=5)
    plain = load(folder, dtype=dtype)
    model = load(folder, dtype=dtype, device_map=PARTS, offload_folder=tmp_path / "offload")
    assert model.hf_device_map == PARTS
    assert model.tepatch.device == "disk, cpu"
    on_disk = {"model.embed_tokens.weight", "lm_head.weight"}
    on_disk |= {name for name, _ in plain.named_parameters() if name.startswith("model.layers.1.")}
    assert away(model) == on_disk
    assert {path.stem for path in (tmp_path / "offload").glob("*.dat")} == on_disk
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(logits(model), logits(plain))
    assert away(model) == on_disk, "they went back after use"
    assert torch.equal(generated(model), generated(plain))


def test_the_same_map_means_the_same_to_from_pretrained(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama())
    theirs = type(tiny_llama()).from_pretrained(folder, device_map=PARTS, offload_folder=tmp_path / "theirs")
    ours = load(folder, device_map=PARTS, offload_folder=tmp_path / "ours")
    assert ours.hf_device_map == theirs.hf_device_map
    for path in ("", "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"):
        hooks = [each.get_submodule(path)._hf_hook for each in (ours, theirs)]
        assert str(hooks[0]) == str(hooks[1]), path


@pytest.mark.parametrize("strategy", ["auto", "sequential"])
def test_a_computed_map_keeps_layers_whole_and_within_the_limits(
    strategy: str, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama())
    for dtype, limit in ((torch.float16, 165_000), (torch.float64, 660_000)):
        offload = tmp_path / f"{limit}"
        model = load(folder, dtype=dtype, device_map=strategy, max_memory={"cpu": limit}, offload_folder=offload)
        places = model.hf_device_map
        assert {place for path, place in places.items() if ".layers." in path} == {"cpu", "disk"}
        assert not any(len(path.split(".")) > 3 for path in places), "nothing below a layer"
        here = sum(p.nbytes for p in model.parameters() if not p.is_meta)
        assert limit / 3 < here <= limit
        assert torch.equal(logits(model), logits(load(folder, dtype=dtype)))


def test_parameters_for_the_disk_are_filled_in_their_files(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    """What accelerate would write (it finds an index, and does not) is there already, byte for byte."""
    folder = save_checkpoint(tiny_llama(dtype=torch.bfloat16))
    model = load(folder, device_map=PARTS, offload_folder=tmp_path / "ours")
    with patched_names():
        state = {name: tensor for name, tensor in load(folder).state_dict().items() if name in away(model)}
    accelerate.utils.offload_state_dict(tmp_path / "theirs", state)
    files = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir() if path.suffix == ".dat"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").glob("*.dat")} == files
    ours, theirs = (json.loads((tmp_path / name / "index.json").read_text()) for name in ("ours", "theirs"))
    assert ours == theirs


# -- what is refused, before a weight is read --

BESIDE = {name: place for name, place in PARTS.items() if name != "lm_head"}
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "device beside it": ({"device": "cpu", "device_map": "auto"}, PlanError, "both say where"),
    "no map": ({"max_memory": {"cpu": "1GB"}}, PlanError, "max_memory: has a meaning for a device map only"),
    "no map, a folder": ({"offload_folder": "x"}, PlanError, "offload_folder: has a meaning"),
    "limits beside a map": ({"device_map": PARTS, "max_memory": {"cpu": 1}}, PlanError, "max_memory has no meaning"),
    "a typo": ({"device_map": "autom"}, PlanError, "this is no device"),
    "a negative number": ({"device_map": -1}, PlanError, "this is no device"),
    "no number": ({"device_map": True}, PlanError, "this is no device"),
    "a strategy for a part": ({"device_map": {"": "auto"}}, PlanError, r"device_map\[''\]: this is no device"),
    "no device of torch": ({"device_map": {"": "gpu"}}, PlanError, "this is no device"),
    "empty": ({"device_map": {}}, PlanError, "the map is empty"),
    "a device that is not here": (
        {"device_map": {"": 99}},
        BackendError,
        "device=cuda:99: this device",
    ),
    "a device without values": ({"device_map": "meta"}, BackendError, "device=meta"),
    "unknown modules": (
        {"device_map": {**PARTS, "model.layers.7": "cpu", "transformer": "cpu"}},
        PlanError,
        r"does not have \(2\)\n  model\.layers\.7\n  transformer",
    ),
    "a parameter is no module": ({"device_map": {**PARTS, "lm_head.weight": "cpu"}}, PlanError, r"lm_head\.weight"),
    "parameters left": ({"device_map": BESIDE}, PlanError, r"have no device \(1\)\n  lm_head\.weight"),
    "no folder": ({"device_map": PARTS}, PlanError, r"no folder for them\n  model\.embed_tokens\.weight"),
    "limits of nonsense": ({"device_map": "auto", "max_memory": {"cpu": "much"}}, PlanError, "can not compute 'auto'"),
    "limits too small": ({"device_map": "auto", "max_memory": {"cpu": 10}}, PlanError, "no folder for them"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_map_that_does_not_fit_is_refused(
    case: str, tiny_llama: Make, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, error, text = WRONG[case]
    folder = save_checkpoint(tiny_llama())
    monkeypatch.setattr("tepatch.loading.load_tensors", pytest.fail)  # no weight is read
    with pytest.raises(error, match=text):
        load(folder, **arguments)


def test_tied_parameters_stay_together(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_llama(tie_word_embeddings=True))
    with pytest.raises(PlanError, match=r"one tied parameter.*\n  model\.embed_tokens\.weight: disk\n  lm_head.*: cpu"):
        load(folder, device_map={**PARTS, "lm_head": "cpu"}, offload_folder=tmp_path / "offload")


def test_accelerate_is_asked_for_by_name(
    tiny_llama: Make, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_checkpoint(tiny_llama())
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(PlanError, match="pip install accelerate"):
        load(folder, device_map="auto")


def test_an_offload_folder_is_used_by_one_model(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    folder, offload = save_checkpoint(tiny_llama()), tmp_path / "offload"
    offload.mkdir()
    model = load(folder, device_map=PARTS, offload_folder=offload)
    other = save_checkpoint(tiny_llama(seed=1), name="other")
    with pytest.raises(PlanError, match="the offload folder is not empty"):
        load(other, device_map=PARTS, offload_folder=offload)
    assert torch.equal(logits(model), logits(load(folder)))
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match="can not be used"):
        load(folder, device_map=PARTS, offload_folder=tmp_path / "file")


def test_a_load_that_fails_leaves_the_offload_folder_empty(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama()
    with torch.no_grad():
        stock.model.layers[2].mlp.up_proj.weight[3, 3] = 1e6
    folder = save_checkpoint(stock, shards=4)
    with pytest.raises(LoadError, match="float16 can not hold"):
        load(folder, dtype=torch.float16, device_map=PARTS, offload_folder=tmp_path / "offload")
    assert list((tmp_path / "offload").iterdir()) == []


# -- hooks that come afterwards --

BELOW = {
    "model.embed_tokens": "disk",
    "model.layers.0": "disk",
    "model.layers.1.self_attn": "cpu",
    "model.layers.1.mlp": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}


def cpu_offload(model: Any, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device="cpu")


def disk_offload(model: Any, folder: Path) -> None:
    accelerate.disk_offload(model, folder / "offload", execution_device="cpu")


def dispatch_model(model: Any, folder: Path) -> None:
    accelerate.dispatch_model(model, PARTS, offload_dir=folder / "offload")


def dispatch_model_below_layers(model: Any, folder: Path) -> None:
    accelerate.dispatch_model(model, BELOW, offload_dir=folder / "offload")


def align_devices(model: Any, folder: Path) -> None:
    attach_align_device_hook(model, execution_device="cpu", offload=True)


def align_devices_of_own_names(model: Any, folder: Path) -> None:
    with patched_names():
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach_align_device_hook(model, execution_device="cpu", offload=True, weights_map=state)


HOOKS = pytest.mark.parametrize(
    "hook",
    [cpu_offload, disk_offload, dispatch_model, dispatch_model_below_layers, align_devices, align_devices_of_own_names],
    ids=lambda hook: hook.__name__,
)


@HOOKS
@pytest.mark.parametrize("tied", [False, True])
def test_hooks_that_come_later_change_nothing(
    hook: Callable[[Any, Path], None], tied: bool, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama(tie_word_embeddings=tied)
    folder = save_checkpoint(stock)
    plain, model = load(folder), load(folder)
    hook(model, tmp_path)
    assert len(away(model)) >= 8
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(generated(model), generated(plain))
    state = model.state_dict()
    assert state.keys() == stock.state_dict().keys()
    assert state["model.layers.1.mlp.up_proj.weight"].is_meta, "as Hugging Face's: what is away is not brought back"
    is_mapped = hasattr(model, "hf_device_map")
    with pytest.warns(UserWarning, match="offloaded modules") if is_mapped else nullcontext():
        model.save_pretrained(tmp_path / "theirs")
    tepatch.save(model, tmp_path / "ours")
    for name in ("theirs", "ours"):
        assert_equal(load_file(tmp_path / name / "model.safetensors"), load_file(folder / "model.safetensors"))
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert not away(model)
    assert_equal(dict(model.state_dict()), dict(stock.state_dict()))


def test_what_is_offloaded_is_saved_in_shards(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_llama())
    model = load(folder, device_map=PARTS, offload_folder=tmp_path / "offload")
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    found: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "saved").glob("*.safetensors"):
        found |= load_file(path)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    assert_equal(found, load_file(folder / "model.safetensors"))


def test_a_state_dict_of_what_is_away_is_refused_with_the_way_out(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    model = load(save_checkpoint(tiny_llama()))
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(SaveError, match=r"on the meta device \(27\)(.*\n)*.*leave state_dict out"):
        model.save_pretrained(tmp_path / "saved", state_dict=model.state_dict())
    with patched_names():
        own = model.state_dict()
    model.save_pretrained(tmp_path / "own", state_dict=own)
    assert load_file(tmp_path / "own" / "model.safetensors").keys() == model.state_dict().keys()
    assert not (tmp_path / "saved").exists()


def test_parameters_that_nobody_keeps_are_not_saved(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    model = load(save_checkpoint(tiny_llama()))
    model.model.layers[1].to("meta")
    accelerate.cpu_offload(model.model.layers[0], execution_device="cpu")
    for save in (model.save_pretrained, lambda folder: tepatch.save(model, folder)):
        with pytest.raises(SaveError, match=r"model: parameters are on the meta device \(6\).*\n  model\.layers\.1\."):
            save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_accelerates_own_state_dict_of_an_offloaded_model_is_saved(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    """It goes through the modules, and so has the parameters' own names."""
    folder = save_checkpoint(tiny_llama())
    model = load(folder)
    accelerate.cpu_offload(model, execution_device="cpu")
    state = accelerate.utils.modeling.get_state_dict_offloaded_model(model)
    model.save_pretrained(tmp_path / "saved", state_dict=state)
    assert_equal(load_file(tmp_path / "saved" / "model.safetensors"), load_file(folder / "model.safetensors"))


def test_constants_of_offloaded_parameters_are_still_checked(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("""
version: 1
extends: tepatch_llama:llama.tepatch.yaml
parameters:
  model.layers.{layer}:
    mlp.fc1_bias: {create: 0}
    mlp.fc2_bias: {create: 0}
""")
    stock = tiny_llama()
    config = copy.deepcopy(stock.config)
    config.mlp_bias = True
    model = load(save_checkpoint(stock), mapping=tmp_path / "mine.yaml", config=config)
    with torch.no_grad():
        model.model.layers[1].mlp.fc2_bias[5] = 0.5
    accelerate.cpu_offload(model, execution_device="cpu")
    for save in (model.save_pretrained, lambda folder: tepatch.save(model, folder)):
        with pytest.raises(SaveError, match=r"model\.layers\.1\.mlp\.fc2_bias"):
            save(tmp_path / "saved")


def test_a_projection_of_an_offloaded_layer_is_not_computed_from_nothing(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    model = load(save_checkpoint(tiny_llama()), device_map=PARTS, offload_folder=tmp_path / "offload")
    with pytest.raises(UnsupportedError, match=r"model\.layers\.1\.self_attn\.q_proj.*(.*\n)*.*meta device"):
        model.model.layers[1].self_attn.q_proj(torch.ones(1, 2, 64))


def test_the_cpu_has_no_number(tiny_llama: Make, save_checkpoint: Save) -> None:
    folder = save_checkpoint(tiny_llama())
    model = load(folder, device_map={"model": "cpu", "lm_head": "cpu:0"})
    assert torch.equal(model(IDS).logits, load(folder)(IDS).logits)


@pytest.mark.parametrize("device", [["cpu"], {"": "cpu"}, object(), "hpu", "privateuseone"])
def test_what_is_no_device_is_named(device: Any, tiny_llama: Make, save_checkpoint: Save) -> None:
    with pytest.raises(BackendError, match="this device can not be used"):
        load(save_checkpoint(tiny_llama()), device=device)


def test_parameters_off_the_gpus_are_known(tmp_path: Path) -> None:
    """Weights that are held quantized must not be among them."""
    places = {"model.embed_tokens": 0, "model.layers.0": "cpu", "model.layers.1": 1, "model.layers.2": "disk"}
    placement = Placement(device_map=places, main=torch.device("cpu"), folder=tmp_path)
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.fc1_weight" for i in range(3))]
    assert placement.off_gpu(names) == [names[1], names[3]]
