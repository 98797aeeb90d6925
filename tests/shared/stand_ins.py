"""Stand-ins for releases of transformers to come: copies in which one thing is called or done otherwise.

    python tests/stand_ins.py CHECKPOINT FOLDER     # prints a line of JSON for each change

A copy is a folder of links, but for the files that are changed. Each is imported by a process of its own, forked when
torch has been imported. It loads the checkpoint (a tiny Llama) with tepatch and with plain transformers, and compares
what they write: without a proof (``unproven``), and as a user does (``proven``). Either is "equal", "different", or
"error: " and what was raised.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import warnings
from pathlib import Path

Edit = tuple[str, str, str, str]
"""A file ("": all), a place in it, and from there on the first text that is replaced, and by what ("": each one)."""

LLAMA, CACHES, MASKS = "models/llama/modeling_llama.py", "cache_utils.py", "masking_utils.py"
LAYER, MODEL, RENAMED = "class LlamaDecoderLayer", "class LlamaModel", "    @deprecate_kwarg"
SDPA, CALL, CALL_OF_WINDOWS = "def sdpa_mask", "def create_causal_mask", "def create_sliding_window_causal_mask"
UPDATE = "class Cache:"
DROP = "    def kept_as_it_was(function):\n        return function\n\n    @kept_as_it_was\n    #"
HIDE = (
    "    def hidden(function):\n        return lambda self, *args, **kwargs: function(self, *args, **kwargs)\n\n"
    "    @hidden\n    #"
)

CHANGES: dict[str, list[Edit]] = {
    "nothing": [],
    "a layer's cache has another name": [
        (LLAMA, LAYER, RENAMED, DROP),
        (LLAMA, LAYER, "cache: Cache", "states: Cache"),
        (LLAMA, LAYER, "cache=cache", "cache=states"),
        (LLAMA, "decoder_layer(", "cache=cache", "states=cache"),
    ],
    "a layer's angles have another name": [
        (LLAMA, LAYER, "position_embeddings: tuple", "rotary: tuple"),
        (LLAMA, LAYER, "position_embeddings=position_embeddings", "position_embeddings=rotary"),
        (LLAMA, "decoder_layer(", "position_embeddings=position_embeddings", "rotary=position_embeddings"),
    ],
    "a layer takes something new": [
        (LLAMA, LAYER, "use_cache: bool | None = False,", "use_cache: bool | None = False, strength: float = 1.0,"),
        (LLAMA, LAYER, "residual + hidden_states", "residual + strength * hidden_states"),
        (LLAMA, "decoder_layer(", "cache=cache", "strength=0.5, cache=cache"),
    ],
    "a layer is given something new by keyword": [
        (LLAMA, LAYER, "residual + hidden_states", 'residual + kwargs.get("strength", 1.0) * hidden_states'),
        (LLAMA, "decoder_layer(", "cache=cache", "strength=0.5, cache=cache"),
    ],
    "a layer's number has another name": [
        (LLAMA, LAYER, "layer_idx: int):", "number: int):\n        layer_idx = number"),
        (LLAMA, MODEL, "LlamaDecoderLayer(config, layer_idx)", "LlamaDecoderLayer(config, number=layer_idx)"),
    ],
    "a layer gives a tuple": [
        (LLAMA, LAYER, "return hidden_states", "return (hidden_states,)"),
        (LLAMA, MODEL, "hidden_states = decoder_layer(", "(hidden_states,) = decoder_layer("),
    ],
    "a decorator hides what a layer takes": [(LLAMA, LAYER, RENAMED, HIDE)],
    "the rotary module's positions have another name": [
        (LLAMA, "class LlamaRotary", "(self, x, position_ids):", "(self, x, places):\n        position_ids = places"),
        (LLAMA, MODEL, "position_ids=position_ids)", "places=position_ids)"),
    ],
    "a cache's method has another name": [
        (
            CACHES,
            UPDATE,
            "    def update(",
            "    def append(self, *args, **kwargs):\n        return self._update(*args, **kwargs)\n\n    def _update(",
        ),
        (LLAMA, "class LlamaAttention", "cache.update(", "cache.append("),
    ],
    "a cache takes values before keys": [
        (CACHES, UPDATE, "key_states: torch.Tensor, value_states:", "value_states: torch.Tensor, key_states:"),
        (
            LLAMA,
            "class LlamaAttention",
            "cache.update(key_states, value_states",
            "cache.update(value_states, key_states",
        ),
    ],
    "whether a cache has a fixed size has another name": [("", "", "is_compileable", "has_fixed_size")],
    "a mask's rule is given by another name": [
        (MASKS, SDPA, "mask_function: Callable", "rule: Callable"),
        (MASKS, SDPA, "    # Potentially pad", "    mask_function = rule\n    # Potentially pad"),
        (MASKS, CALL, "mask_function=mask_factory_function", "rule=mask_factory_function"),
    ],
    "padding is given to masks by another name": [
        (MASKS, SDPA, "attention_mask: torch", "padding: torch"),
        (MASKS, SDPA, "    # Potentially pad", "    attention_mask = padding\n    # Potentially pad"),
        (MASKS, CALL, "        attention_mask=attention_mask,\n", "        padding=attention_mask,\n"),
    ],
    "a rule's closure has another variable": [
        (MASKS, "def and_masks", "for mask in mask_functions", "for mask in rules"),
        (MASKS, "def and_masks", "    def and_mask(", "    rules = mask_functions\n\n    def and_mask("),
    ],
    "a rule has another name": [("", "", "causal_mask_function", "look_back_function")],
    "causal attention looks less far": [
        (MASKS, "def causal_mask_function", "return kv_idx <= q_idx", "return (kv_idx <= q_idx) & (kv_idx > q_idx - 3)")
    ],
    "outputs have another field": [
        (LLAMA, "return CausalLMOutputWithPast(", "logits=logits", "scores=logits"),
        ("modeling_outputs.py", "class CausalLMOutputWithPast", "logits: torch", "scores: torch"),
        ("generation/utils.py", "", "outputs.logits", "outputs.scores"),
    ],
    "a decorator has another name": [("", "", "deprecate_kwarg", "renamed_kwarg")],
}


def make(name: str, folder: Path) -> Path:
    """A copy of the installed transformers with the change of this name; gives the folder to import it from."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    source, target = Path(spec.origin).parent, folder / "transformers"
    texts: dict[str, str] = {}
    for file, place, before, after in CHANGES[name]:
        for path in [source / file] if file else source.rglob("*.py"):
            key = str(path.relative_to(source))
            text = texts.get(key) or path.read_text(encoding="utf-8")
            if not place and before in text:
                texts[key] = text.replace(before, after)
            elif place:
                start = text.index(
                    before, text.index(place)
                )  # a ValueError: the release is not the one that is changed
                texts[key] = text[:start] + after + text[start + len(before) :]
    link(source, target, {Path(path).parts for path in texts})
    for key, text in texts.items():
        (target / key).write_text(text, encoding="utf-8")
    return folder


def link(source: Path, target: Path, changed: set[tuple[str, ...]]) -> None:
    """A folder of links to what is in ``source``, but for paths that are changed."""
    target.mkdir(parents=True)
    for entry in source.iterdir():
        inside = {parts[1:] for parts in changed if parts[0] == entry.name}
        if entry.name == "__pycache__" or () in inside:
            continue
        if inside:
            link(entry, target / entry.name, inside)
        else:
            (target / entry.name).symlink_to(entry)


def compare(checkpoint: str, *, prove: bool | None) -> str:
    import torch
    from transformers import LlamaForCausalLM

    import tepatch

    ids = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    try:
        stock = LlamaForCausalLM.from_pretrained(checkpoint)
        ours = tepatch.load("llama", checkpoint, backend="reference", prove=prove, progress=False)
        texts = []
        for model in (stock, ours):
            text = []
            for more in ({}, {"attention_mask": mask}, {"cache_implementation": "static", "disable_compile": True}):
                text.append(model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, **more))
            texts.append(torch.cat(text))
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"
    return "equal" if torch.equal(*texts) else "different"


def main() -> None:
    checkpoint, folder = sys.argv[1], Path(sys.argv[2])
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ.pop("TEPATCH_PROVE", None)
    import torch

    torch.set_num_threads(1)
    for index, name in enumerate(CHANGES):
        read, write = os.pipe()
        if os.fork() == 0:
            os.close(read)
            sys.path.insert(0, str(make(name, folder / str(index))))
            warnings.simplefilter("ignore")
            found = {"unproven": "", "proven": ""}
            try:
                found = {"unproven": compare(checkpoint, prove=False), "proven": compare(checkpoint, prove=None)}
            except BaseException as error:  # such as an import
                found = dict.fromkeys(found, f"error: {type(error).__name__}: {error}")
            os.write(write, json.dumps({"change": name, **found}).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as answer:
            print(answer.read(), flush=True)
        os.wait()


if __name__ == "__main__":
    main()
