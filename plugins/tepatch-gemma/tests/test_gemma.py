"""What the conformance kit does not look at: pictures in a Gemma 3, and Gemma 2's cache on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import assert_close, forward_terms
from safetensors.torch import load_file
from torch import Tensor
from transformers import Gemma2Config, Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, LlamaModel

import tepatch
from tepatch.testing import small_sizes
from tepatch.testing.cases import cache_name

CACHE = str(cache_name(LlamaModel.forward))
"""What models call their cache in this version of transformers."""

TEXT = small_sizes(
    head_dim=32, sliding_window=8, layer_types=["sliding_attention", "sliding_attention", "full_attention"]
)
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURE = 100
"""The token in whose place a part of a picture goes."""


def largest(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


@torch.no_grad()
def randomise(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        size = 0.1 if parameter.dim() < 2 else 0.8 / parameter.shape[-1] ** 0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def test_the_tokens_of_a_picture_see_each_other(tmp_path: Path) -> None:
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**TEXT).to_dict(),
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4, **VISION},
        mm_tokens_per_image=4,
        image_token_index=PICTURE,
    )
    stock = Gemma3ForConditionalGeneration(config).eval()
    randomise(stock)
    stock.save_pretrained(tmp_path / "stock")
    model = tepatch.load("auto", tmp_path / "stock", backend="reference", dtype=torch.float32, progress=False)

    ids = torch.randint(3, PICTURE, (2, 20), generator=torch.Generator().manual_seed(1))
    ids[:, 5:9] = PICTURE
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    picture = {
        "pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)),
        "token_type_ids": (ids == PICTURE).long(),
        "attention_mask": mask,
    }
    with torch.no_grad():
        expected, found = (each(ids, **picture).logits[mask.bool()] for each in (stock, model))
        causal = stock(ids, **{**picture, "token_type_ids": torch.zeros_like(ids)}).logits[mask.bool()]
    assert largest(causal, expected) > 1e-2  # it makes a difference
    # Through the picture's layer, for 16 patches, and through the text's; two norms more in each of Gemma 3's.
    text, vision = config.text_config, config.vision_config
    norms = 4 * text.num_hidden_layers * text.hidden_size
    assert_close(found, expected, terms=forward_terms(vision, 16) + forward_terms(text, 20) + norms)
    texts = [each.generate(ids, **picture, max_new_tokens=12, do_sample=False) for each in (stock, model)]
    assert torch.equal(*texts)

    model.save_pretrained(tmp_path / "back")
    Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "stock").save_pretrained(tmp_path / "again")
    names = [load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("back", "again")]
    assert names[0] == names[1]
    back = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in stock.state_dict().items())


@pytest.mark.parametrize("backend", ["reference", pytest.param("te", marks=pytest.mark.gpu)])
def test_capped_scores_of_a_padded_prompt_are_the_same_with_a_cache(backend: Any) -> None:
    # No kernel is fused here: Transformer Engine masks by itself, and fewer queries than keys are a case of their own.
    dtype = torch.float32 if backend == "reference" else torch.bfloat16
    config = Gemma2Config(**TEXT, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
    model: Any = tepatch.build("gemma2", config, backend=backend, dtype=dtype).eval()
    randomise(model)
    ids = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(1)).to(model.device)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[:, -3:]
        cache, parts, start = None, [], 0
        for stop in (13, 17, 18, 19, 20):
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, **{CACHE: cache})
            cache, start = out[CACHE], stop
            parts.append(out.logits)
    found = torch.cat(parts, dim=1)[:, -3:]
    if backend == "reference":
        norms = 4 * config.num_hidden_layers * config.hidden_size  # two more in each layer
        assert_close(found, expected, terms=forward_terms(config, 20) + norms)
    else:
        assert largest(found, expected) <= 0.05
