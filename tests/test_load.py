"""Loading, from every kind of checkpoint and with every kind of failure, as a user meets it."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_close, forward_terms
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import tepatch
from tepatch.checkpoint import open_checkpoint
from tepatch.errors import (
    BackendError,
    CheckpointError,
    LoadError,
    MappingError,
    PlanError,
    PluginError,
    TepatchError,
)
from tepatch.hf.fresh import FreshWeights
from tepatch.hf.model import build_on_meta, keep_in_float32
from tepatch.hf.prepare import prepare
from tepatch.mapping import parse_mapping
from tepatch.planning import Spec, make_plan
from tepatch.transfer.fill import Destination, load_tensors

Make = Callable[..., Any]
Save = Callable[..., Path]


def load(folder: Path | str, **arguments: Any) -> Any:
    return tepatch.load("llama", folder, backend="reference", **arguments)


def assert_loaded(model: Any, stock: Any) -> None:
    """The same class, the same logits, nothing left on the meta device."""
    assert type(model) is type(stock)
    assert not model.training
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    ids = torch.randint(1, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(ids).logits, stock(ids).logits
        if model.dtype == torch.float32:
            assert_close(ours, theirs.float(), terms=forward_terms(model.config, 16))
        else:  # each result is rounded: what that does to Hugging Face's own is the measure
            truth = copy.deepcopy(stock).float()(ids).logits
            found, usual = ((logits.float() - truth).norm() for logits in (ours, theirs))
            assert found <= 2 * usual


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_loads_however_it_is_cut(
    kind: str, shards: int, dtype: torch.dtype, tiny_llama: Make, save_checkpoint: Save
) -> None:
    stock = tiny_llama(dtype=dtype)
    model = load(save_checkpoint(stock, kind=kind, shards=shards))
    assert model.dtype == dtype
    assert_loaded(model, stock)


@pytest.mark.parametrize(
    "apart", [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj"), ("embed", "norm", "lm_head")]
)
def test_parts_of_one_parameter_may_lie_in_different_files(
    apart: tuple[str, ...], tiny_llama: Make, save_checkpoint: Save
) -> None:
    stock = tiny_llama()

    def place(name: str) -> int:
        return next((index for index, part in enumerate(apart) if part in name), 0)

    assert_loaded(load(save_checkpoint(stock, shards=3, place=place)), stock)


def test_variant_and_subfolder_are_found(tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama(dtype=torch.float16)
    folder = save_checkpoint(stock, shards=2, variant="fp16", name="repo/inner")
    assert_loaded(load(folder.parent, subfolder="inner", variant="fp16"), stock)
    with pytest.raises(CheckpointError, match="fp16"):
        load(folder)


def test_a_hub_id_is_taken_from_the_local_cache(
    tiny_llama: Make, save_checkpoint: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = tiny_llama()
    made = save_checkpoint(stock, shards=2)
    repo = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repo / "snapshots" / ("0" * 40)
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    for index, path in enumerate(made.iterdir()):
        blob = repo / "blobs" / f"{index:040x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = load("someone/tiny")
    assert_loaded(model, stock)
    assert model.name_or_path == "someone/tiny"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "float16", "auto"])
def test_dtype_converts_and_the_global_default_stays(
    dtype: torch.dtype | str, tiny_llama: Make, save_checkpoint: Save
) -> None:
    stock = tiny_llama(dtype=torch.bfloat16)
    model = load(save_checkpoint(stock), dtype=dtype)
    expected = {"auto": torch.bfloat16, "float16": torch.float16}.get(str(dtype), dtype)
    assert {p.dtype for p in model.parameters()} == {expected}
    assert model.config.dtype == expected
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def keeps(cls: type, monkeypatch: pytest.MonkeyPatch, usual: tuple[str, ...], strict: tuple[str, ...] = ()) -> None:
    """Have a stock class keep what these patterns find in float32."""
    monkeypatch.setattr(cls, "_keep_in_fp32_modules", list(usual))
    monkeypatch.setattr(cls, "_keep_in_fp32_modules_strict", list(strict))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_stock_class_keeps_in_float32_stays_so(
    dtype: torch.dtype, tiny_llama: Make, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeps(LlamaForCausalLM, monkeypatch, ("model.norm", "head"), ("embed_tokens.*",))
    folder = save_checkpoint(tiny_llama())
    expected = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    for model in (load(folder, dtype=dtype), tepatch.build("llama", expected.config, dtype=dtype, backend="reference")):
        assert {n: t.dtype for n, t in model.state_dict().items()} == {
            n: t.dtype for n, t in expected.state_dict().items()
        }
        assert model.model.norm.weight.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        assert model.model.layers[0].self_attn.qkv.layernorm_weight.dtype == dtype


def test_fresh_weights_are_drawn_in_the_dtype_that_they_say(tiny_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    keeps(LlamaForCausalLM, monkeypatch, ("lm_head",))
    stock, _ = build_on_meta(LlamaForCausalLM, tiny_llama().config, dtype=torch.float16)
    fresh = FreshWeights(stock, dtype=torch.float16)
    for name, dtype in (("lm_head.weight", torch.float32), ("model.norm.weight", torch.float16)):
        info = fresh.tensors[name]
        with fresh.open(info.file) as block:
            tensor = block.read(info)
        assert (tensor.dtype, tensor.nbytes) == (dtype, info.nbytes)


@pytest.mark.parametrize("pattern", ["qkv", "layernorm_weight", "fc1_weight", "self_attn.proj"])
def test_nothing_is_kept_by_a_name_that_only_patched_parameters_have(
    pattern: str, tiny_llama: Make, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeps(LlamaForCausalLM, monkeypatch, (pattern,))
    folder = save_checkpoint(tiny_llama())
    assert {p.dtype for p in LlamaForCausalLM.from_pretrained(folder, dtype=torch.float16).parameters()} == {
        torch.float16
    }
    assert {p.dtype for p in load(folder, dtype=torch.float16).parameters()} == {torch.float16}


def test_a_parameter_that_holds_what_is_kept_and_what_is_not_is_refused(
    tiny_llama: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a module of somebody else, which may hold it in either dtype."""
    keeps(LlamaForCausalLM, monkeypatch, ("kept",))
    rules = parse_mapping("version: 1\nparameters: {lm_head.weight: {concat: [kept.weight, other.weight]}}\n")
    half, whole = Spec((64, 64), "F32"), {"lm_head.weight": Spec((128, 64), "F16")}
    sources = {"kept.weight": half, "other.weight": half}
    plan = make_plan(rules, config={}, sources=sources, targets=whole)
    model = tiny_llama()
    with pytest.raises(PlanError, match=r"(?s)lm_head\.weight.*kept\.weight"):
        keep_in_float32(model, whole, plan, torch.float16)
    assert keep_in_float32(model, whole, plan, torch.bfloat16) == whole
    model._keep_in_fp32_modules = {"kept", "other"}
    assert keep_in_float32(model, whole, plan, torch.float16) == {"lm_head.weight": Spec((128, 64), "F32")}


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("norm", "model.layers.0.self_attn.qkv.layernorm_weight"),
        ("input_layernorm", "model.layers.0.self_attn.qkv.layernorm_weight"),
        ("layers.1.post_attention_layernorm", "model.layers.1.mlp.layernorm_weight"),
        ("q_proj", "model.layers.0.self_attn.qkv.weight"),
        ("self_attn.*_proj", "model.layers.0.self_attn.proj.weight"),
        ("layers.*.mlp", "model.layers.2.mlp.fc1_weight"),
    ],
)
@pytest.mark.parametrize("is_strict", [False, True])
def test_what_is_kept_in_float32_and_lies_in_a_fused_module_is_refused(
    pattern: str, named: str, is_strict: bool, tiny_llama: Make, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeps(LlamaForCausalLM, monkeypatch, *(((), (pattern,)) if is_strict else ((pattern,), ())))
    folder = save_checkpoint(tiny_llama())
    for dtype in (torch.float16, torch.bfloat16):
        if dtype == torch.bfloat16 and not is_strict:
            load(folder, dtype=dtype)
            continue
        with pytest.raises(PlanError, match=re.escape(named)) as caught:
            load(folder, dtype=dtype)
        assert "LlamaForCausalLM keeps tensors in float32" in str(caught.value)
        with pytest.raises(PlanError, match=re.escape(named)):
            tepatch.build("llama", LlamaForCausalLM.config_class.from_pretrained(folder), dtype=dtype)
    assert "dtype='float32'" in (str(caught.value))
    assert {p.dtype for p in load(folder, dtype="float32").parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_what_is_kept_is_found_by_the_names_that_it_has_in_memory(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixtral's routers are ``block_sparse_moe.gate`` in checkpoints; their modules are the stock ones."""
    keeps(MixtralForCausalLM, monkeypatch, (), ("mlp.gate.weight",))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=64, num_local_experts=4, pad_token_id=0)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    expected = MixtralForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    model = tepatch.load("mixtral", tmp_path, dtype=dtype, backend="reference")
    assert {n: t.dtype for n, t in model.state_dict().items()} == {n: t.dtype for n, t in expected.state_dict().items()}
    assert expected.model.layers[0].mlp.gate.weight.dtype == torch.float32
    keeps(MixtralForCausalLM, monkeypatch, (), ("experts",))
    if dtype != torch.float32:
        with pytest.raises(PlanError, match="experts"):
            tepatch.load("mixtral", tmp_path, dtype=dtype, backend="reference")


def test_config_and_generation_settings_are_those_of_from_pretrained(tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama(bos_token_id=5, eos_token_id=7)
    stock.generation_config.temperature = 0.3
    stock.generation_config.do_sample = True
    folder = save_checkpoint(stock)
    theirs = type(stock).from_pretrained(folder, dtype="auto")
    model = load(folder)
    assert model.config.to_dict() == theirs.config.to_dict()
    assert model.generation_config.to_dict() == theirs.generation_config.to_dict()


def test_auto_picks_the_patch_by_model_type(tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama()
    folder = save_checkpoint(stock)
    model = tepatch.load("auto", folder, backend="reference")
    assert model.tepatch.patch == "llama"
    assert_loaded(model, stock)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(PluginError, match="gpt2") as caught:
        tepatch.load("auto", folder)
    assert "llama" in str(caught.value)


def test_an_unknown_patch_names_the_close_one(tiny_llama: Make, save_checkpoint: Save) -> None:
    with pytest.raises(PluginError, match="llama"):
        tepatch.load("lama", save_checkpoint(tiny_llama()))


def test_a_user_mapping_takes_the_place_of_the_plugins(tiny_llama: Make, save_checkpoint: Save, tmp_path: Path) -> None:
    stock = tiny_llama()
    extra = {"model.extra": torch.zeros(3)}
    folder = save_checkpoint(stock, extra=extra)
    with pytest.raises(PlanError, match="no rule uses"):
        load(folder)
    mapping = tmp_path / "mine.yaml"
    mapping.write_text("version: 1\nparameters: {model.norm.weight: {conact: [a, b]}}\n")
    with pytest.raises(MappingError, match="did you mean 'concat'") as caught:
        load(folder, mapping=mapping)
    assert caught.value.problems[0].where.startswith(f"{mapping}:2:"), "the whole path, to be clicked"
    mapping.write_text(
        "version: 1\nextends: tepatch_llama:llama.tepatch.yaml\nignore:\n  - model.extra: left by my trainer\n"
        "parameters: {}\n"
    )
    model = load(folder, mapping=mapping)
    assert_loaded(model, stock)
    assert model.tepatch.plan.sources["model.extra"].note == "left by my trainer"


def test_a_tied_copy_is_compared_not_loaded(tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama(tie_word_embeddings=True)
    head = stock.lm_head.weight.detach().clone()
    model = load(save_checkpoint(stock, extra={"lm_head.weight": head}, name="same"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.tepatch.plan.sources["lm_head.weight"].state == "redundant"
    head[3, 5] += 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(save_checkpoint(stock, extra={"lm_head.weight": head}, name="other"))


def break_missing(folder: Path, stock: Any, save: Save) -> Path:
    return save(stock, shards=2, drop=("model.layers.1.mlp.up_proj.weight",), name="broken")


def break_extra(folder: Path, stock: Any, save: Save) -> Path:
    return save(stock, extra={"model.layers.3.mlp.up_proj.weight": torch.zeros(96, 64)}, name="broken")


def break_shape(folder: Path, stock: Any, save: Save) -> Path:
    wrong = {"model.layers.0.self_attn.k_proj.weight": torch.zeros(64, 64)}
    return save(stock, extra=wrong, name="broken")


def break_absent_shard(folder: Path, stock: Any, save: Save) -> Path:
    (folder / "model-00002-of-00002.safetensors").unlink()
    return folder


def break_truncated(folder: Path, stock: Any, save: Save) -> Path:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return folder


def break_config(folder: Path, stock: Any, save: Save) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    return folder


def break_no_config(folder: Path, stock: Any, save: Save) -> Path:
    (folder / "config.json").unlink()
    return folder


BROKEN: dict[Callable[..., Path], tuple[type[TepatchError], str]] = {
    break_missing: (PlanError, r"1 tensor missing.*\n.*model\.layers\.1\.mlp\.up_proj\.weight"),
    break_extra: (PlanError, r"'layer' is 0..2"),
    break_shape: (PlanError, r"expected: \[32, 64\]\n  found:    \[64, 64\]"),
    break_absent_shard: (CheckpointError, r"model-00002-of-00002\.safetensors"),
    break_truncated: (CheckpointError, r"model-00001-of-00002\.safetensors"),
    break_config: (PlanError, r"'layer' is 0..1 .num_hidden_layers"),
    break_no_config: (CheckpointError, r"no config\.json"),
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_broken_checkpoint_is_refused_before_a_weight_is_read(
    damage: Callable[..., Path], tiny_llama: Make, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    stock = tiny_llama()
    folder = damage(save_checkpoint(stock, shards=2), stock, save_checkpoint)
    before = dict(vars(modeling_llama.LlamaDecoderLayer))
    opened = []
    import safetensors

    original = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda *a, **k: opened.append(a) or original(*a, **k))
    kind, message = BROKEN[damage]
    for call in (load, lambda path: tepatch.plan("llama", path, backend="reference")):
        with pytest.raises(kind, match=message):
            call(folder)
    assert not opened
    assert dict(vars(modeling_llama.LlamaDecoderLayer)) == before
    assert type(type(stock)(stock.config).model.layers[0]) is modeling_llama.LlamaDecoderLayer


def test_all_problems_are_told_at_once(tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama()
    dropped = ("model.norm.weight", "model.layers.0.mlp.gate_proj.weight")
    extra = {"stray.weight": torch.zeros(1), "model.layers.2.input_layernorm.weight": torch.zeros(65)}
    with pytest.raises(PlanError) as caught:
        load(save_checkpoint(stock, drop=dropped, extra=extra))
    text = str(caught.value)
    for name in (*dropped, *extra):
        assert name in text
    assert len(caught.value.problems) == 4
    assert all(
        problem.where.startswith(("llama.tepatch.yaml", "decoder.tepatch.yaml")) for problem in caught.value.problems
    )


def test_te_is_refused_where_it_is_absent(tiny_llama: Make, save_checkpoint: Save) -> None:
    from tepatch.te import probe

    if probe().usable:
        pytest.skip("Transformer Engine can be used here")
    with pytest.raises(BackendError, match=r"tepatch\[te\]|GPU"):
        tepatch.load("llama", save_checkpoint(tiny_llama()), backend="te")


@pytest.mark.parametrize("dtype", ["int8", "bananas", torch.int64])
def test_a_dtype_that_can_not_hold_weights_is_refused(dtype: Any, tiny_llama: Make, save_checkpoint: Save) -> None:
    with pytest.raises(PlanError, match="bfloat16"):
        load(save_checkpoint(tiny_llama()), dtype=dtype)


def test_running_out_of_memory_half_way_is_told_and_leaves_nothing(tiny_llama: Make, save_checkpoint: Save) -> None:
    """In a process of its own with little address space: torch's real allocator fails, not a stand-in."""
    import subprocess
    import sys

    folder = save_checkpoint(tiny_llama(vocab_size=200_000, hidden_size=512, num_attention_heads=8))  # 0.8 GB
    program = f"""
import resource, torch, transformers, tepatch
from tepatch.errors import LoadError
from transformers.models.llama import modeling_llama
import tepatch_llama.layer, tepatch.loading
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 650_000_000, -1))
try:
    tepatch.load("llama", {str(folder)!r}, backend="reference", progress=False)
except LoadError as error:
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    print(error)
    model = modeling_llama.LlamaModel(transformers.LlamaConfig(num_hidden_layers=1, hidden_size=64, vocab_size=9))
    print(type(model.layers[0]).__module__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert "out of memory on cpu after reading" in done.stdout, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("transformers.models.llama.modeling_llama")


def test_a_shard_that_shrinks_while_loading_is_an_error(tiny_llama: Make, save_checkpoint: Save) -> None:
    folder = save_checkpoint(tiny_llama(), shards=2)
    job = prepare("llama", open_checkpoint(folder), backend="reference")
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises((CheckpointError, LoadError), match="model-00002"):
        load_tensors(job.reading, job.checkpoint, to=Destination(device=torch.device("cpu")))


def test_a_loaded_model_copies_and_pickles(tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama()
    model = load(save_checkpoint(stock))
    assert_loaded(copy.deepcopy(model), stock)
    assert_loaded(pickle.loads(pickle.dumps(model)), stock)


def test_a_later_initialisation_leaves_the_weights_alone(tiny_llama: Make, save_checkpoint: Save) -> None:
    """Hugging Face's initialiser sets every class named *LayerNorm* to ones: that would hit the fused QKV."""
    model = load(save_checkpoint(tiny_llama()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.init_weights()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_the_report_tells_what_happened(tiny_llama: Make, save_checkpoint: Save) -> None:
    model = load(save_checkpoint(tiny_llama(), shards=2))
    report = model.tepatch
    assert report.replaced.startswith("3 x LlamaDecoderLayer")
    assert report.bytes_read == report.plan.source_bytes == sum(p.numel() * 4 for p in model.parameters())
    assert json.loads(json.dumps(report.to_json()))["backend"] == "reference"
    assert "3 x LlamaDecoderLayer" in str(report)


def test_nothing_is_initialised_at_random_and_no_file_stays_open(tiny_llama: Make, save_checkpoint: Save) -> None:
    folder = save_checkpoint(tiny_llama(), shards=3)
    before = torch.get_rng_state()
    model = load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert all(parameter.untyped_storage().resizable() for parameter in model.parameters())


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_a_progress_bar_goes_to_stderr_when_wanted(
    progress: bool | None, shown: bool, tiny_llama: Make, save_checkpoint: Save, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save_checkpoint(tiny_llama())
    load(folder, progress=progress)
    out, err = capfd.readouterr()
    assert ("loading: 100%" in err) == shown
    assert not out


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta"])
def test_a_device_that_is_not_there_is_refused(device: str, tiny_llama: Make, save_checkpoint: Save) -> None:
    with pytest.raises(BackendError, match="can not be used"):
        load(save_checkpoint(tiny_llama()), device=device)


def test_whole_numbers_are_no_weights(tiny_llama: Make, save_checkpoint: Save) -> None:
    """Quantized checkpoints hold integers and scales: cast to floats they would be silent nonsense."""
    packed = {"model.layers.1.mlp.down_proj.weight": torch.ones(64, 96, dtype=torch.int8)}
    with pytest.raises(PlanError, match=r"I8") as caught:
        load(save_checkpoint(tiny_llama(), extra=packed))
    assert "down_proj" in str(caught.value)


@pytest.mark.parametrize("location", ["", None, 3, b"bytes", "x" * 6000, "a\0b"])
def test_what_is_no_location_is_refused(location: Any) -> None:
    with pytest.raises(CheckpointError, match=r"location|hub id"):
        load(location)


def test_a_subfolder_may_be_a_path(tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama()
    folder = save_checkpoint(stock, name="repo/inner")
    assert_loaded(load(folder.parent, subfolder=Path("inner")), stock)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 65},
        {"hidden_size": "abc"},
        {"num_hidden_layers": 2.5},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 0},
        {"vocab_size": -1},
        {"vocab_size": 10**30},
        {"head_dim": -16},
        {"pad_token_id": 9999},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
        {"architectures": ["BertModel"]},
        {"architectures": ["MistralForCausalLM"]},
        {"architectures": ["PreTrainedModel"]},
        {"model_type": "mistral", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4},
    ],
    ids=str,
)
def test_a_config_of_nonsense_is_an_error_that_says_so(
    fields: dict[str, Any], tiny_llama: Make, save_checkpoint: Save
) -> None:
    folder = save_checkpoint(tiny_llama())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises((PlanError, CheckpointError), match=r"config|layers|model_type"):
        load(folder)


@pytest.mark.parametrize("text", ["not json", "[]", "null", '{"max_new_tokens": "x"}', '{"max_new_tokens": -5}'])
def test_generation_settings_that_can_not_be_read_are_an_error_before_weights_are(
    text: str, tiny_llama: Make, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors

    folder = save_checkpoint(tiny_llama())
    (folder / "generation_config.json").write_text(text)
    opened: list[Any] = []
    original = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda *a, **k: opened.append(a) or original(*a, **k))
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load(folder)
    assert not opened


def test_without_generation_settings_the_configs_are_used(tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama(eos_token_id=7)
    folder = save_checkpoint(stock)
    (folder / "generation_config.json").unlink()
    theirs = type(stock).from_pretrained(folder)
    assert load(folder).generation_config.to_dict() == theirs.generation_config.to_dict()
    (folder / "config.json").unlink()
    assert load(folder, config=stock.config).generation_config.eos_token_id == 7


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_that_is_a_link_out_of_the_folder_is_refused(
    name: str, tiny_llama: Make, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_llama())
    (folder / name).rename(tmp_path / "elsewhere.json")
    (folder / name).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="leads out"):
        load(folder)


@pytest.mark.parametrize("config", [{}, "config.json", Path("config.json")])
def test_what_is_no_config_is_refused(config: Any, tiny_llama: Make, save_checkpoint: Save) -> None:
    with pytest.raises(PlanError, match="PreTrainedConfig"):
        load(save_checkpoint(tiny_llama()), config=config)
    with pytest.raises(PlanError, match="PreTrainedConfig"):
        tepatch.build("llama", config)


def test_values_that_float16_can_not_hold_are_an_error(tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama()
    with torch.no_grad():
        stock.model.layers[1].mlp.down_proj.weight[3, 4] = 1e6
    with pytest.raises(LoadError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        load(save_checkpoint(stock), dtype="float16")


def test_weights_beside_a_computed_buffer_are_not_initialised_again(tiny_llama: Make, save_checkpoint: Save) -> None:
    """Hugging Face's initialiser fills a module's buffers, and would draw its weights anew with them."""
    from tepatch.hf.model import compute_buffers

    model = load(save_checkpoint(tiny_llama()))
    embedding = model.model.embed_tokens
    before = embedding.weight.detach().clone()
    model._init_weights(embedding)
    model._init_weights(model.model.layers[0].self_attn.qkv)
    compute_buffers(model, torch.device("cpu"))
    assert torch.equal(embedding.weight, before)
    assert float(model.model.layers[0].self_attn.qkv.weight.detach().std()) > 0.05


@pytest.mark.parametrize(("named", "is_told"), [("LLaMAForCausalLM", True), ("LlamaForCausalLM", False)])
def test_a_class_that_transformers_does_not_have_is_told(
    named: str, is_told: bool, tiny_llama: Make, save_checkpoint: Save
) -> None:
    stock = tiny_llama()
    folder = save_checkpoint(stock)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [named]}))
    model = load(folder)
    assert_loaded(model, stock)
    assert type(model) is type(stock)
    assert any(f"names {named}, which transformers does not have" in note for note in model.tepatch.notes) is is_told


@pytest.mark.parametrize("reading", ["fast", {"threads": 2}, 4])
def test_what_does_not_say_how_to_read_is_refused(reading: Any, tiny_llama: Make, save_checkpoint: Save) -> None:
    with pytest.raises(PlanError, match=r"reading: does not say[\s\S]*tepatch\.Reading"):
        load(save_checkpoint(tiny_llama()), reading=reading)


def test_settings_reach_the_reader_and_the_report_tells_the_time(tiny_llama: Make, save_checkpoint: Save) -> None:
    stock = tiny_llama()
    model = load(save_checkpoint(stock), reading=tepatch.Reading(threads=1, piece_bytes=4096))
    assert_loaded(model, stock)
    seconds = model.tepatch.seconds
    assert list(seconds) == ["build", "plan", "load", "allocate", "read", "copy", "place", "install"]
    assert all(value >= 0 for value in seconds.values())
    assert 0 < seconds["read"] < seconds["load"]


@pytest.mark.parametrize("setting", [{"threads": 2}, {"piece_bytes": 4096}, {"buffers": 3}, {"cache": "bypass"}])
def test_settings_that_a_library_would_ignore_are_refused(
    setting: dict[str, Any], tiny_llama: Make, save_checkpoint: Save
) -> None:
    reading = tepatch.Reading(source="safetensors", **setting)
    with pytest.raises(PlanError, match=rf"reading\.{next(iter(setting))}: has no meaning with source='safetensors'"):
        load(save_checkpoint(tiny_llama()), reading=reading)
