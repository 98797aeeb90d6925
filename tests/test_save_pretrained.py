"""What ``save_pretrained`` of a patched model writes is the stock model's checkpoint, bit for bit."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tepatch
from tepatch.errors import PlanError, SaveError, UnsupportedError
from tepatch.hf.state import patched_names

Make = Callable[..., Any]
Save = Callable[..., Path]


def load(folder: Path, **arguments: Any) -> Any:
    return tepatch.load("llama", folder, backend="reference", **arguments)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that the safetensors files of a folder hold."""
    from safetensors.torch import load_file

    out: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not part.keys() & out.keys()
        out |= part
    return out


def assert_same_model(folder: Path, stock: Any) -> None:
    """Plain transformers loads the folder without a remark, into what ``stock`` is."""
    loaded, told = type(stock).from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(told.values()), told
    assert_equal(loaded.state_dict(), stock.state_dict())
    config, expected = (each.config.to_dict() for each in (loaded, stock))
    assert config | {"_name_or_path": ""} == expected | {"_name_or_path": ""}


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "one key head": {"num_key_value_heads": 1},
    "as many key heads": {"num_key_value_heads": 4},
    "attention biases": {"attention_bias": True},
    "mlp biases": {"mlp_bias": True},
    "all biases, wide heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "narrow heads": {"head_dim": 8},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_checkpoint_of_any_shape_comes_back(shape: str, tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama(**SHAPES[shape])
    folder = save_checkpoint(stock, shards=7)  # q, k and v, gate and up, each in files of their own
    load(folder).save_pretrained(folder.parent / "saved")
    assert_equal(tensors_in(folder.parent / "saved"), tensors_in(folder))
    assert_same_model(folder.parent / "saved", stock)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_of_any_kind_and_dtype_comes_back(
    kind: str, dtype: torch.dtype, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama(dtype=dtype)
    load(save_checkpoint(stock, kind=kind)).save_pretrained(tmp_path / "saved")
    assert_same_model(tmp_path / "saved", stock)


def test_layouts_that_are_no_plain_rows_come_back(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("""
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
""")
    stock = tiny_llama()
    model = load(save_checkpoint(stock), mapping=tmp_path / "mine.yaml")
    model.save_pretrained(tmp_path / "saved")
    assert_same_model(tmp_path / "saved", stock)


def test_a_real_checkpoint_comes_back(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    load(smollm2).save_pretrained(tmp_path / "saved")
    found = tensors_in(tmp_path / "saved")
    assert_equal(found, tensors_in(smollm2))
    stock = AutoModelForCausalLM.from_pretrained(smollm2, dtype="auto")
    assert_same_model(tmp_path / "saved", stock)


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_is_saved(tied: bool, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    stock = tiny_llama(tie_word_embeddings=tied)
    model = load(save_checkpoint(stock))
    for each in (model, stock):
        torch.manual_seed(3)
        each.resize_token_embeddings(150)
    model.save_pretrained(tmp_path / "saved")
    assert_same_model(tmp_path / "saved", stock)
    assert_equal(load(tmp_path / "saved").state_dict(), stock.state_dict())


def test_shards_variants_and_the_index_are_those_of_transformers(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    stock = tiny_llama()
    model = load(save_checkpoint(stock))
    for each, name in ((model, "ours"), (stock, "theirs")):
        each.save_pretrained(tmp_path / name, max_shard_size="100KB", variant="v1")
    assert_equal(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs"))
    index, expected = (
        json.loads((tmp_path / name / "model.safetensors.index.v1.json").read_text()) for name in ("ours", "theirs")
    )
    assert index["metadata"] == expected["metadata"]
    assert index["weight_map"].keys() == expected["weight_map"].keys()
    assert len(set(index["weight_map"].values())) > 3
    assert_equal(type(stock).from_pretrained(tmp_path / "ours", variant="v1").state_dict(), stock.state_dict())


def test_a_fresh_model_is_saved_as_stock(tiny_llama: Make, tmp_path: Path) -> None:
    config = tiny_llama(tie_word_embeddings=True).config
    model = tepatch.build("llama", config, backend="reference")
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["model_type"] == "llama"
    assert_equal(load(tmp_path / "saved").state_dict(), model.state_dict())


def test_what_training_changed_is_saved(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    """The parameters are changed, not the tensors that were loaded; each row by another number."""
    stock = tiny_llama()
    model = load(save_checkpoint(stock))
    with torch.no_grad():
        for mine, theirs in zip(model.model.layers, stock.model.layers, strict=True):
            factors = torch.arange(1.0, 193.0).view(-1, 1)
            mine.mlp.fc1_weight.mul_(factors)
            theirs.mlp.gate_proj.weight.mul_(factors[:96])
            theirs.mlp.up_proj.weight.mul_(factors[96:])
            mine.self_attn.qkv.weight.mul_(factors[:128])
            for part, rows in (("q", slice(0, 64)), ("k", slice(64, 96)), ("v", slice(96, 128))):
                getattr(theirs.self_attn, f"{part}_proj").weight.mul_(factors[rows])
    model.save_pretrained(tmp_path / "saved")
    assert_same_model(tmp_path / "saved", stock)


def test_copies_save_themselves(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    model = load(save_checkpoint(tiny_llama()))
    for index, each in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            each.model.layers[0].mlp.fc1_weight.fill_(index + 1)
        each.save_pretrained(tmp_path / str(index))
        assert (tensors_in(tmp_path / str(index))["model.layers.0.mlp.up_proj.weight"] == index + 1).all()


# -- a state dict that is passed --


@pytest.mark.parametrize("own", [False, True])
def test_a_state_dict_that_is_passed_is_saved_whichever_names_it_has(
    own: bool, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    model = load(save_checkpoint(tiny_llama()))
    given = dict(model.named_parameters()) if own else model.state_dict()
    given = {name: torch.full_like(tensor, index) for index, (name, tensor) in enumerate(given.items())}
    kept = set(given)
    model.save_pretrained(tmp_path / "saved", True, dict(given) | {"model.layers.0.gate._extra_state": b"a pickle"})
    found = tensors_in(tmp_path / "saved")
    assert found.keys() == model.state_dict().keys()
    fc1 = "model.layers.1.mlp.fc1_weight" if own else "model.layers.1.mlp.up_proj.weight"
    assert found["model.layers.1.mlp.up_proj.weight"].unique().equal(given[fc1].unique())
    assert given.keys() == kept


def test_a_part_of_a_state_dict_is_saved_as_a_part(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    model = load(save_checkpoint(tiny_llama()))
    with patched_names():
        own = model.state_dict()
    part = {name: tensor for name, tensor in own.items() if ".layers.1." in name}
    model.save_pretrained(tmp_path / "saved", state_dict=part)
    assert tensors_in(tmp_path / "saved").keys() == {name for name in model.state_dict() if ".layers.1." in name}


def test_names_that_nobody_could_load_are_not_written(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    model = load(save_checkpoint(tiny_llama()))
    cut = {f"model.layers.{n}.mlp.fc1_weight": torch.zeros(0) for n in range(3)}
    with pytest.raises(PlanError, match=r"model\.layers\.\{0\.\.2\}\.mlp\.fc1_weight") as caught:
        model.save_pretrained(tmp_path / "saved", state_dict=cut)
    assert "Tensor [0]" in str(caught.value)
    assert not (tmp_path / "saved").exists()


# -- what is refused --


def remove_layers(model: Any) -> None:
    del model.model.layers[1:]


def replace_mlp(model: Any) -> None:
    model.model.layers[1].mlp = nn.Identity()
    model.model.layers[2].mlp = nn.Identity()


def cut_fc1(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.fc1_weight = nn.Parameter(torch.zeros(100, 64))


CHANGES: dict[Callable[[Any], None], str] = {
    remove_layers: r"model\.layers\.\{1,?\.?\.?2\}\.self_attn\.proj\.weight",
    replace_mlp: r"model\.layers\.\{1\.?\.?,?2\}\.mlp\.fc1_weight",
    cut_fc1: r"model\.layers\.2\.mlp\.gate_proj\.weight: has another shape",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_has_changed_is_refused_before_anything_is_written(
    change: Callable[[Any], None], tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    model = load(save_checkpoint(tiny_llama()))
    change(model)
    with pytest.raises(PlanError, match=CHANGES[change]):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with patched_names():  # the way out that the message names
        torch.save(model.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True).keys() == dict(model.named_parameters()).keys()


def test_constants_that_training_changed_are_refused(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("""
version: 1
extends: tepatch_llama:llama.tepatch.yaml
parameters:
  model.layers.{layer}:
    mlp.fc1_bias: {create: 0}
    mlp.fc2_bias: {create: 0}
""")
    stock = tiny_llama()
    folder = save_checkpoint(stock)
    config = copy.deepcopy(stock.config)
    config.mlp_bias = True
    model = load(folder, mapping=tmp_path / "mine.yaml", config=config)
    model.save_pretrained(tmp_path / "saved")
    assert_equal(tensors_in(tmp_path / "saved"), tensors_in(folder))
    with torch.no_grad():
        model.model.layers[1].mlp.fc2_bias[5] = 0.5
    with pytest.raises(SaveError, match=r"model\.layers\.1\.mlp\.fc2_bias"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_model_within_the_model_is_not_saved_alone(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    model = load(save_checkpoint(tiny_llama()))
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(UnsupportedError, match="save the whole model"):
            each.model.save_pretrained(tmp_path / "saved")
        with pytest.raises(UnsupportedError, match="save the whole model"):
            each.model.push_to_hub("someone/model")
    assert not (tmp_path / "saved").exists()


# -- around it --


def test_push_to_hub_uploads_the_stock_layout(
    tiny_llama: Make, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from safetensors.torch import load as load_bytes

    stock = tiny_llama()
    model = load(save_checkpoint(stock))
    uploaded: dict[str, bytes] = {}

    def create_commit(self: Any, *, operations: list[Any], **arguments: Any) -> str:
        assert arguments["repo_id"] == "someone/model"
        uploaded.update({each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations})
        return "done"

    url = huggingface_hub.RepoUrl("https://huggingface.co/someone/model")
    card = huggingface_hub.ModelCard("---\nlibrary_name: transformers\n---\n")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **arguments: url)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", lambda repo_id, **arguments: card)
    assert model.push_to_hub("someone/model") == "done"
    assert uploaded.keys() == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert_equal(load_bytes(uploaded["model.safetensors"]), stock.state_dict())


def test_safetensors_own_functions_save_and_load_the_model(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    from safetensors.torch import load_model, save_model

    stock, others = tiny_llama(tie_word_embeddings=True), tiny_llama(tie_word_embeddings=True, seed=1)
    model = load(save_checkpoint(stock))
    save_model(model, str(tmp_path / "ours.safetensors"))
    load_model(stock, tmp_path / "ours.safetensors")
    save_model(others, str(tmp_path / "theirs.safetensors"))
    load_model(model, tmp_path / "theirs.safetensors")
    assert_equal(model.state_dict(), others.state_dict())


def test_saving_takes_no_memory_beyond_one_tensor(tmp_path: Path) -> None:
    """In a process of its own, 200 MB of weights whose largest tensor is 4 MB, against the system's own figure."""
    program = f"""
import resource, torch, tepatch
from transformers import LlamaConfig

config = LlamaConfig(
    hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=8,
    vocab_size=2048, tie_word_embeddings=True, dtype=torch.float32,
)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def used():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
model = tepatch.build("llama", config, backend="reference")
small = tepatch.build("llama", LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1, vocab_size=8), backend="reference")
small.save_pretrained({str(tmp_path / "small")!r})  # everything that is imported on the way
size = sum(p.nbytes for p in model.parameters())
before = used()
open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
model.save_pretrained({str(tmp_path / "saved")!r})
peak = int([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0]) * 1024
print(size, max(p.nbytes for p in model.parameters()), peak - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    size, largest, extra = map(int, done.stdout.split())
    print(f"\n{extra:,} bytes beyond {size:,} of weights")
    assert size > 190_000_000
    assert sum(path.stat().st_size for path in (tmp_path / "saved").glob("*.safetensors")) > size
    assert extra <= largest + 8_000_000
