"""Each name in the table of ``tests/shared/borrowed.py`` is still there, and still means what the code relies on.

A check looks at the real thing: a closure that transformers makes, a module that accelerate has dispatched, the frame
of a caller. It fails by the name of its entry. And no private name in the code is left out of the table: a scan of the
sources finds them.
"""

from __future__ import annotations

import ast
import gc
import importlib
import inspect
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
import transformers
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, fsdp_utils, modeling, offload_state_dict
from borrowed import BORROWED, Borrowed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    DynamicCache,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    StaticCache,
    Trainer,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto import modeling_auto
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama import modeling_llama
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipVisionConfig

from tepatch.hf import attention, current_gpu, offloaded, placement
from tepatch.hf.named import without_wrappers
from tepatch.hf.sharding import cuts_of
from tepatch.te.attention import ACTIVATIONS
from tepatch.te.nvidia import weight_cache as frozen
from tepatch.te.reference.mlp import activate
from tepatch.te.rope import apply_rotary
from tepatch.transfer.memory import HostMemory

pytestmark = [
    # What Transformer Engine and torch say on a GPU, each once in a process.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context:UserWarning"),
    pytest.mark.filterwarnings("ignore:Recipe type changed"),
    # Other versions of transformers have another name for it.
    pytest.mark.filterwarnings("ignore:`[a-z_]*gradient_checkpointing[a-z_]*` is deprecated:FutureWarning"),
]

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
CACHE = "cache" if VERSION >= (5, 24) else "past_key_values"
"""What transformers calls a cache."""
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
IDS = torch.arange(1, 9)[None]

Check = Callable[[Path], None]
CHECKS: dict[tuple[str, str], Check] = {}
"""By library and name; each is given an empty folder."""


def check(library: str, name: str) -> Callable[[Check], Check]:
    """Makes a function the check of an entry."""

    def register(function: Check) -> Check:
        assert (library, name) not in CHECKS, f"two checks of {name}"
        CHECKS[library, name] = function
        return function

    return register


def checks(library: str, names: Iterable[str], function: Callable[[str, Path], None]) -> None:
    """The same for several names that are checked in one way; the function is given the name first."""
    for name in names:
        check(library, name)(partial(function, name))


ENTRIES = [
    pytest.param(
        entry,
        id=f"{entry.package}: {entry.name}",
        marks=[pytest.mark.gpu] if entry.package == "transformer_engine" or entry.name == "cudaHostRegister" else [],
    )
    for entry in BORROWED
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_borrowed_is_what_the_code_relies_on(entry: Borrowed, tmp_path: Path) -> None:
    try:
        CHECKS[entry.package, entry.name](tmp_path)
    except Exception as error:
        modules = ", ".join(entry.used_in)
        text = f"{entry.name!r} of {entry.package} is gone, or not what it was: {entry.why} (used in {modules})"
        raise AssertionError(text) from error


# -- torch --


def alike(found: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    """Whether these are the same tensors, and not only equal ones."""
    return [id(each) for each in found] == [id(each) for each in expected]


@check("torch", "_parameters")
def parameters_of_a_module(folder: Path) -> None:
    module = nn.Linear(2, 2)
    assert alike(module._parameters.values(), module.parameters())
    plain = torch.zeros(3, 3)  # setattr refuses it, and what is no parameter is no reason to forget the name
    module._parameters["weight"] = plain
    assert module.weight is plain
    module._parameters["weight"] = nn.Parameter(plain)
    assert alike(module.parameters(), [module.weight, module.bias])
    assert nn.Linear(2, 2, bias=False)._parameters["bias"] is None


@check("torch", "_buffers")
def buffers_of_a_module(folder: Path) -> None:
    module = nn.Module()
    module.register_buffer("table", torch.zeros(2, device="meta"))
    module._buffers["table"] = filled = torch.ones(2)
    assert module.table is filled
    assert alike(module.buffers(), [filled])


@check("torch", "_modules")
def children_of_a_module(folder: Path) -> None:
    module, other = nn.Module(), nn.Linear(2, 2)
    module.add_module("place", nn.Linear(2, 2))
    module.place = other
    assert module._modules["place"] is other
    del module.place
    assert "place" not in module._modules


@check("torch", "_non_persistent_buffers_set")
def buffers_that_are_not_saved(folder: Path) -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("computed", torch.zeros(1), persistent=False)
    assert module._non_persistent_buffers_set == {"computed"}
    rotary = LlamaForCausalLM(LlamaConfig(**SIZES)).model.rotary_emb
    assert "inv_freq" in rotary._non_persistent_buffers_set


@check("torch", "_load_state_dict_pre_hooks")
def order_of_hooks(folder: Path) -> None:
    module, called = nn.Linear(2, 2), list[str]()
    module.register_load_state_dict_pre_hook(lambda *_: called.append("first"))
    handle = module.register_load_state_dict_pre_hook(lambda *_: called.append("second"))
    module._load_state_dict_pre_hooks.move_to_end(handle.id, last=False)
    module.load_state_dict(module.state_dict())
    assert called == ["second", "first"]


HOOKS: dict[str, str] = {
    "_forward_hooks": "register_forward_hook",
    "_forward_pre_hooks": "register_forward_pre_hook",
    "_backward_hooks": "register_full_backward_hook",
    "_backward_pre_hooks": "register_full_backward_pre_hook",
}


def hooks_of_a_module(name: str, folder: Path) -> None:
    module = nn.Linear(2, 2)
    assert not getattr(module, name)
    handle = getattr(module, HOOKS[name])(lambda *_: None)
    assert getattr(module, name)
    handle.remove()
    assert not getattr(module, name)


checks("torch", HOOKS, hooks_of_a_module)


@check("torch", "hook")
def names_of_hooks(folder: Path) -> None:
    module = nn.Linear(2, 2)
    before = {name: len(value) for name, value in vars(module).items() if isinstance(value, dict)}
    for register in HOOKS.values():
        getattr(module, register)(lambda *_: None)
    module.register_forward_hook(lambda *_: None, with_kwargs=True, always_call=True)
    module.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    changed = {name for name, count in before.items() if len(vars(module)[name]) != count}
    assert changed
    assert all("hook" in name for name in (*changed, "_is_full_backward_hook"))
    assert not {name for name in changed if "state_dict" in name}
    assert vars(nn.Linear(2, 2))["_is_full_backward_hook"] is None


@check("torch", "_apply")
def what_moves_and_casts(folder: Path) -> None:
    class Seeing(nn.Linear):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            seen.append(fn(torch.zeros(1)))
            return super()._apply(fn, recurse)

    seen: list[Tensor] = []
    module = nn.Sequential(Seeing(2, 2))
    module.half()
    module.to(torch.float64)
    module.to("meta")
    assert [(each.dtype, each.device.type) for each in seen] == [
        (torch.float16, "cpu"),
        (torch.float64, "cpu"),
        (torch.float32, "meta"),
    ]
    assert module[0].weight.is_meta
    assert module[0].weight.dtype == torch.float64


@check("torch", "_load_from_state_dict")
def who_takes_tensors(folder: Path) -> None:
    class Taking(nn.Module):
        def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
            seen.append((prefix, sorted(state_dict), len(args)))
            args[2].append("missing by name")

    seen: list[Any] = []
    parent = nn.ModuleDict({"child": Taking()})
    found = parent.load_state_dict({"child.weight": torch.zeros(1)}, strict=False)
    assert seen == [("child.", ["child.weight"], 5)]
    assert found.missing_keys == ["missing by name"]
    assert found.unexpected_keys == []


@check("torch", "_version")
def count_of_writes(folder: Path) -> None:
    tensor = nn.Parameter(torch.zeros(2))
    before = tensor._version
    with torch.no_grad():
        tensor.add_(1)
        tensor[0] = 2
    assert tensor._version == before + 2
    with torch.inference_mode():
        made = torch.zeros(1)
    assert made.is_inference()
    with pytest.raises(RuntimeError, match="version"):
        _ = made._version


@check("torch", "_cdata")
def identity_of_a_storage(folder: Path) -> None:
    tensor = torch.zeros(2)
    first = tensor.untyped_storage()._cdata
    assert tensor.untyped_storage()._cdata == first == tensor[1:].untyped_storage()._cdata
    kept = tensor.detach()
    tensor.data = torch.ones(2)
    assert tensor.untyped_storage()._cdata != first == kept.untyped_storage()._cdata


@check("torch", "StorageWeakRef")
def weak_reference_to_a_storage(folder: Path) -> None:
    assert frozen._weak_storage is StorageWeakRef
    tensor = torch.zeros(1000)
    reference = StorageWeakRef(tensor.untyped_storage())
    assert reference.cdata == tensor.untyped_storage()._cdata
    assert not reference.expired()
    del tensor
    assert reference.expired()
    others = [torch.zeros(1000) for _ in range(100)]
    assert reference.cdata not in {other.untyped_storage()._cdata for other in others}


@check("torch", "register_optimizer_step_post_hook")
def steps_of_all_optimizers(folder: Path) -> None:
    parameter, seen = nn.Parameter(torch.zeros(1)), list[Any]()
    parameter.grad = torch.ones(1)
    before = torch.optim.SGD([parameter], lr=0.1)
    handle = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: seen.append(optimizer))
    after = torch.optim.AdamW([parameter], lr=0.1)
    before.step()
    after.step()
    handle.remove()
    assert seen == [before, after]


@contextmanager
def processes(rank: int, count: int) -> Iterator[None]:
    """As if this was one of several processes, on the meta device; alone, one that has the others' answers too."""
    if count == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


@check("torch", "torch.distributed._composable_state")
def where_fully_shard_keeps_what_it_manages(folder: Path) -> None:
    with processes(1, 2):
        module: Any = fully_shard(nn.Linear(4, 4, device="meta"), mesh=init_device_mesh("cpu", (2,)))
    # It can not be imported without the module in which what it keeps of a module has its base class.
    bases = {each.__module__ for each in type(module._get_fsdp_state()).__mro__}
    assert "torch.distributed._composable_state" in bases & sys.modules.keys()


@check("torch", "_module_state_mapping")
def what_fully_shard_manages(folder: Path) -> None:
    states: Any = sys.modules["torch.distributed._composable_state"]
    with processes(1, 2):
        gc.collect()
        others = len(states._module_state_mapping)
        module = nn.Linear(4, 4, device="meta")
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
        assert module in states._module_state_mapping
        assert frozen._shards_parameters()
        del module
        gc.collect()
        assert len(states._module_state_mapping) == others
        assert frozen._shards_parameters() == bool(others)


@check("torch", "_StridedShard")
def a_dimension_that_is_sharded_twice(folder: Path) -> None:
    with processes(1, 4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        module = nn.Sequential(nn.Linear(8, 8, device="meta"))
        parallelize_module(module, mesh["tp"], {"0": ColwiseParallel()})
        fully_shard(module, mesh=mesh["dp"])
        weight: Any = module[0].weight
        assert [type(each).__name__ for each in weight.placements] == ["_StridedShard", "Shard"]
        assert [each.dim for each in weight.placements] == [0, 0]
        # The second process is the first of "dp" and the second of "tp": it holds the third quarter.
        cuts = cuts_of("weight", weight)
        assert cuts is not None
        assert (sum(cut.start for cut in cuts), cuts[-1].size) == (4, 2)


@check("torch", "_C.TensorBase")
def properties_of_tensors(folder: Path) -> None:
    base: Any = torch._C.TensorBase
    tensor = nn.Parameter(torch.zeros(2))
    assert isinstance(tensor, base)
    data: Tensor = base.data.__get__(tensor)
    data.fill_(1)
    assert tensor.tolist() == [1, 1]
    assert base.requires_grad.__get__(tensor) is True


@check("torch", "_disabled_torch_function_impl")
def operations_of_a_subclass(folder: Path) -> None:
    class Special(Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

    tensor = torch.zeros(2).as_subclass(Special)
    assert type(tensor) is Special
    assert type(tensor + 1) is type(tensor[:1]) is Tensor


@check("torch", "DisableTorchFunctionSubclass")
def operations_out_of_sight(folder: Path) -> None:
    class Special(Tensor):
        pass

    tensor = torch.zeros(2).as_subclass(Special)
    assert type(tensor + 1) is Special
    with torch._C.DisableTorchFunctionSubclass():
        assert type(tensor + 1) is type(tensor.as_subclass(Tensor)) is Tensor


@check("torch", "qconfig")
def what_quantization_sets(folder: Path) -> None:
    class Watched(nn.Module):
        def __setattr__(self, name: str, value: Any) -> None:
            seen.append(name)
            super().__setattr__(name, value)

    seen: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(nn.Sequential(Watched()), {nn.Linear})
    assert "qconfig" in seen


@check("torch", "_orig_mod")
def what_is_compiled(folder: Path) -> None:
    module: Any = nn.Linear(2, 2)
    assert torch.compile(module, backend="eager")._orig_mod is module


@check("torch", "_fsdp_wrapped_module")
def names_under_fsdp(folder: Path) -> None:
    with processes(0, 1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # with one process it would rather not shard
        inner = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"), use_orig_params=True)
        module = FullyShardedDataParallel(nn.Sequential(inner), device_id=torch.device("cpu"), use_orig_params=True)
    names = [name for name, _ in module.named_parameters()]
    assert all("_fsdp_wrapped_module." in name for name in names)
    assert [without_wrappers(name) for name in names] == ["0.weight", "0.bias"]


@check("torch", "_checkpoint_wrapped_module")
def names_under_checkpointing(folder: Path) -> None:
    module = nn.Sequential(checkpoint_wrapper(nn.Sequential(nn.Linear(2, 2, bias=False))))
    found = {name: without_wrappers(name) for name, _ in module.named_modules()}
    assert found["0._checkpoint_wrapped_module.0"] == "0.0"


@check("torch", "_extra_state")
def keys_of_extra_state(folder: Path) -> None:
    class Stateful(nn.Module):
        def get_extra_state(self) -> int:
            return 1

        def set_extra_state(self, state: int) -> None: ...

    assert list(nn.Sequential(Stateful()).state_dict()) == ["0._extra_state"]


@check("torch", "assign_to_params_buffers")
def whether_tensors_are_assigned(folder: Path) -> None:
    module, seen = nn.Linear(2, 2), list[bool]()

    def look(module: Any, state_dict: Any, prefix: str, local_metadata: Any, *_: Any) -> None:
        seen.append(bool(local_metadata.get("assign_to_params_buffers", False)))

    module.register_load_state_dict_pre_hook(look)
    module.load_state_dict(module.state_dict())
    module.load_state_dict(module.state_dict(), assign=True)
    assert seen == [False, True]


def askers(module: nn.Module, act: Callable[[nn.Module], object]) -> list[tuple[str, str]]:
    """Module and function of those who ask ``module`` for a state dict while ``act`` runs on it."""
    found = []

    def look(*_: Any) -> None:
        frame = sys._getframe(1)
        while frame.f_globals["__name__"] == "torch.nn.modules.module":
            assert frame.f_back is not None
            frame = frame.f_back
        found.append((frame.f_globals["__name__"], frame.f_code.co_name))

    handle = module.register_state_dict_post_hook(look)
    act(module)
    handle.remove()
    return found


@check("torch", "torch.nn.modules.module")
def where_state_dict_runs(folder: Path) -> None:
    def ask(module: nn.Module) -> None:
        module.state_dict()

    def ask_from_above(module: nn.Module) -> None:
        nn.Sequential(nn.Sequential(module)).state_dict()

    module = nn.Linear(2, 2)
    assert askers(module, ask) == [(__name__, "ask")]
    assert askers(module, ask_from_above) == [(__name__, "ask_from_above")]


@check("torch", "torch.distributed.checkpoint.state_dict")
def who_looks_up_names_for_distributed_checkpoints(folder: Path) -> None:
    found = askers(nn.Linear(2, 2), get_model_state_dict)
    assert found
    assert {module for module, _ in found} == {"torch.distributed.checkpoint.state_dict"}


@check("torch", "WeakTensorKeyDictionary")
def memory_by_the_identity_of_tensors(folder: Path) -> None:
    known, first, second = WeakTensorKeyDictionary(), torch.zeros(2), torch.zeros(2)
    known[first] = "first"
    assert (first in known, second in known) == (True, False)
    assert (known.get(first), known.get(second, "none")) == ("first", "none")
    del first
    gc.collect()
    assert len(known) == 0


@check("torch", "cudaHostRegister")
def pinned_memory(folder: Path) -> None:
    with HostMemory(1 << 20, is_pinned=True) as memory:
        assert memory.is_pinned
        assert memory.bytes.is_pinned()


# -- transformers --


def llama(**config: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **config})).eval()


def on_meta(cls: Any, config: Any) -> Any:
    with torch.device("meta"):
        return cls(config)


SPY = "a spy of the tests"


def mask_arguments(make: Callable[..., Any], config: Any, positions: Tensor | None = None) -> dict[str, Any]:
    """The keywords that transformers calls a mask interface with, for 8 tokens."""
    seen: dict[str, Any] = {}

    def spy(*args: Any, **kwargs: Any) -> None:
        assert not args
        seen.update(kwargs)

    AttentionMaskInterface.register(SPY, spy)
    AttentionInterface.register(SPY, sdpa_attention_forward)
    config._attn_implementation = SPY
    more = {} if positions is None else {CACHE: None, "position_ids": positions}
    if make is not create_bidirectional_mask:
        more[CACHE] = None
    make(config, torch.zeros(1, 8, config.hidden_size), attention_mask=None, **more)
    return seen


PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])


def functions_in(rule: Any) -> dict[str, FunctionType]:
    """A mask function and those that it is made of, by their names."""
    found = {}
    if isinstance(rule, FunctionType):
        assert rule.__module__ == "transformers.masking_utils"
        found[rule.__qualname__] = rule
        for value in held_by(rule).values():
            for each in value if isinstance(value, tuple) else (value,):
                found |= functions_in(each)
    return found


def held_by(function: Any) -> dict[str, Any]:
    """What a closure holds, by the names of its variables."""
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def plain_rule() -> Any:
    return mask_arguments(create_causal_mask, LlamaConfig(**SIZES))["mask_function"]


def packed_rule() -> Any:
    return mask_arguments(create_causal_mask, LlamaConfig(**SIZES), PACKED)["mask_function"]


def window_rule() -> Any:
    config = MistralConfig(**SIZES, sliding_window=4)
    return mask_arguments(create_sliding_window_causal_mask, config)["mask_function"]


@check("transformers", "_attn_implementation")
def name_of_an_attention_implementation(folder: Path) -> None:
    seen = list[str]()

    def spy_on_attention(*args: Any, **kwargs: Any) -> Any:
        seen.append("attention")
        return sdpa_attention_forward(*args, **kwargs)

    AttentionMaskInterface.register(SPY, lambda *args, **kwargs: seen.append("mask"))
    AttentionInterface.register(SPY, spy_on_attention)
    config = LlamaConfig(**SIZES)
    config._attn_implementation = SPY
    model = LlamaForCausalLM(config)
    assert model.config._attn_implementation == SPY
    model(IDS)
    assert seen == ["mask", *["attention"] * SIZES["num_hidden_layers"]]
    outer = transformers.Gemma3Config(text_config=SIZES)
    outer._attn_implementation = SPY
    assert outer.text_config._attn_implementation == SPY


@check("transformers", "_model_mapping")
def tables_of_auto_classes(folder: Path) -> None:
    mapping: Any = AutoModelForCausalLM._model_mapping
    assert mapping[LlamaConfig] is LlamaForCausalLM
    assert LlamaConfig in mapping
    assert transformers.CLIPConfig not in mapping
    with pytest.raises(AttributeError):
        _ = transformers.AutoConfig._model_mapping


@check("transformers", "_MAPPING_NAMES")
def tables_of_names(folder: Path) -> None:
    tables = {name: table for name, table in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")}
    assert tables["MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"]["ministral"] == "MinistralForCausalLM"
    pairs = {
        table["mistral"]: table["ministral"] for table in tables.values() if {"mistral", "ministral"} <= set(table)
    }
    assert pairs["MistralForCausalLM"] == "MinistralForCausalLM"


@check("transformers", "_init_weights")
def a_models_initialiser(folder: Path) -> None:
    torch.manual_seed(0)
    model = llama(initializer_range=0.5, vocab_size=4000)
    expected = model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        model.model.rotary_emb._buffers["inv_freq"] = torch.full_like(expected, float("nan"))
        model._init_weights(model.model.rotary_emb)
        model._init_weights(model.lm_head)
        model._init_weights(model.model.layers[0])  # not its children
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)
    assert model.lm_head.weight.std().item() == pytest.approx(0.5, rel=0.05)


@check("transformers", "_is_hf_initialized")
def what_the_initialiser_leaves_alone(folder: Path) -> None:
    model = llama(tie_word_embeddings=False)
    layer = model.model.layers[0]
    for module in model.modules():
        module._is_hf_initialized = False
    tensors = {name: getattr(layer.mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj")}
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(3)
    layer.mlp.gate_proj._is_hf_initialized = True
    tensors["up_proj"]._is_hf_initialized = True
    model.initialize_weights()
    assert {name: bool((tensor == 3).all()) for name, tensor in tensors.items()} == {
        "gate_proj": True,
        "up_proj": True,
        "down_proj": False,
    }


@check("transformers", "LayerNorm")
def classes_that_are_taken_for_norms(folder: Path) -> None:
    class LayerNormLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4))

    module = LayerNormLinear()
    with torch.no_grad():
        llama()._init_weights(module)
    assert bool((module.weight == 1).all())


@check("transformers", "RotaryEmbedding")
def classes_that_are_taken_for_rotary_modules(folder: Path) -> None:
    class OurRotaryEmbedding(modeling_llama.LlamaRotaryEmbedding): ...

    class Ours(modeling_llama.LlamaRotaryEmbedding): ...

    model, places = llama(), torch.arange(5)[None]
    for cls in (OurRotaryEmbedding, Ours):
        module = cls(model.config)
        expected = module.inv_freq.clone()
        module._buffers["inv_freq"] = torch.zeros_like(expected)
        with torch.no_grad():
            model._init_weights(module)
        assert torch.equal(module.inv_freq, expected) == (cls is OurRotaryEmbedding)
    of_a_batch = model.model.rotary_emb(torch.randn(1, 5, 32), places)
    of_nothing = model.model.rotary_emb(torch.empty(0, dtype=torch.float32), places)
    assert all(map(torch.equal, of_a_batch, of_nothing))
    assert [each.dtype for each in of_nothing] == [torch.float32] * 2
    assert model.model.rotary_emb(torch.empty(0, dtype=torch.float16), places)[0].dtype == torch.float16


@check("transformers", "attention_scaling")
def scale_of_cosines(folder: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    module = llama(rope_parameters=yarn).model.rotary_emb
    cos, sin = module(torch.empty(0), torch.arange(5)[None])
    assert module.attention_scaling != 1
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, module.attention_scaling**2))
    types = ["sliding_attention", "full_attention"]
    of_types = Gemma3RotaryEmbedding(Gemma3TextConfig(**SIZES, layer_types=types))
    cos, _ = of_types(torch.empty(0), torch.arange(5)[None], "full_attention")
    assert of_types.full_attention_attention_scaling == 1
    assert bool((cos[0, 0] == 1).all())


def modules_that_stay_in_float32(name: str, folder: Path) -> None:
    cls: Any = type("Kept", (LlamaForCausalLM,), {name: ["norm"], "__module__": LlamaForCausalLM.__module__})
    cls(LlamaConfig(**SIZES)).save_pretrained(folder)
    for dtype in (torch.float16, torch.bfloat16):
        model = cls.from_pretrained(folder, dtype=dtype)
        assert set(getattr(model, name)) == {"norm"}
        is_kept = dtype == torch.float16 or name.endswith("strict")
        assert (model.model.norm.weight.dtype == torch.float32) == is_kept
        assert model.lm_head.weight.dtype == dtype
    assert not getattr(llama(), name)


checks("transformers", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"], modules_that_stay_in_float32)

MIXTRAL = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)


@check("transformers", "_can_record_outputs")
def what_models_record(folder: Path) -> None:
    model = llama()
    assert model.model._can_record_outputs["hidden_states"] is modeling_llama.LlamaDecoderLayer
    assert all(
        hasattr(module, "_can_record_outputs") == isinstance(module, PreTrainedModel) for module in model.modules()
    )


@check("transformers", "target_class")
def what_a_record_is_about(folder: Path) -> None:
    model = on_meta(MixtralForCausalLM, MIXTRAL)
    recorded = model.model._can_record_outputs["router_logits"]
    assert getattr(recorded, "target_class", recorded) is MixtralTopKRouter
    assert not isinstance(recorded, type)
    assert any(isinstance(module, recorded.target_class) for module in model.modules())


@check("transformers", "_no_split_modules")
def classes_that_stay_on_one_device(folder: Path) -> None:
    for model in (llama(), llama().model):
        assert set(model._no_split_modules) == {
            type(model.get_submodule("layers.0" if model.base_model is model else "model.layers.0")).__name__
        }


@check("transformers", "_skip_keys_device_placement")
def arguments_that_are_not_moved(folder: Path) -> None:
    assert CACHE in llama()._skip_keys_device_placement


@check("transformers", "_gradient_checkpointing_func")
def function_of_checkpointed_layers(folder: Path) -> None:
    class Layer(modeling_llama.LlamaDecoderLayer):
        @property
        def _gradient_checkpointing_func(self) -> Any:
            if "given" not in vars(self):
                raise AttributeError("_gradient_checkpointing_func")
            return checkpointed

        @_gradient_checkpointing_func.setter
        def _gradient_checkpointing_func(self, function: Any) -> None:
            vars(self)["given"] = function

    def checkpointed(function: Any, *args: Any) -> Any:
        called.append(len(args))
        return function(*args)

    called: list[int] = []
    model = llama().train()
    for layer in model.model.layers:
        layer.__class__ = Layer
    assert isinstance(layer, GradientCheckpointingLayer)
    model(IDS)
    assert called == []
    model.gradient_checkpointing_enable({"use_reentrant": False})
    given = vars(layer)["given"]
    assert (given.func, given.keywords) == (torch.utils.checkpoint.checkpoint, {"use_reentrant": False})
    model(IDS)
    assert called == [1, 1], "hidden states, and nothing else, are passed by position"


@check("transformers", "_from_model_config")
def generation_settings_in_a_config(folder: Path) -> None:
    LlamaConfig(**SIZES, eos_token_id=7).save_pretrained(folder)
    arguments = {"config_file_name": "config.json", "local_files_only": True}
    settings = GenerationConfig.from_pretrained(folder, _from_model_config=True, **arguments)
    assert settings.eos_token_id == 7
    assert not hasattr(settings, "hidden_size")
    assert not hasattr(settings, "_from_model_config") or settings._from_model_config


@check("transformers", "_hf_peft_config_loaded")
def models_with_adapters(folder: Path) -> None:
    model = llama()
    assert not getattr(model, "_hf_peft_config_loaded", False)
    with pytest.MonkeyPatch.context() as patch:  # it may ask for a newer PEFT than there is
        patch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
        assert model._hf_peft_config_loaded
        model.save_pretrained(folder)
    assert not list(folder.glob("model*.safetensors"))
    assert list(folder.glob("adapter_model*"))


@check("transformers", "_weight_conversions")
def names_that_were_changed_on_loading(folder: Path) -> None:
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=5)
    model: Any = LlavaForConditionalGeneration(config)
    memory = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, names in (("old", None), ("new", memory)):
        model.save_pretrained(folder / name)
        if names is not None:
            save_file(names, folder / name / "model.safetensors", metadata={"format": "pt"})
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(folder / name)
        assert bool(loaded._weight_conversions) is (names is None)
        assert all(each.was_used() for each in loaded._weight_conversions)
        loaded.save_pretrained(folder / "again")
        again, held = (load_file(folder / each / "model.safetensors") for each in ("again", name))
        assert again.keys() == held.keys()
        loaded._weight_conversions = []
        loaded.save_pretrained(folder / "again")
        assert load_file(folder / "again" / "model.safetensors").keys() == memory.keys()


@check("transformers", "_name_or_path")
def where_a_config_comes_from(folder: Path) -> None:
    LlamaConfig(**SIZES).save_pretrained(folder)
    config = LlamaConfig.from_pretrained(folder)
    assert {name for name, value in config.to_dict().items() if value == str(folder)} <= {"_name_or_path"}


@check("transformers", "layernorm")
def parameters_without_weight_decay(folder: Path) -> None:
    module = nn.Module()
    for name in ("layernorm_weight", "layer_norm_weight", "weight"):
        module.register_parameter(name, nn.Parameter(torch.zeros(1)))
    decayed = Trainer.get_decay_parameter_names(SimpleNamespace(), nn.ModuleDict({"qkv": module}))
    assert decayed == ["qkv.layer_norm_weight", "qkv.weight"]
    assert not Trainer.get_decay_parameter_names(SimpleNamespace(), nn.ModuleDict({"layernorm": module}))


@check("transformers", "is_causal")
def direction_of_attention(folder: Path) -> None:
    config = LlamaConfig(**SIZES)
    config.is_causal = False
    assert mask_arguments(create_causal_mask, config)["mask_function"] is bidirectional_mask_function
    assert llama().model.layers[0].self_attn.is_causal is True
    assert SiglipAttention(SiglipVisionConfig()).is_causal is False


@check("transformers", "q_offset")
def keywords_of_mask_interfaces(folder: Path) -> None:
    given = mask_arguments(create_causal_mask, LlamaConfig(**SIZES))
    named = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask")
    assert given.keys() >= {*named, "device"}
    assert [given[name] for name in named[:5]] == [1, 8, 8, 0, 0]
    assert set(inspect.signature(sdpa_mask).parameters) >= set(named)
    assert attention.mask_for_layers(**given) is None


def masks_that_are_left_to_sdpa(name: str, folder: Path) -> None:
    assert name in inspect.signature(sdpa_mask).parameters, "else it would be swallowed"
    rule = causal_mask_function if name == "allow_is_causal_skip" else bidirectional_mask_function
    neither: dict[str, Any] = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    assert sdpa_mask(1, 4, 4, mask_function=rule, **{**neither, name: True}) is None
    made = sdpa_mask(1, 4, 4, mask_function=rule, **neither)
    assert made is not None
    assert made.shape == (1, 1, 4, 4)
    assert bool(made.all()) == (rule is bidirectional_mask_function)


checks("transformers", ["allow_is_causal_skip", "allow_is_bidirectional_skip"], masks_that_are_left_to_sdpa)


@check("transformers", "sdpa_attention_forward")
def attention_of_stock_modules(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 3, 4, generator=generator) for heads in (2, 1, 1))
    module = nn.Module()
    module.num_key_value_groups = 2
    module.is_causal = True
    outs = [
        sdpa_attention_forward(module, query, key, value, None, is_causal=is_causal)[0] for is_causal in (True, False)
    ]
    visible = [torch.ones(3, 3, dtype=torch.bool).tril(), torch.ones(3, 3, dtype=torch.bool)]
    for out, mask in zip(outs, visible, strict=True):
        expected = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(out, expected.transpose(1, 2))


GPT_OSS = transformers.GptOssConfig(**SIZES, head_dim=16, num_local_experts=2, num_experts_per_tok=1)


@check("transformers", "_supports_sdpa")
def classes_without_sdpa(folder: Path) -> None:
    assert llama()._supports_sdpa is True
    assert on_meta(transformers.GptOssForCausalLM, GPT_OSS)._supports_sdpa is False


@check("transformers", "eager_attention_forward")
def eager_attention_of_a_file(folder: Path) -> None:
    for module in (llama().model.layers[0].self_attn, SiglipAttention(SiglipVisionConfig())):
        eager: Any = attention._eager_attention(module)
        assert eager is vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        assert list(inspect.signature(eager).parameters)[:5] == ["module", "query", "key", "value", "attention_mask"]


def given_to_attention(model: Any) -> dict[str, Any]:
    """The keywords that a model calls its attention implementation with."""
    seen: dict[str, Any] = {}

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        seen.update(kwargs, module=module)
        return query.transpose(1, 2), None

    AttentionMaskInterface.register(SPY, lambda *args, **kwargs: None)
    AttentionInterface.register(SPY, spy)
    model.config._attn_implementation = SPY
    model(IDS)
    return seen


def sinks_of_attention(name: str, folder: Path) -> None:
    given = given_to_attention(transformers.GptOssForCausalLM(GPT_OSS))
    assert given["s_aux"] is given["module"].sinks


checks("transformers", ["s_aux", "sinks"], sinks_of_attention)


@check("transformers", "transformers.masking_utils")
def module_of_rules(folder: Path) -> None:
    assert {each.__module__ for each in functions_in(packed_rule()).values()} == {"transformers.masking_utils"}


@check("transformers", "causal_mask_function")
def rule_of_causal_attention(folder: Path) -> None:
    assert plain_rule().__qualname__ == "causal_mask_function"
    assert attention._packing(plain_rule()) == ((), True)


@check("transformers", "bidirectional_mask_function")
def rule_of_attention_both_ways(folder: Path) -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    rule = mask_arguments(create_bidirectional_mask, BertConfig(**sizes))["mask_function"]
    assert rule.__qualname__ == "bidirectional_mask_function"
    assert attention._packing(rule) == ((), False)


@check("transformers", "sliding_window_overlay.<locals>.inner_mask")
def rule_of_a_window(folder: Path) -> None:
    assert "sliding_window_overlay.<locals>.inner_mask" in functions_in(window_rule())
    assert attention._packing(window_rule()) == ((), True)


@check("transformers", "and_masks.<locals>.and_mask")
def rule_of_several(folder: Path) -> None:
    assert window_rule().__qualname__ == packed_rule().__qualname__ == "and_masks.<locals>.and_mask"


@check("transformers", "mask_functions")
def rules_of_several(folder: Path) -> None:
    inside = held_by(window_rule())["mask_functions"]
    assert sorted(each.__qualname__ for each in inside) == [
        "causal_mask_function",
        "sliding_window_overlay.<locals>.inner_mask",
    ]


@check("transformers", "packed_sequence_mask_function.<locals>.inner_mask")
def rule_of_packed_sequences(folder: Path) -> None:
    assert "packed_sequence_mask_function.<locals>.inner_mask" in functions_in(packed_rule())


@check("transformers", "packed_sequence_mask")
def numbers_of_packed_sequences(folder: Path) -> None:
    rule = functions_in(packed_rule())["packed_sequence_mask_function.<locals>.inner_mask"]
    assert held_by(rule)["packed_sequence_mask"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]
    packed, is_causal = attention._packing(packed_rule())
    assert packed is not None
    assert (packed[0].tolist(), is_causal) == ([[0, 0, 0, 1, 1, 1, 1, 1]], True)


REMAPPED = "remap_positions_for_packed_sequence.<locals>.inner_mask"


@check("transformers", REMAPPED)
def rule_by_positions(folder: Path) -> None:
    assert (REMAPPED in functions_in(packed_rule())) == (VERSION >= (5, 23))


@check("transformers", "mask_function")
def rule_inside_one_by_positions(folder: Path) -> None:
    inside = functions_in(packed_rule()).get(REMAPPED)
    if VERSION >= (5, 23):
        assert held_by(inside)["mask_function"] is causal_mask_function
    assert mask_arguments(create_causal_mask, LlamaConfig(**SIZES))["mask_function"] is causal_mask_function


@check("transformers", "is_compileable")
def caches_of_a_fixed_size(folder: Path) -> None:
    config = LlamaConfig(**SIZES)
    assert StaticCache(config=config, max_cache_len=8).is_compileable is True
    assert DynamicCache(config=config).is_compileable is False


def caches_that_are_offloaded(name: str, folder: Path) -> None:
    stream = object()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Stream", lambda: stream)  # there may be no device that has one
        cache = DynamicCache(config=LlamaConfig(**SIZES), offloading=True)
    assert DynamicCache(config=LlamaConfig(**SIZES)).offloading is False
    assert getattr(cache, name) is (True if name == "offloading" else stream)


checks("transformers", ["offloading", "prefetch_stream"], caches_that_are_offloaded)


@check("transformers", "update")
def what_a_cache_holds(folder: Path) -> None:
    config = LlamaConfig(**SIZES)
    for held_in in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=8)):
        for start, tokens in ((0, 3), (3, 2)):
            keys, values = torch.full((2, 1, tokens, 16), start + 1.0), torch.full((2, 1, tokens, 16), start + 2.0)
            held = held_in.update(keys, values, 1)
        assert [each[0, 0, :5, 0].tolist() for each in held] == [[1, 1, 1, 4, 4], [2, 2, 2, 5, 5]]
        assert held[0].shape == (2, 1, 8 if held_in.is_compileable else 5, 16)
        assert int(held_in.get_seq_length(1)) == 5


@check("transformers", "get_model_conversion_mapping")
def conversions_of_a_model(folder: Path) -> None:
    assert get_model_conversion_mapping(on_meta(MixtralForCausalLM, MIXTRAL), add_legacy=False)
    assert not get_model_conversion_mapping(on_meta(LlamaForCausalLM, LlamaConfig(**SIZES)), add_legacy=False)


def bert_renamings() -> list[Any]:
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    found = get_model_conversion_mapping(on_meta(BertModel, BertConfig(**sizes)))
    return [each for each in found if isinstance(each, WeightRenaming)]


@check("transformers", "WeightRenaming")
def conversions_that_rename(folder: Path) -> None:
    assert bert_renamings()
    fusing = get_model_conversion_mapping(on_meta(MixtralForCausalLM, MIXTRAL), add_legacy=False)
    assert not all(isinstance(each, WeightRenaming) for each in fusing)


@check("transformers", "rename_source_key")
def new_name_of_a_tensor(folder: Path) -> None:
    renamed, _ = rename_source_key("embeddings.LayerNorm.gamma", bert_renamings(), [])
    assert renamed == "embeddings.LayerNorm.weight"


def what_a_router_gives(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    router: Any = {
        "MixtralTopKRouter": lambda: MixtralTopKRouter(MIXTRAL),
        "Qwen3MoeTopKRouter": lambda: Qwen3MoeTopKRouter(
            Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)
        ),
    }[name]()
    nn.init.normal_(router.weight)
    logits, weights, index = router(torch.randn(5, 32))
    assert (logits.shape, weights.shape, index.shape) == ((5, 4), (5, 2), (5, 2))
    top = logits.float().softmax(-1).topk(2)
    assert torch.equal(index, top.indices)
    torch.testing.assert_close(weights.float(), top.values / top.values.sum(-1, keepdim=True))


checks("transformers", ["MixtralTopKRouter", "Qwen3MoeTopKRouter"], what_a_router_gives)


def arguments_of_a_layer() -> dict[str, Any]:
    seen: dict[str, Any] = {}
    model = llama()
    model.model.layers[1].register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(IDS, use_cache=True)
    return seen


@check("transformers", "past_key_values")
def cache_that_layers_get(folder: Path) -> None:
    given = arguments_of_a_layer()
    assert [name for name, value in given.items() if isinstance(value, DynamicCache)] == [CACHE]


@check("transformers", "position_embeddings")
def positions_that_layers_get(folder: Path) -> None:
    cos, sin = arguments_of_a_layer()["position_embeddings"]
    assert cos.shape == sin.shape == (1, 8, 16)
    assert {"attention_mask", "position_ids"} <= set(arguments_of_a_layer()) & set(current_gpu._COMMON)


# -- accelerate --


def dispatched(folder: Path) -> Any:
    """A module of two layers, of which one waits on the CPU and one on the disk."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2, bias=False)))
    places = {"0": "cpu", "1": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@check("accelerate", "_hf_hook")
def where_a_hook_is(folder: Path) -> None:
    model = dispatched(folder)
    assert isinstance(model[1][0]._hf_hook, AlignDevicesHook | SequentialHook)
    assert not hasattr(nn.Linear(2, 2), "_hf_hook")
    assert list(offloaded.offloaded(model)) == ["1.0.weight"]


@check("accelerate", "hooks")
def several_hooks(folder: Path) -> None:
    module, hooks = nn.Linear(2, 2), [ModelHook(), ModelHook()]
    for hook in hooks:
        add_hook_to_module(module, hook, append=True)
    assert list(offloaded.hooks_of(module)) == hooks
    assert list(module._hf_hook.hooks) == hooks


def offloading_hook(folder: Path) -> tuple[Any, Any]:
    """The hook of a module whose weight is on the disk, and the weight."""
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2, bias=False)))
    weight = model[0][0].weight.detach().clone()
    accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
    assert model[0][0].weight.is_meta
    (hook,) = [each for each in offloaded.hooks_of(model[0][0]) if getattr(each, "offload", False)]
    return hook, weight


@check("accelerate", "weights_map")
def where_a_hook_takes_weights_from(folder: Path) -> None:
    hook, weight = offloading_hook(folder)
    assert torch.equal(hook.weights_map["weight"], weight)


@check("accelerate", "offload")
def whether_a_hook_brings_weights(folder: Path) -> None:
    assert offloading_hook(folder)[0].offload is True
    assert AlignDevicesHook(execution_device="cpu").offload is False


@check("accelerate", "execution_device")
def where_a_hook_brings_weights(folder: Path) -> None:
    assert torch.device(offloading_hook(folder)[0].execution_device) == torch.device("cpu")


@check("accelerate", "prefix")
def prefix_of_a_module(folder: Path) -> None:
    kept = offloading_hook(folder)[0].weights_map
    assert isinstance(kept, PrefixedDataset)
    assert kept.prefix == "0.0."


@check("accelerate", "dataset")
def map_of_all_modules(folder: Path) -> None:
    hook, weight = offloading_hook(folder)
    assert isinstance(hook.weights_map.dataset, OffloadedWeightsLoader)
    assert torch.equal(hook.weights_map.dataset["0.0.weight"], weight)


@check("accelerate", "all_keys")
def names_of_all_weights(folder: Path) -> None:
    hook, _ = offloading_hook(folder)
    (folder / "0.0.weight.dat").unlink()  # nothing is read to find out
    assert list(hook.weights_map.dataset.all_keys) == ["0.0.weight"]
    assert offloaded._has(hook.weights_map, "weight")
    assert not offloaded._has(hook.weights_map, "bias")


@check("accelerate", "index.json")
def index_of_an_offload_folder(folder: Path) -> None:
    tensors = {str(dtype): torch.ones(2, 3, dtype=dtype) for dtype in placement._NUMPY}
    offload_state_dict(folder, tensors)
    index = json.loads((folder / "index.json").read_text())
    assert index == {str(dtype): {"dtype": name, "shape": [2, 3]} for dtype, name in placement._NUMPY.items()}
    loader = OffloadedWeightsLoader(save_folder=folder)
    for name, tensor in tensors.items():
        torch.testing.assert_close(loader[name], tensor, rtol=0, atol=0)
    written = (folder / "index.json").write_text(json.dumps({"1.0.weight": {"dtype": "float32", "shape": [2, 2]}}))
    assert written
    dispatched(folder)
    assert not (folder / "1.0.weight.dat").exists(), "where there is an index, nothing is written again"


@check("accelerate", ".dat")
def files_of_an_offload_folder(folder: Path) -> None:
    tensor = torch.randn(2, 3).bfloat16()
    offload_state_dict(folder, {"a.weight": tensor})
    held = torch.from_file(str(folder / "a.weight.dat"), size=6, dtype=torch.bfloat16).view(2, 3)
    assert torch.equal(held, tensor)
    assert {path.name for path in folder.iterdir()} == {"a.weight.dat", "index.json"}


@check("accelerate", "accelerate.big_modeling")
def who_takes_weights_away(folder: Path) -> None:
    def dispatch(model: nn.Module) -> None:
        accelerate.dispatch_model(model, {"0": "cpu", "1": "disk"}, main_device="cpu", offload_dir=folder / "other")

    acts: dict[str, Callable[[nn.Module], object]] = {
        "cpu_offload": partial(accelerate.cpu_offload, execution_device=torch.device("cpu")),
        "disk_offload": partial(accelerate.disk_offload, offload_dir=folder, execution_device=torch.device("cpu")),
        "dispatch_model": dispatch,
    }
    for name, act in acts.items():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        assert ("accelerate.big_modeling", name) in askers(model, act)


@check("accelerate", "accelerate.utils.fsdp_utils")
def who_shards_a_model(folder: Path) -> None:
    accelerator = SimpleNamespace(is_main_process=True, device=torch.device("cpu"))
    with processes(0, 1):
        model = nn.Sequential(nn.Linear(2, 2))
        whole = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        fully_shard(model.to("meta"), mesh=init_device_mesh("cpu", (1,)))
        found = askers(model, lambda model: fsdp_utils.fsdp2_load_full_state_dict(accelerator, model, whole))
    assert ("accelerate.utils.fsdp_utils", "fsdp2_load_full_state_dict") in found


@check("accelerate", "accelerate.utils.modeling.check_device_map")
def who_checks_a_device_map(folder: Path) -> None:
    found = askers(nn.Linear(2, 2), lambda model: modeling.check_device_map(model, {"": "cpu"}))
    assert [".".join(each) for each in found] == ["accelerate.utils.modeling.check_device_map"]


# -- peft --


@check("peft", "base_model.model")
def the_model_under_adapters(folder: Path) -> None:
    model = llama()
    assert peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).base_model.model is model


class Seen(nn.Linear):
    """A linear layer that remembers the tensors which it is called with."""

    def forward(self, input: Tensor) -> Tensor:
        self.__dict__.setdefault("seen", []).append(input)
        return super().forward(input)


def adapted(layer: nn.Module) -> Any:
    """An adapter around ``layer`` that changes what it gives."""
    config = peft.LoraConfig(target_modules=["layer"], init_lora_weights=False)
    return peft.get_peft_model(nn.ModuleDict({"layer": layer}), config).base_model.model["layer"]


@check("peft", "base_layer")
def what_an_adapter_calls(folder: Path) -> None:
    layer = Seen(3, 3)
    adapter, given = adapted(layer), torch.randn(2, 3)
    out = adapter(given)
    assert adapter.base_layer is layer
    assert alike(layer.seen, [given])
    assert not torch.allclose(out, layer(given))
    assert "layer.base_layer.weight" in dict(nn.ModuleDict({"layer": adapter}).named_parameters())


@check("peft", "weight.data")
def how_adapters_are_merged(folder: Path) -> None:
    class Watched(Tensor):
        @property
        def data(self) -> Tensor:
            seen.append("taken")
            plain: Tensor = torch._C.TensorBase.data.__get__(self)
            return plain

        @data.setter
        def data(self, value: Tensor) -> None:
            seen.append("set")
            assert value.data_ptr() == self.data_ptr(), "added to in place"

    seen: list[str] = []
    layer = nn.Linear(3, 3, bias=False)
    adapter = adapted(layer)
    del layer._parameters["weight"]
    weight = torch.zeros(3, 3).as_subclass(Watched)
    layer.__dict__["weight"] = weight
    seen.clear()
    adapter.merge()
    assert seen[-2:] == ["taken", "set"]
    assert bool((weight != 0).any())


# -- Transformer Engine --


def engine() -> Any:
    return importlib.import_module("transformer_engine.pytorch")


def recipes() -> Any:
    return importlib.import_module("transformer_engine.common.recipe")


def state() -> Any:
    """The state of quantization, found as the code finds it."""
    engine()
    return sys.modules["transformer_engine.pytorch.quantization"].FP8GlobalStateManager


def linear(**arguments: Any) -> Any:
    return engine().Linear(64, 64, params_dtype=torch.bfloat16, device="cuda", **arguments)


def rows(count: int = 32, size: int = 64) -> Tensor:
    """The same numbers each time."""
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)


def called(module: Any, recipe: Any, **arguments: Any) -> Tensor:
    """What a module makes of some rows, quantized by a recipe."""
    with engine().autocast(enabled=True, recipe=recipe):
        out: Tensor = module(rows(), **arguments)
    return out


def shares_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@check("transformer_engine", "transformer_engine.pytorch.quantization")
def module_of_quantization(folder: Path) -> None:
    te = engine()
    assert "transformer_engine.pytorch.quantization" in sys.modules
    assert sys.modules["transformer_engine.pytorch.quantization"].autocast is te.autocast


@check("transformer_engine", "FP8GlobalStateManager")
def state_of_quantization(folder: Path) -> None:
    assert isinstance(state(), type)
    assert importlib.import_module("transformer_engine.pytorch.module.base").FP8GlobalStateManager is state()


@check("transformer_engine", "is_fp8_enabled")
def whether_an_autocast_is_in_force(folder: Path) -> None:
    te, recipe = engine(), recipes().Float8CurrentScaling()
    seen = [state().is_fp8_enabled()]
    with te.autocast(enabled=True, recipe=recipe):
        seen.append(state().is_fp8_enabled())
        with te.autocast(enabled=False):
            seen.append(state().is_fp8_enabled())
    assert [*seen, state().is_fp8_enabled()] == [False, True, False, False]


@check("transformer_engine", "get_fp8_recipe")
def recipe_in_force(folder: Path) -> None:
    recipe = recipes().Float8CurrentScaling()
    with engine().autocast(enabled=True, recipe=recipe):
        assert state().get_fp8_recipe() is recipe


@check("transformer_engine", "get_buffer_info")
def note_of_scales_to_be_updated(folder: Path) -> None:
    module = linear()
    assert state().get_buffer_info() not in module.fp8_meta
    called(module, recipes().DelayedScaling())
    assert state().get_buffer_info() in module.fp8_meta


@check("transformer_engine", "global_fp8_buffer_pos_fwd_recompute")
def note_of_checkpointed_scales(folder: Path) -> None:
    te, module = engine(), linear()
    x = rows().requires_grad_()
    with te.autocast(enabled=True, recipe=recipes().DelayedScaling()):
        out = te.checkpoint(module, x)
    assert "global_fp8_buffer_pos_fwd_recompute" in module.fp8_meta
    out.sum().backward()
    assert x.grad is not None


def modules_with_products() -> list[Any]:
    te, common = engine(), {"params_dtype": torch.bfloat16, "device": "cuda"}
    return [
        te.Linear(64, 64, **common),
        te.LayerNormLinear(64, 64, **common),
        te.LayerNormMLP(64, 64, **common),
        te.GroupedLinear(2, 64, 64, **common),
    ]


@check("transformer_engine", "fp8_meta")
def notes_of_modules_with_products(folder: Path) -> None:
    assert all(isinstance(vars(module)["fp8_meta"], dict) for module in modules_with_products())
    for kind in (engine().RMSNorm, engine().LayerNorm):
        assert "fp8_meta" not in vars(kind(64, device="cuda"))


@check("transformer_engine", "quantizers")
def quantizers_of_a_module(folder: Path) -> None:
    module, recipe = linear(), recipes().Float8CurrentScaling()
    assert isinstance(vars(module)["quantizers"], dict)
    called(module, recipe)
    first = module.quantizers["scaling_fwd"]
    called(module, recipe)
    assert first
    assert module.quantizers["scaling_fwd"] is first
    called(module, recipes().DelayedScaling())
    assert module.quantizers["scaling_fwd"] is not first


@check("transformer_engine", "scaling_fwd")
def key_of_the_forward_pass(folder: Path) -> None:
    module = linear()
    assert "scaling_fwd" in module.quantizers
    called(module, recipes().DelayedScaling())
    assert module.fp8_meta["scaling_fwd"] is not None
    assert len(module.quantizers["scaling_fwd"]) >= 2  # of the input and of the weight


@check("transformer_engine", "scale")
def scales_of_delayed_scaling(folder: Path) -> None:
    module = linear()
    called(module, recipes().DelayedScaling())
    scales, quantizers = module.fp8_meta["scaling_fwd"].scale, module.quantizers["scaling_fwd"]
    assert scales.dtype == torch.float32
    assert shares_memory(quantizers[0].scale, scales)
    quantizers[1].scale.copy_(torch.full_like(quantizers[1].scale, 4))
    assert scales[1] == 4


@check("transformer_engine", "amax_history")
def state_of_delayed_scaling(folder: Path) -> None:
    module = linear()
    called(module, recipes().Float8CurrentScaling())
    assert not hasattr(module.fp8_meta["scaling_fwd"], "amax_history")
    called(module, recipes().DelayedScaling())
    assert module.fp8_meta["scaling_fwd"].amax_history.dim() == 2


@check("transformer_engine", "make_quantizers")
def quantizers_over_a_state(folder: Path) -> None:
    module = linear()
    called(module, recipes().DelayedScaling())
    kept = module.fp8_meta["scaling_fwd"]
    made = kept.make_quantizers()
    assert [type(each) for each in made] == [type(each) for each in module.quantizers["scaling_fwd"]]
    assert all(shares_memory(each.scale, kept.scale) for each in made)


@check("transformer_engine", "_fp8_workspaces")
def quantized_weights_that_are_kept(folder: Path) -> None:
    for module in modules_with_products()[:3]:
        assert isinstance(vars(module)["_fp8_workspaces"], dict)
        ours: dict[str, Any] = {}
        vars(module)["_fp8_workspaces"] = ours
        recipe = recipes().Float8CurrentScaling()
        with torch.no_grad():
            before = called(module, recipe, is_first_microbatch=False)
            assert len(ours) == sum(parameter.dim() == 2 for parameter in module.parameters())
            for parameter in module.parameters():
                if parameter.dim() == 2:
                    parameter.zero_()
            assert torch.equal(called(module, recipe, is_first_microbatch=False), before), "of the copies"
            ours.clear()
            assert not torch.equal(called(module, recipe, is_first_microbatch=False), before), "of the weights"


@check("transformer_engine", "get_metadata")
def tensors_of_a_quantized_one(folder: Path) -> None:
    module = linear()
    with torch.no_grad():
        called(module, recipes().Float8CurrentScaling(), is_first_microbatch=False)
    (copy,) = module._fp8_workspaces.values()
    parts = [part for part in copy.get_metadata().values() if isinstance(part, Tensor)]
    assert 64 * 64 in [part.nbytes for part in parts]


@check("transformer_engine", "param_init_meta")
def notes_of_parameters(folder: Path) -> None:
    for module in modules_with_products():
        assert set(vars(module)["param_init_meta"]) >= {name for name, _ in module.named_parameters()}


@check("transformer_engine", "fp8_meta_index")
def numbers_of_quantizers(folder: Path) -> None:
    _, norm_linear, mlp, _ = modules_with_products()
    assert norm_linear.param_init_meta["weight"].fp8_meta_index is not None
    assert norm_linear.param_init_meta["bias"].fp8_meta_index is None
    assert norm_linear.param_init_meta["layer_norm_weight"].fp8_meta_index is None
    of_mlp = {mlp.param_init_meta[name].fp8_meta_index for name in ("fc1_weight", "fc2_weight")}
    assert len(of_mlp) == 2
    assert None not in of_mlp


@check("transformer_engine", "init_fp8_metadata")
def quantizers_before_a_call(folder: Path) -> None:
    te, module = engine(), engine().Linear(64, 64, params_dtype=torch.bfloat16, device="meta")
    module.primary_weights_in_fp8 = True
    with te.quantized_model_init(enabled=True, recipe=recipes().Float8CurrentScaling()):
        module.init_fp8_metadata(num_gemms=1)
    quantizer = module.quantizers["scaling_fwd"][module.param_init_meta["weight"].fp8_meta_index]
    quantizer.internal = False
    torch.testing.assert_close(quantizer(rows(64)).dequantize(), rows(64), rtol=0.1, atol=0.1)


@check("transformer_engine", "primary_weights_in_fp8")
def whether_weights_are_held_quantized(folder: Path) -> None:
    assert linear().primary_weights_in_fp8 is False
    with engine().quantized_model_init(enabled=True, recipe=recipes().Float8CurrentScaling()):
        module = linear()
    assert module.primary_weights_in_fp8 is True
    assert type(module.weight) is not nn.Parameter


def weight_quantizer() -> Any:
    module = linear()
    called(module, recipes().Float8CurrentScaling())
    return module.quantizers["scaling_fwd"][module.param_init_meta["weight"].fp8_meta_index]


@check("transformer_engine", "set_usage")
def transposed_weights(folder: Path) -> None:
    quantizer, weight = weight_quantizer(), rows(64)
    quantizer.internal = False
    sizes = []
    for is_transposed_too in (False, True):
        quantizer.set_usage(rowwise=True, columnwise=is_transposed_too)
        parts = quantizer(weight).get_metadata().values()
        sizes.append(sum(part.nbytes for part in parts if isinstance(part, Tensor)) // (64 * 64))
    assert sizes == [1, 2]


@check("transformer_engine", "internal")
def whether_a_tensor_is_made(folder: Path) -> None:
    quantizer, weight = weight_quantizer(), rows(64)
    for is_internal in (False, True):
        quantizer.internal = is_internal
        assert isinstance(quantizer(weight), Tensor) is not is_internal


@check("transformer_engine", "max_fwd")
def largest_number_of_a_format(folder: Path) -> None:
    assert recipes().DelayedScaling().fp8_format.value.max_fwd == 448


@check("transformer_engine", "_high_precision_init_val")
def what_a_weight_was_quantized_from(folder: Path) -> None:
    options = {"recipe": recipes().Float8CurrentScaling(), "preserve_high_precision_init_val": True}
    with engine().quantized_model_init(enabled=True, **options):
        weight = linear().weight
    kept = weight._high_precision_init_val
    assert weight.get_high_precision_init_val() is kept
    assert kept.device.type == "cpu"
    weight.clear_high_precision_init_val()
    assert not hasattr(weight, "_high_precision_init_val")


def registered(kind: str, *sizes: int) -> dict[str, dict[str, Any]]:
    """The names under which a module registers its parameters, with keywords."""
    seen: dict[str, dict[str, Any]] = {}

    class Seeing(getattr(engine(), kind)):
        def register_parameter(self, name: str, param: Any, **kwargs: Any) -> None:
            seen.setdefault(name, kwargs)  # a parameter that is assigned later is registered again
            super().register_parameter(name, param, **kwargs)

    Seeing(*sizes, params_dtype=torch.bfloat16, device="cuda")
    return seen


@check("transformer_engine", "init_fn")
def initialisers_of_parameters(folder: Path) -> None:
    for kind, norms_and_biases in (
        ("Linear", ["bias"]),
        ("LayerNormLinear", ["bias", "layer_norm_weight", "layer_norm_bias"]),
        ("LayerNormMLP", ["fc1_bias", "fc2_bias", "layer_norm_weight", "layer_norm_bias"]),
    ):
        found = registered(kind, 64, 64)
        assert all("init_fn" in kwargs for kwargs in found.values())
        assert all("<locals>" in found[name]["init_fn"].__qualname__ for name in norms_and_biases)


@check("transformer_engine", "layer_norm_weight")
def names_of_a_fused_norm(folder: Path) -> None:
    for kind in ("LayerNormLinear", "LayerNormMLP"):
        assert {"layer_norm_weight", "layer_norm_bias"} <= set(registered(kind, 64, 64))


@check("transformer_engine", '"meta"')
def parameters_without_values(folder: Path) -> None:
    te, common = engine(), {"params_dtype": torch.bfloat16, "device": "meta"}
    made = [te.Linear(64, 64, **common), te.LayerNormLinear(64, 64, **common), te.LayerNormMLP(64, 64, **common)]
    made += [te.GroupedLinear(2, 64, 64, **common), te.RMSNorm(64, device="meta"), te.LayerNorm(64, device="meta")]
    assert all(parameter.is_meta for module in made for parameter in module.parameters())


@check("transformer_engine", "return_layernorm_output")
def normed_input_when_asked(folder: Path) -> None:
    module = engine().LayerNormLinear(64, 64, params_dtype=torch.bfloat16, device="cuda")
    assert module.return_layernorm_output is False
    alone = module(rows())
    module.return_layernorm_output = True
    out, normed = module(rows())
    assert torch.equal(out, alone)
    expected = nn.functional.layer_norm(rows().float(), (64,), eps=module.eps)
    torch.testing.assert_close(normed.float(), expected, rtol=1e-2, atol=1e-2)


MADE_WITH: dict[str, Any] = {
    "zero_centered_gamma": True,
    "normalization": "RMSNorm",
    "eps": 0.25,
    "use_bias": False,
    "activation": "swiglu",
}


def what_a_module_was_made_with(name: str, folder: Path) -> None:
    te, value = engine(), MADE_WITH[name]
    argument = {"use_bias": "bias"}.get(name, name)
    kinds = [te.LayerNormMLP] if name == "activation" else [te.LayerNormLinear, te.LayerNormMLP]
    for kind in kinds:
        module = kind(64, 64, params_dtype=torch.bfloat16, device="cuda", **{argument: value})
        assert getattr(module, name) == value


checks("transformer_engine", MADE_WITH, what_a_module_was_made_with)


@check("transformer_engine", "qkv_format")
def layout_of_attention(folder: Path) -> None:
    assert engine().DotProductAttention(2, 64, qkv_format="bshd").qkv_format == "bshd"


@check("transformer_engine", "softcap")
def cap_of_attention(folder: Path) -> None:
    kind = engine().DotProductAttention
    if "softcap" in inspect.signature(kind).parameters:
        assert kind(2, 64, softcap=30.0).softcap == 30
        assert not kind(2, 64).softcap
    else:
        version = importlib.import_module("transformer_engine").__version__
        assert tuple(int(part) for part in version.split(".")[:2]) < (2, 20)


@check("transformer_engine", "softmax_type")
def softmax_of_attention(folder: Path) -> None:
    assert engine().DotProductAttention(2, 64).softmax_type == "vanilla"
    assert engine().DotProductAttention(2, 64, softmax_type="off-by-one").softmax_type == "off-by-one"


@check("transformer_engine", "weight{index}")
def parameters_of_grouped_products(folder: Path) -> None:
    module = engine().GroupedLinear(2, 64, 64, bias=False, params_dtype=torch.bfloat16, device="meta")
    assert [name for name, _ in module.named_parameters()] == ["weight0", "weight1"]
    matrices, inp = rows(128).view(2, 64, 64), rows()
    module._parameters.update(zip(("weight0", "weight1"), matrices.unbind(0), strict=True))
    expected = torch.cat([inp[:8] @ matrices[0].T, inp[8:] @ matrices[1].T])
    torch.testing.assert_close(module(inp, [8, 24]), expected, rtol=2e-2, atol=2e-1)


@check("transformer_engine", "transformer_engine_torch")
def kernels_of_activations(folder: Path) -> None:
    engine()
    kernels = importlib.import_module("transformer_engine_torch")
    first = rows(16, 128)
    for name in dict.fromkeys(ACTIVATIONS.values()):
        wide = first.float().requires_grad_()
        expected = activate(wide, name)
        out = getattr(kernels, name)(first, None)
        torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
        expected.sum().backward()
        derived = getattr(kernels, f"d{name}")(torch.ones_like(out), first, None)
        torch.testing.assert_close(derived.float(), wide.grad, rtol=5e-2, atol=5e-2)


@check("transformer_engine", "transformer_engine.pytorch.attention.rope")
def rotation_by_angles(folder: Path) -> None:
    turn = importlib.import_module("transformer_engine.pytorch.attention.rope").apply_rotary_pos_emb
    x = rows().view(2, 8, 2, 64)
    angles = torch.rand(8, 32, device="cuda").repeat(1, 2) * 6
    found = turn(x, angles[:, None, None], tensor_format="bshd", fused=True)
    expected = apply_rotary(x, angles.cos()[None], angles.sin()[None])
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    as_rows = turn(x.reshape(-1, 1, 2, 64), angles.repeat(2, 1)[:, None, None], tensor_format="sbhd", fused=True)
    torch.testing.assert_close(as_rows.view(x.shape), expected, rtol=2e-2, atol=2e-2)


KINDS = {"mxfp8": "MXFP8BlockScaling", "nvfp4": "NVFP4BlockScaling", "custom": "CustomRecipe"}


def kind_of_a_recipe(name: str, folder: Path) -> None:
    kind = getattr(recipes(), KINDS[name], None)  # older versions do not know all kinds
    if kind is not None:
        assert getattr(kind, name)() is True
        assert getattr(recipes().DelayedScaling(), name)() is False
        assert getattr(recipes().Float8CurrentScaling(), name)() is False


checks("transformer_engine", KINDS, kind_of_a_recipe)


@check("transformer_engine", "Recipe")
def class_of_recipes(folder: Path) -> None:
    module = recipes()
    assert sys.modules["transformer_engine.common.recipe"] is module
    names = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", *KINDS.values())
    kinds = [vars(module)[name] for name in names if name in vars(module)]
    assert len(kinds) >= 3
    assert all(issubclass(kind, module.Recipe) for kind in kinds)


@check("accelerate", "accelerate.utils.transformer_engine")
def who_exchanges_layers(folder: Path) -> None:
    from accelerate.utils import transformer_engine

    tree = ast.parse(inspect.getsource(transformer_engine.convert_model))
    calls = [node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and hasattr(node.func, "attr")]
    assert "named_children" in calls
    assert transformer_engine.convert_model.__module__ == transformer_engine.__name__


@check("accelerate", "accelerate.utils.modeling.load_checkpoint_in_model")
def who_fills_by_name(folder: Path) -> None:
    from safetensors.torch import save_file

    class Asked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            seen.append((frame.f_globals["__name__"], frame.f_code.co_name, frame.f_locals["device_map"]))
            assert not self.weight.detach().any()
            return super().state_dict(*args, **kwargs)

    seen: list[Any] = []
    save_file({"weight": torch.ones(1)}, folder / "model.safetensors")
    accelerate.load_checkpoint_in_model(Asked(), str(folder), device_map={"": "cpu"})
    assert seen[0] == ("accelerate.utils.modeling", "load_checkpoint_in_model", {"": "cpu"})


# -- Python --


@check("sys", "_getframe")
def frame_of_a_caller(folder: Path) -> None:
    def ask() -> Any:
        return sys._getframe(1)

    frame = ask()
    assert (frame.f_globals["__name__"], frame.f_code.co_name) == (__name__, "frame_of_a_caller")
    assert frame.f_back is not None


# -- nothing is left out --


DOCUMENTED = frozenset(
    (
        # Fields of configs, which are as public as a checkpoint's config.json.
        *("attention_bias", "config", "decoder_sparse_step", "first_k_dense_replace", "generation_config", "head_dim"),
        *("is_decoder", "layer_types", "max_position_embeddings", "mlp_bias", "mlp_only_layers", "model_type"),
        *("num_attention_heads", "num_experts", "num_key_value_heads", "num_local_experts", "output_attentions"),
        *("original_max_position_embeddings", "output_router_logits", "pad_token_id", "partial_rotary_factor"),
        *("rope_parameters", "sliding_window", "tie_word_embeddings", "use_sliding_window"),
        # Parts of a model's output.
        *("logits", CACHE, "past_key_values"),
        # Methods, classes and modules of torch, Transformer Engine and PyYAML, and arguments of recipes.
        *("register_forward_pre_hook", "torch.distributed.tensor", "TransformerLayer", "fp8_mha"),
        *("quantization_alignment", "transformer_engine.common.recipe", "CSafeLoader", "anchor", "tag"),
    )
)
"""What the code asks for by a string (``getattr``, ``sys.modules.get``), and what its library does document."""


class Use(NamedTuple):
    """A name of somebody else in the code."""

    module: str
    line: int
    name: str


def sources(root: Path) -> dict[str, str]:
    """The code of the package and of its plugins, by module."""
    found = {}
    for base, path in [(root, root / "tepatch"), *((src, src) for src in sorted(root.glob("plugins/*/src")))]:
        for file in sorted(path.rglob("*.py")):
            name = ".".join(file.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
            found[name] = file.read_text(encoding="utf-8")
    return found


def is_private(name: str) -> bool:
    """Whether a name begins with an underscore and is not one of Python's own (``__dict__``)."""
    return re.fullmatch(r"_[a-zA-Z]\w*", name) is not None


def text_of(node: ast.AST | None) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def is_notes(node: ast.AST) -> bool:
    """Whether this is the ``__dict__`` of something, or its ``vars()``."""
    is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "vars"
    return is_call or (isinstance(node, ast.Attribute) and node.attr == "__dict__")


def is_own(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


@cache
def defined(text: str) -> frozenset[str]:
    """The names that code itself gives to anything: functions, classes, variables, fields, attributes of self."""
    return frozenset(_defined(parsed(text)))


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value):
            yield node.attr
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and is_notes(node.value):
            if isinstance(node.value, ast.Attribute) and is_own(node.value.value):
                yield text_of(node.slice)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("__dict__.setdefault"):
            yield text_of(node.args[0])


@cache
def used(text: str) -> frozenset[tuple[int, str]]:
    """The names in a module's code, with their lines, that may be somebody else's insides."""
    return frozenset(_used(parsed(text)))


def _used(tree: ast.Module) -> Iterator[tuple[int, str]]:
    alone = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and not node.bases]
    # What a class without bases calls so is its own, whatever others call so.
    own = {
        id(node) for each in alone for node in ast.walk(each) if isinstance(node, ast.Attribute) and is_own(node.value)
    }
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    pieces = {id(each) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for each in node.values}
    for node in ast.walk(tree):
        if id(node) in own or node in alone:
            continue
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and text_of(node) and id(node) not in documentation | pieces:
            # A string that is a name, or a path of some.
            if re.fullmatch(r"[\w.]+", text_of(node)):
                yield from ((node.lineno, part) for part in text_of(node).split(".") if is_private(part))
        elif isinstance(node, ast.keyword) and is_private(node.arg or ""):
            yield node.value.lineno, str(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            paths = [alias.name for alias in node.names]
            paths += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            yield from ((node.lineno, part) for path in paths for part in path.split(".") if is_private(part))
        elif isinstance(node, ast.Subscript) and is_notes(node.value) and text_of(node.slice):
            yield node.lineno, text_of(node.slice)
        elif isinstance(node, ast.Compare) and is_notes(node.comparators[0]) and text_of(node.left):
            yield node.lineno, text_of(node.left)
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, name) for name in asked_for(node))
        elif isinstance(node, ast.ClassDef):
            overrides = (each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
            yield from ((each.lineno, each.name) for each in overrides if each.name in inherited())


_LOADED = "sys.modules.get"


def asked_for(call: ast.Call) -> Iterator[str]:
    """The names of attributes, keys of ``__dict__`` and modules that a call asks for by a string."""
    function, arguments = call.func, [text_of(each) for each in call.args]
    if isinstance(function, ast.Name) and function.id in ("getattr", "hasattr", "setattr", "delattr"):
        yield from (name for name in arguments[1:2] if name and not name.startswith("__"))
    elif isinstance(function, ast.Attribute) and (is_notes(function.value) or ast.unparse(function) == _LOADED):
        yield from (name for name in arguments[:1] if name)


@cache
def inherited() -> frozenset[str]:
    """Private names that modules and configs of torch and transformers have: the code's classes are made of such."""
    model = llama()
    model.gradient_checkpointing_enable()
    kinds = [*{type(module): module for module in model.modules()}.values(), model.config]
    return frozenset(name for each in kinds for name in dir(each) if is_private(name))


def unlisted(code: dict[str, str], entries: Iterable[Borrowed] = BORROWED) -> list[Use]:
    """The uses of names that neither the code defines nor the table lists."""
    own = frozenset[str]().union(*map(defined, code.values())) - inherited()
    names = [entry.name for entry in entries]
    listed = {*names, *(part for name in names for part in name.split(".") if is_private(part))}
    found = []
    for module, text in code.items():
        for line, name in sorted(used(text)):
            begins = name.endswith("_") and any(each.startswith(name) for each in listed)
            if not begins and name not in own | listed | DOCUMENTED:
                found.append(Use(module, line, name))
    return found


@pytest.fixture(scope="module")
def code(pytestconfig: pytest.Config) -> dict[str, str]:
    return sources(pytestconfig.rootpath)


def test_each_entry_has_one_check_and_each_check_an_entry() -> None:
    names = [(entry.package, entry.name) for entry in BORROWED]
    assert len(set(names)) == len(names)
    assert set(names) == set(CHECKS)


def test_each_entry_says_why_and_where(code: dict[str, str]) -> None:
    for entry in BORROWED:
        assert entry.why, entry.name
        assert entry.used_in, entry.name
        missing = [module for module in entry.used_in if entry.name not in code.get(module, "")]
        assert not missing, f"{entry.name!r} does not stand in {missing}"


def test_no_private_name_is_used_that_is_not_in_the_table(code: dict[str, str]) -> None:
    found = unlisted(code)
    assert not found, "add them to tests/shared/borrowed.py with a check here, or do without: " + "; ".join(
        map(str, found)
    )


def test_each_entry_names_every_module_that_uses_it(code: dict[str, str]) -> None:
    places = {entry.name: entry.used_in for entry in BORROWED if is_private(entry.name)}
    uses = [Use(module, line, name) for module, text in code.items() for line, name in used(text) if name in places]
    assert [use for use in uses if use.module not in places[use.name]] == []


SNIPPETS = {
    "an attribute": "def f(module):\n    return module._secret",
    "an attribute of self": "class A(B):\n    def f(self):\n        return self._secret",
    "of super": "class A(B):\n    def f(self):\n        return super()._secret()",
    "getattr": "found = getattr(module, '_secret', None)",
    "getattr without an underscore": "found = getattr(module, 'secret', None)",
    "hasattr": "found = hasattr(module, '_secret')",
    "setattr": "setattr(module, '_secret', 1)",
    "a key of __dict__": "found = module.__dict__['secret']",
    "a key of vars": "found = vars(module)['secret']",
    "get of __dict__": "found = module.__dict__.get('secret', {})",
    "in __dict__": "found = 'secret' in module.__dict__",
    "an assigned key of __dict__": "module.__dict__['_secret'] = 1",
    "a keyword": "load(folder, _secret=True)",
    "an import": "from torch import _secret",
    "an imported module": "import torch._secret.more",
    "a module": "found = sys.modules.get('torch.secret')",
    "a string": "PATHS = ('module._secret',)",
}


@pytest.mark.parametrize("kind", SNIPPETS)
def test_the_scan_finds(kind: str) -> None:
    found = unlisted({"snippet": SNIPPETS[kind]})
    assert [use.name.removeprefix("torch.").strip("_") for use in found] == ["secret"]


def test_the_scan_leaves_what_the_code_defines() -> None:
    text = """
class A:
    _field: int = 0

    def __init__(self):
        self._own = 1

    def _method(self):
        "Text about module._secret."
        return self._own, self.__dict__, f"{self}_suffix"

def f(a):
    return a._own, a._method(), a._field, getattr(a, "_own"), a.__dict__.setdefault("note", 1), a.__dict__["note"]
"""
    assert unlisted({"snippet": text}) == []


def test_the_scan_finds_what_a_class_of_others_calls_so() -> None:
    text = "class A(nn.Module):\n    def _apply(self, fn):\n        return super()._apply(fn)"
    assert unlisted({"snippet": text}) == []
    assert {use.line for use in unlisted({"snippet": text}, ())} == {2, 3}


def test_a_private_name_that_is_added_anywhere_is_found(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    for place in ("tepatch", "plugins"):
        shutil.copytree(
            pytestconfig.rootpath / place, tmp_path / place, ignore=shutil.ignore_patterns("tests", "*.pyc")
        )
    for number, file in enumerate(
        ("tepatch/te/nvidia/weight_cache.py", "plugins/tepatch-llama/src/tepatch_llama/layer.py")
    ):
        path = tmp_path / file
        path.write_text(path.read_text(encoding="utf-8") + f"\nnn._made_up_{number}\n", encoding="utf-8")
    found = set(unlisted(sources(tmp_path))) - set(unlisted(sources(pytestconfig.rootpath)))
    assert {(use.module, use.name) for use in found} == {
        ("tepatch.te.nvidia.weight_cache", "_made_up_0"),
        ("tepatch_llama.layer", "_made_up_1"),
    }


def test_no_entry_with_an_underscore_can_be_left_out(code: dict[str, str]) -> None:
    for entry in BORROWED:
        if is_private(entry.name) and not entry.name.endswith("_"):  # which begins other names
            rest = [each for each in BORROWED if each is not entry]
            assert entry.name in {use.name for use in unlisted(code, rest)}, f"nobody uses {entry.name}"
