"""What the code takes from the insides of other libraries: names that these may change in any release.

Transformers, torch, Transformer Engine, accelerate and PEFT promise what they document. Where that is not enough, a
name from their insides is used, and stands here: attributes that begin with an underscore, names of closures, classes
and callers that are recognised by their spelling, and notes that modules keep in themselves. For each entry there is a
test that looks at the real thing, so that a release that changes it is told by name (``tests/test_borrowed.py``). The
same tests find a private name in the code that is not in this table.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BORROWED", "Borrowed"]


@dataclass(frozen=True, slots=True)
class Borrowed:
    """One name, which its library may take away without a word."""

    package: str
    """The name of the package that is imported."""
    name: str
    """As it is spelt in the code."""
    why: str
    """What it is, and what it is needed for."""
    used_in: tuple[str, ...]
    """The modules that rely on it."""


_TORCH = (
    Borrowed(
        "torch",
        "_parameters",
        "a module's own parameters: assigned without the checks of setattr, which refuses tensors and meta parameters",
        (
            "tepatch.hf.fresh",
            "tepatch.hf.model",
            "tepatch.hf.stand_ins",
            "tepatch.te.nvidia.engine",
            "tepatch.te.projections",
            "tepatch.te.nvidia.quantized",
        ),
    ),
    Borrowed(
        "torch",
        "_load_from_state_dict",
        "what load_state_dict asks each module to take: a part of a model takes tensors under the stock model's names",
        ("tepatch.te.projections",),
    ),
    Borrowed(
        "torch",
        "_buffers",
        "a module's own buffers: filled one by one, which ones are left on the meta device",
        ("tepatch.hf.fresh", "tepatch.hf.model"),
    ),
    Borrowed(
        "torch",
        "_modules",
        "a module's children: who stands in a projection's place now, asked before each fused computation",
        ("tepatch.te.projections",),
    ),
    Borrowed(
        "torch",
        "_non_persistent_buffers_set",
        "names of buffers that no checkpoint holds, and that are computed instead of read",
        ("tepatch.hf.model", "tepatch.hf.placement"),
    ),
    Borrowed(
        "torch",
        "_load_state_dict_pre_hooks",
        "the hooks before load_state_dict, by id and in order: names of projections come before the translation",
        ("tepatch.hf.stand_ins",),
    ),
    Borrowed(
        "torch",
        "_forward_hooks",
        "whether somebody listens to a projection, which then has to be called",
        ("tepatch.te.projections",),
    ),
    Borrowed("torch", "_forward_pre_hooks", "the same, for hooks before the call", ("tepatch.te.projections",)),
    Borrowed("torch", "_backward_hooks", "the same, for hooks of the backward pass", ("tepatch.te.projections",)),
    Borrowed(
        "torch", "_backward_pre_hooks", "the same, for hooks before the backward pass", ("tepatch.te.projections",)
    ),
    Borrowed(
        "torch",
        "hook",
        "is in the names under which a module keeps the hooks around it: attention that is pickled takes them along",
        ("tepatch.te.nvidia.engine",),
    ),
    Borrowed(
        "torch",
        "_apply",
        "what .to(), .cuda() and .half() go through: rotary buffers keep their dtype in it, quantized copies are freed",
        ("tepatch.te.layer", "tepatch.te.rope"),
    ),
    Borrowed(
        "torch",
        "_version",
        "counts the writes to a tensor: copies of weights, and what a mask was found to mean, hold until there is one",
        ("tepatch.te.nvidia.weight_cache", "tepatch.te.sequences"),
    ),
    Borrowed(
        "torch",
        "_cdata",
        "the identity of a storage: a parameter whose memory was exchanged has another",
        ("tepatch.te.nvidia.weight_cache",),
    ),
    Borrowed(
        "torch",
        "StorageWeakRef",
        "keeps the identity of a storage (as cdata) from being used again, without keeping its memory",
        ("tepatch.te.nvidia.weight_cache",),
    ),
    Borrowed(
        "torch",
        "register_optimizer_step_post_hook",
        "called after the step of every optimizer, also of one made before: fused ones write without a new version",
        ("tepatch.te.nvidia.weight_cache",),
    ),
    Borrowed(
        "torch",
        "torch.distributed._composable_state",
        "the module that is imported wherever fully_shard is, and knows the modules that it manages",
        ("tepatch.te.nvidia.weight_cache",),
    ),
    Borrowed(
        "torch",
        "_module_state_mapping",
        "the modules that fully_shard manages: while there are any, no quantized copies of weights are kept",
        ("tepatch.te.nvidia.weight_cache",),
    ),
    Borrowed(
        "torch",
        "_StridedShard",
        "how fully_shard places a dimension that is sharded already, known by the name of its class",
        ("tepatch.hf.sharding",),
    ),
    Borrowed(
        "torch",
        "_C.TensorBase",
        "holds the properties data and requires_grad, which the tensors of projections refine",
        ("tepatch.te.projections",),
    ),
    Borrowed(
        "torch",
        "_disabled_torch_function_impl",
        "makes operations of a subclass of Tensor give plain tensors",
        ("tepatch.te.projections",),
    ),
    Borrowed(
        "torch",
        "DisableTorchFunctionSubclass",
        "computes with the numbers of a subclass of Tensor that wants to know of every operation",
        ("tepatch.te.projections",),
    ),
    Borrowed(
        "torch",
        "qconfig",
        "what torch.ao's quantization sets at every module before it exchanges those of the classes that it knows",
        ("tepatch.te.projections",),
    ),
    Borrowed(
        "torch",
        "_orig_mod",
        "where torch.compile keeps the module that it wraps, and the part that it adds to names",
        ("tepatch.checkpoint.wrappers", "tepatch.hf.export"),
    ),
    Borrowed(
        "torch",
        "_fsdp_wrapped_module",
        "the part that FullyShardedDataParallel adds to the names of what it wraps",
        ("tepatch.checkpoint.wrappers", "tepatch.hf.named"),
    ),
    Borrowed(
        "torch",
        "_checkpoint_wrapped_module",
        "the part that torch's wrapper for activation checkpointing adds to names",
        ("tepatch.checkpoint.wrappers", "tepatch.hf.named"),
    ),
    Borrowed(
        "torch",
        "_extra_state",
        "ends the keys of extra state in a state dict: Transformer Engine's is a pickle, and no checkpoint gets it",
        ("tepatch.hf.model",),
    ),
    Borrowed(
        "torch",
        "assign_to_params_buffers",
        "tells a hook of load_state_dict whether it was called with assign=True",
        ("tepatch.hf.state",),
    ),
    Borrowed(
        "torch",
        "torch.nn.modules.module",
        "where the code of state_dict runs: above it in the stack is who asked for one",
        ("tepatch.hf.translate",),
    ),
    Borrowed(
        "torch",
        "torch.distributed.checkpoint.state_dict",
        "who looks up each name of a state dict in the model, and so gets the parameters' own names",
        ("tepatch.hf.translate",),
    ),
    Borrowed(
        "torch",
        "WeakTensorKeyDictionary",
        "remembers by the identity of a tensor, and forgets when it goes",
        ("tepatch.te.rope", "tepatch.te.sequences"),
    ),
    Borrowed(
        "torch",
        "cudaHostRegister",
        "pins memory of one's own, by the CUDA runtime that torch has loaded; and cudaHostUnregister",
        ("tepatch.transfer.memory",),
    ),
)

_TRANSFORMERS = (
    Borrowed(
        "transformers",
        "_attn_implementation",
        "names the attention and the masks of a model, in its config and those inside it, before it is built",
        ("tepatch.hf.attention", "tepatch.hf.model"),
    ),
    Borrowed(
        "transformers",
        "_model_mapping",
        "an auto class's table from config classes to model classes: asked for without building a model",
        ("tepatch.hf.config", "tepatch.proof", "tepatch.testing.cases"),
    ),
    Borrowed(
        "transformers",
        "_MAPPING_NAMES",
        "ends the names of modeling_auto's tables from model types to names of classes: a config that is read as "
        "another type gets the architectures of that type",
        ("tepatch.hf.config",),
    ),
    Borrowed(
        "transformers",
        "_init_weights",
        "a model's initialiser for one module: draws fresh weights, and computes the buffers that no checkpoint holds",
        ("tepatch.hf.fresh", "tepatch.hf.model"),
    ),
    Borrowed(
        "transformers",
        "_is_hf_initialized",
        "marks modules and tensors that the initialiser must leave alone",
        ("tepatch.hf.model", "tepatch.hf.stand_ins", "tepatch.te.projections", "tepatch.te.layer"),
    ),
    Borrowed(
        "transformers",
        "LayerNorm",
        "in the name of a class, makes the initialiser set its weight to ones: also the fused QKV of LayerNormLinear",
        ("tepatch.hf.model", "tepatch.te.layer"),
    ),
    Borrowed(
        "transformers",
        "RotaryEmbedding",
        "in the name of a class, makes the initialiser compute its frequencies; and of what such a module is called "
        "with, only the device and the dtype count, so that it can be made to answer in float32",
        ("tepatch.te.rope",),
    ),
    Borrowed(
        "transformers",
        "attention_scaling",
        "the factor on a rotary module's cos and sin, by type of layer where there are several: only without one are "
        "their angles known, which the fused kernel takes",
        ("tepatch.te.rope",),
    ),
    Borrowed(
        "transformers",
        "_keep_in_fp32_modules",
        "modules that stay in float32 in a model that is loaded in float16",
        ("tepatch.hf.model",),
    ),
    Borrowed(
        "transformers",
        "_keep_in_fp32_modules_strict",
        "modules that stay in float32 whatever a model is loaded in",
        ("tepatch.hf.model",),
    ),
    Borrowed(
        "transformers",
        "_can_record_outputs",
        "what a base model records of its modules: tells base models, and the classes of routers",
        ("tepatch.hf.model", "tepatch.testing.parity"),
    ),
    Borrowed(
        "transformers",
        "target_class",
        "the class of module that such a record is about, where more is said than the class",
        ("tepatch.testing.parity",),
    ),
    Borrowed(
        "transformers",
        "_no_split_modules",
        "names of the classes that stay on one device: a model's layers",
        ("tepatch.hf.placement", "tepatch.hf.current_gpu"),
    ),
    Borrowed(
        "transformers",
        "_skip_keys_device_placement",
        "arguments that accelerate's hooks must not move: the cache",
        ("tepatch.hf.placement",),
    ),
    Borrowed(
        "transformers",
        "_gradient_checkpointing_func",
        "the function that a layer is checkpointed by, set on it and read when it is called: quantized layers give "
        "Transformer Engine's instead",
        ("tepatch.te.layer",),
    ),
    Borrowed(
        "transformers",
        "_from_model_config",
        "makes GenerationConfig.from_pretrained take generation settings out of a model's config.json",
        ("tepatch.hf.model",),
    ),
    Borrowed(
        "transformers",
        "_hf_peft_config_loaded",
        "set by add_adapter: then save_pretrained saves adapters only, and nothing is to be translated",
        ("tepatch.hf.save_pretrained",),
    ),
    Borrowed(
        "transformers",
        "_weight_conversions",
        "what of a checkpoint's names from_pretrained has changed: save_pretrained turns it round",
        ("tepatch.hf.names", "tepatch.hf.save_pretrained"),
    ),
    Borrowed(
        "transformers",
        "_name_or_path",
        "where a config was read from, which its to_dict() tells too: no number of the model depends on it",
        ("tepatch.certification.proof", "tepatch.proof"),
    ),
    Borrowed(
        "transformers",
        "layernorm",
        "in the name of a parameter, makes the Trainer give it no weight decay",
        ("tepatch.te.attention", "tepatch.te.nvidia.engine"),
    ),
    Borrowed(
        "transformers",
        "is_causal",
        "False in a config or an attention module: attention goes both ways",
        ("tepatch.hf.attention",),
    ),
    Borrowed(
        "transformers",
        "q_offset",
        "one of the keywords that a mask interface is called with (batch_size, q_length, kv_length, q_offset, "
        "kv_offset, mask_function, attention_mask, device)",
        ("tepatch.hf.attention",),
    ),
    Borrowed(
        "transformers",
        "allow_is_causal_skip",
        "False makes sdpa_mask build the mask that it would leave to SDPA; under another name it would be swallowed",
        ("tepatch.hf.attention",),
    ),
    Borrowed(
        "transformers",
        "allow_is_bidirectional_skip",
        "the same, for attention both ways",
        ("tepatch.hf.attention",),
    ),
    Borrowed(
        "transformers",
        "sdpa_attention_forward",
        "the attention of modules that are not replaced, told whether it is causal by the keyword is_causal",
        ("tepatch.hf.attention",),
    ),
    Borrowed(
        "transformers",
        "_supports_sdpa",
        "whether a model's class has SDPA: attention modules of one that has not compute eagerly",
        ("tepatch.hf.attention",),
    ),
    Borrowed(
        "transformers",
        "eager_attention_forward",
        "the function of that name in the file of a module, which computes its attention eagerly",
        ("tepatch.hf.attention",),
    ),
    Borrowed(
        "transformers",
        "s_aux",
        "the keyword by which attention is given its sinks, which SDPA has not",
        ("tepatch.hf.attention",),
    ),
    Borrowed(
        "transformers",
        "sinks",
        "the parameter of an attention module that these are: the eager function reads them from there",
        ("tepatch.hf.attention",),
    ),
    Borrowed(
        "transformers",
        "transformers.masking_utils",
        "the module of Hugging Face's mask rules: a function of another module is nobody's known rule",
        ("tepatch.hf.attention",),
    ),
    Borrowed(
        "transformers", "causal_mask_function", "the rule of causal attention, by name", ("tepatch.hf.attention",)
    ),
    Borrowed(
        "transformers",
        "bidirectional_mask_function",
        "the rule of attention both ways, by name",
        ("tepatch.hf.attention",),
    ),
    Borrowed(
        "transformers",
        "sliding_window_overlay.<locals>.inner_mask",
        "the rule of a window, by name: which window is for the layer to know",
        ("tepatch.hf.attention",),
    ),
    Borrowed(
        "transformers",
        "and_masks.<locals>.and_mask",
        "the intersection of rules, by name",
        ("tepatch.hf.attention",),
    ),
    Borrowed("transformers", "mask_functions", "the variable in which it holds the rules", ("tepatch.hf.attention",)),
    Borrowed(
        "transformers",
        "packed_sequence_mask_function.<locals>.inner_mask",
        "the rule of packed sequences, by name",
        ("tepatch.hf.attention",),
    ),
    Borrowed(
        "transformers",
        "packed_sequence_mask",
        "the variable in which it holds the number of each token's sequence",
        ("tepatch.hf.attention",),
    ),
    Borrowed(
        "transformers",
        "remap_positions_for_packed_sequence.<locals>.inner_mask",
        "a rule by positions instead of places, by name: around the others in packed batches, since 5.23",
        ("tepatch.hf.attention",),
    ),
    Borrowed(
        "transformers",
        "mask_function",
        "the variable in which it holds the rule inside, since 5.23; and a keyword of mask interfaces",
        ("tepatch.hf.attention",),
    ),
    Borrowed(
        "transformers",
        "is_compileable",
        "true for a cache of a fixed size, which has slots that nobody has written yet",
        ("tepatch.te.attention",),
    ),
    Borrowed(
        "transformers",
        "offloading",
        "whether a cache brings the next layer's keys from the CPU",
        ("tepatch.te.attention",),
    ),
    Borrowed(
        "transformers",
        "prefetch_stream",
        "the stream on which it does, which must not run ahead of what is computed",
        ("tepatch.te.attention",),
    ),
    Borrowed(
        "transformers",
        "update",
        "stores keys and values [batch, heads, tokens, head_dim] in a cache by position, and gives all that it holds",
        ("tepatch.te.attention",),
    ),
    Borrowed(
        "transformers",
        "get_model_conversion_mapping",
        "what transformers makes of a checkpoint's names and tensors when it loads a model",
        ("tepatch.hf.names",),
    ),
    Borrowed(
        "transformers",
        "WeightRenaming",
        "the conversions among them that only rename",
        ("tepatch.hf.names",),
    ),
    Borrowed(
        "transformers",
        "rename_source_key",
        "applies them to one name, and gives the new one first",
        ("tepatch.hf.names",),
    ),
    Borrowed(
        "transformers",
        "MixtralTopKRouter",
        "gives logits, weights and numbers of experts, in this order, by token",
        ("tepatch_mixtral.layer",),
    ),
    Borrowed("transformers", "Qwen3MoeTopKRouter", "the same", ("tepatch_qwen.moe",)),
    Borrowed(
        "transformers",
        "past_key_values",
        "the keyword by which models give the cache to every layer, until 5.23; since then it is cache",
        ("tepatch.te.attention", "tepatch.te.decoder"),
    ),
    Borrowed(
        "transformers",
        "position_embeddings",
        "the keyword by which models give cos and sin, a pair of tensors, to every layer",
        ("tepatch.hf.current_gpu", "tepatch.te.decoder"),
    ),
)

_ACCELERATE = (
    Borrowed(
        "accelerate",
        "_hf_hook",
        "where accelerate keeps the hook of a module, which knows the weights that are away",
        ("tepatch.hf.offloaded",),
    ),
    Borrowed("accelerate", "hooks", "the hooks in a sequence of some", ("tepatch.hf.offloaded",)),
    Borrowed(
        "accelerate",
        "accelerate.utils.transformer_engine",
        "exchanges the linear layers that named_children gives for copies, also beside Transformer Engine's layers",
        ("tepatch.te.projections",),
    ),
    Borrowed(
        "accelerate",
        "accelerate.utils.modeling.load_checkpoint_in_model",
        "asks for a state dict, and then fills what its names lead to, if it has a variable device_map",
        ("tepatch.hf.translate",),
    ),
    Borrowed(
        "accelerate",
        "weights_map",
        "from which a hook takes the parameters of its module, by their names there",
        ("tepatch.hf.offloaded",),
    ),
    Borrowed("accelerate", "offload", "whether it takes them from there at all", ("tepatch.hf.offloaded",)),
    Borrowed("accelerate", "execution_device", "where it brings them", ("tepatch.hf.current_gpu",)),
    Borrowed(
        "accelerate",
        "prefix",
        "what a map of one module's weights puts before a name, to look it up in the map of all",
        ("tepatch.hf.offloaded",),
    ),
    Borrowed("accelerate", "dataset", "the map of all", ("tepatch.hf.offloaded",)),
    Borrowed(
        "accelerate",
        "all_keys",
        "the names in it, without reading a tensor from the disk",
        ("tepatch.hf.offloaded",),
    ),
    Borrowed(
        "accelerate",
        "index.json",
        "the file of an offload folder that says dtypes and shapes; where it is, nothing is written again",
        ("tepatch.hf.placement",),
    ),
    Borrowed("accelerate", ".dat", "ends the name of a parameter's file in that folder", ("tepatch.hf.placement",)),
    Borrowed(
        "accelerate",
        "accelerate.big_modeling",
        "who takes a model's weights away by the names of a state dict, which have to be the parameters' own",
        ("tepatch.hf.translate",),
    ),
    Borrowed(
        "accelerate",
        "accelerate.utils.fsdp_utils",
        "who shards a model, and looks up the names of its state dict in it",
        ("tepatch.hf.translate",),
    ),
    Borrowed(
        "accelerate",
        "accelerate.utils.modeling.check_device_map",
        "who looks for the names of a state dict in a device map",
        ("tepatch.hf.translate",),
    ),
)

_PEFT = (
    Borrowed(
        "peft",
        "base_model.model",
        "where a model with adapters keeps the model that it was made of",
        ("tepatch.hf.export",),
    ),
    Borrowed(
        "peft",
        "base_layer",
        "an adapter calls what it stands for with the very tensor that it was called with: by that a projection knows "
        "that the fused product is meant",
        ("tepatch.hf.stand_ins",),
    ),
    Borrowed(
        "peft",
        "weight.data",
        "how adapters are merged: taken, added to and set again, which a projection has to see",
        ("tepatch.te.projections",),
    ),
)

_ENGINE = (
    Borrowed(
        "transformer_engine",
        "transformer_engine.pytorch.quantization",
        "the module with the state of quantization, looked for without importing it",
        ("tepatch.te.layer", "tepatch.te.nvidia.precision"),
    ),
    Borrowed(
        "transformer_engine",
        "FP8GlobalStateManager",
        "the state of quantization of this process",
        ("tepatch.te.layer", "tepatch.te.nvidia.precision"),
    ),
    Borrowed(
        "transformer_engine",
        "is_fp8_enabled",
        "whether an autocast is in force: layers enter none of their own then",
        ("tepatch.te.nvidia.precision",),
    ),
    Borrowed("transformer_engine", "get_fp8_recipe", "the recipe of it", ("tepatch.te.nvidia.precision",)),
    Borrowed(
        "transformer_engine",
        "get_buffer_info",
        "the key under which a module notes that its scales are among those to be updated: a copy must not have it",
        ("tepatch.te.layer",),
    ),
    Borrowed(
        "transformer_engine",
        "global_fp8_buffer_pos_fwd_recompute",
        "the key of the same note for checkpointed modules",
        ("tepatch.te.layer",),
    ),
    Borrowed(
        "transformer_engine",
        "fp8_meta",
        "the notes of a module that computes products: tells such modules, and holds the state of its recipe",
        ("tepatch.te.nvidia.weight_cache", "tepatch.te.layer", "tepatch.te.nvidia.quantized"),
    ),
    Borrowed(
        "transformer_engine",
        "quantizers",
        "a module's quantizers by direction: exchanged when its recipe is, and made anew for a copy",
        ("tepatch.te.nvidia.weight_cache", "tepatch.te.layer", "tepatch.te.nvidia.quantized"),
    ),
    Borrowed(
        "transformer_engine",
        "scaling_fwd",
        "the key of the forward pass in both of them",
        ("tepatch.te.nvidia.weight_cache", "tepatch.te.nvidia.quantized"),
    ),
    Borrowed(
        "transformer_engine",
        "scale",
        "the scales of delayed scaling, in a state and in a quantizer that shares its memory",
        ("tepatch.te.nvidia.weight_cache", "tepatch.te.nvidia.quantized"),
    ),
    Borrowed(
        "transformer_engine",
        "amax_history",
        "tells the state of delayed scaling from others, which have no memory in common with quantizers",
        ("tepatch.te.layer",),
    ),
    Borrowed(
        "transformer_engine",
        "make_quantizers",
        "makes quantizers over the memory of such a state",
        ("tepatch.te.layer",),
    ),
    Borrowed(
        "transformer_engine",
        "_fp8_workspaces",
        "the quantized weights that a module keeps by its names for them: ours while weights are frozen",
        ("tepatch.te.nvidia.weight_cache",),
    ),
    Borrowed(
        "transformer_engine",
        "get_metadata",
        "the tensors that a quantized one consists of, to count its bytes",
        ("tepatch.te.nvidia.weight_cache",),
    ),
    Borrowed(
        "transformer_engine",
        "param_init_meta",
        "what a module notes of each parameter when it registers it",
        ("tepatch.te.nvidia.quantized",),
    ),
    Borrowed(
        "transformer_engine",
        "fp8_meta_index",
        "the number of a parameter's quantizer; None for one that is never quantized",
        ("tepatch.te.nvidia.quantized",),
    ),
    Borrowed(
        "transformer_engine",
        "init_fp8_metadata",
        "makes a module's quantizers for the recipe of quantized_model_init",
        ("tepatch.te.nvidia.quantized",),
    ),
    Borrowed(
        "transformer_engine",
        "primary_weights_in_fp8",
        "whether a module's weights are held quantized only",
        ("tepatch.te.nvidia.engine", "tepatch.te.nvidia.quantized"),
    ),
    Borrowed(
        "transformer_engine",
        "set_usage",
        "whether a quantizer makes the transposed weight too, which a backward pass multiplies by",
        ("tepatch.te.nvidia.quantized",),
    ),
    Borrowed(
        "transformer_engine",
        "internal",
        "False makes a quantizer give a tensor, and not only its storage",
        ("tepatch.te.nvidia.quantized",),
    ),
    Borrowed(
        "transformer_engine",
        "max_fwd",
        "the largest number of a recipe's format, from which the first scale of a weight follows",
        ("tepatch.te.nvidia.quantized",),
    ),
    Borrowed(
        "transformer_engine",
        "_high_precision_init_val",
        "where Transformer Engine puts the numbers that a weight was quantized from",
        ("tepatch.te.nvidia.quantized",),
    ),
    Borrowed(
        "transformer_engine",
        "init_fn",
        "the keyword by which a parameter is registered with its initialiser: those that are local functions, which "
        "pickle can not name, are exchanged",
        ("tepatch.te.nvidia.engine",),
    ),
    Borrowed(
        "transformer_engine",
        "layer_norm_weight",
        "the name of a fused norm's weight (and layer_norm_bias), by which it is registered and read",
        ("tepatch.te.nvidia.engine",),
    ),
    Borrowed(
        "transformer_engine",
        '"meta"',
        "the string, and not the device, by which parameters are left without values",
        ("tepatch.te.nvidia.engine",),
    ),
    Borrowed(
        "transformer_engine",
        "return_layernorm_output",
        "asked at each call: set for a call whose normed input is needed",
        ("tepatch.te.nvidia.engine", "tepatch.te.projections"),
    ),
    Borrowed("transformer_engine", "zero_centered_gamma", "whether a norm is of 1 + w", ("tepatch.te.nvidia.engine",)),
    Borrowed("transformer_engine", "normalization", "which norm a fused module has", ("tepatch.te.nvidia.engine",)),
    Borrowed("transformer_engine", "eps", "the epsilon of its norm", ("tepatch.te.nvidia.engine",)),
    Borrowed("transformer_engine", "use_bias", "whether its products have biases", ("tepatch.te.nvidia.engine",)),
    Borrowed("transformer_engine", "activation", "which activation an MLP has", ("tepatch.te.nvidia.engine",)),
    Borrowed(
        "transformer_engine",
        "qkv_format",
        "how an attention module takes its tensors",
        ("tepatch.te.nvidia.engine",),
    ),
    Borrowed(
        "transformer_engine",
        "softcap",
        "the cap on its scores, since 2.20: one that has any does not go to torch's attention",
        ("tepatch.te.nvidia.engine",),
    ),
    Borrowed("transformer_engine", "softmax_type", "its kind of softmax: the same", ("tepatch.te.nvidia.engine",)),
    Borrowed(
        "transformer_engine",
        "weight{index}",
        "the parameters of GroupedLinear, which are slices of the experts' matrices during a call",
        ("tepatch.te.nvidia.engine",),
    ),
    Borrowed(
        "transformer_engine",
        "transformer_engine_torch",
        "the kernels: activations by their names, and their derivatives with a d before it",
        ("tepatch.te.nvidia.engine",),
    ),
    Borrowed(
        "transformer_engine",
        "transformer_engine.pytorch.attention.rope",
        "where apply_rotary_pos_emb is, which turns by float32 angles [tokens, 1, 1, n]",
        ("tepatch.te.nvidia.engine",),
    ),
    Borrowed(
        "transformer_engine",
        "mxfp8",
        "a recipe's own word for its kind, from which follows what sizes have to be multiples of",
        ("tepatch.te.nvidia.alignment",),
    ),
    Borrowed("transformer_engine", "nvfp4", "the same", ("tepatch.te.nvidia.alignment",)),
    Borrowed("transformer_engine", "custom", "the same", ("tepatch.te.nvidia.alignment",)),
    Borrowed(
        "transformer_engine",
        "Recipe",
        "the class that all recipes derive from: what else is passed as a precision is none",
        ("tepatch.te.nvidia.precision",),
    ),
)

_PYTHON = (
    Borrowed(
        "sys",
        "_getframe",
        "the caller's frame: nothing else tells who asks for a state dict to look its names up in the model, walks "
        "down by children to exchange layers, or asks for modules to export them",
        ("tepatch.hf.translate", "tepatch.te.projections", "tepatch.te.tracing"),
    ),
)

BORROWED: tuple[Borrowed, ...] = (*_TORCH, *_TRANSFORMERS, *_ACCELERATE, *_PEFT, *_ENGINE, *_PYTHON)
"""All of them, by library."""
