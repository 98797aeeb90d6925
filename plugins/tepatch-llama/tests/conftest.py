"""Three models with the same weights, and the measure by which a patched model is compared with Hugging Face's.

Whether a difference is a mistake or rounding is settled before ours is looked at: the error of Hugging Face's own
model, in the precision that ours runs in, against Hugging Face's in a wider one. On a CPU that is float32 against
float64, and ours may have 4 times that error: both are sums in float32, in another order. On a GPU it is bfloat16
against float32, and ours may have 1.05 times that error.

An error is ``||x - reference|| / ||reference||`` over whatever a comparison is about. It is printed (``-s`` shows it).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tepatch
from tepatch.transfer.fill import restore_tensors

SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    },
    # Large enough that the errors of bfloat16 average out.
    "gpu": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    },
}
COMMON = {"max_position_embeddings": 2048, "pad_token_id": 0, "eos_token_id": None, "tie_word_embeddings": False}


@dataclass(frozen=True, kw_only=True)
class Trio:
    """One checkpoint three times: what is right, what Hugging Face makes of it, and what we make of it."""

    truth: Any
    """Hugging Face's model in the wider precision."""
    theirs: Any
    """Hugging Face's model in the precision of ours."""
    ours: Any
    limit: float
    """How many times their error ours may be."""
    folder: Path
    device: str

    @property
    def length(self) -> int:
        """How many tokens a row of a batch has."""
        return 24 if self.device == "cpu" else 192

    @property
    def all(self) -> tuple[Any, Any, Any]:
        return self.truth, self.theirs, self.ours

    def tokens(self, batch: int = 4, length: int = 0, *, seed: int = 1) -> Tensor:
        """Random tokens, none of them the padding token: int64 [batch, length]."""
        generator = torch.Generator().manual_seed(seed)
        size = (batch, length or self.length)
        return torch.randint(1, self.ours.config.vocab_size, size, generator=generator).to(self.device)

    def judge(self, compute: Callable[[Any], Tensor], what: str) -> None:
        """Fail if what ``compute`` gives for our model is further from the truth than it may be."""
        self.judge_values(*(compute(model) for model in self.all), what)

    def judge_values(self, truth: Tensor, theirs: Tensor, ours: Tensor, what: str) -> None:
        """Fail if ``ours`` is further from ``truth`` than it may be."""
        assert ours.shape == theirs.shape == truth.shape
        assert ours.numel()
        found, usual = distance(ours, truth), distance(theirs, truth)
        print(f"\n{what}: {found:.2e} (Hugging Face {usual:.2e})")
        assert found <= self.limit * usual, f"{what}: {found:.2e}, but Hugging Face's own error is {usual:.2e}"

    @staticmethod
    def gradients(model: Any) -> dict[str, Tensor]:
        """The gradients of a stock or patched model under Hugging Face's names."""
        own = {name: parameter.grad for name, parameter in model.named_parameters()}
        return dict(restore_tensors(model.tepatch.plan, own)) if hasattr(model, "tepatch") else own

    @staticmethod
    def flat(tensors: dict[str, Tensor]) -> Tensor:
        """Tensors as one vector, in the order of their names: float64 [n]."""
        return torch.cat([tensors[name].detach().double().flatten() for name in sorted(tensors)])


def distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def make_trio(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Trio]]:
    """Makes a ``Trio`` on a CPU (reference modules, float32) or a GPU (Transformer Engine, bfloat16).

    ``make_trio(dtype=None, **config)``; ``dtype`` is the precision of ours and theirs.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    place = request.param
    device, wide, narrow, limit = {
        "cpu": ("cpu", torch.float64, torch.float32, 4.0),
        "gpu": ("cuda", torch.float32, torch.bfloat16, 1.05),
    }[place]
    written: dict[str, Path] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are so small that a second thread only waits for the first

    def write(config: dict[str, Any]) -> Path:
        """A checkpoint with random weights in which no two tensors are alike, norms and biases too."""
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES[place], **COMMON, **config}))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() == 1:
                    parameter.copy_(noise * 0.1 + (0 if name.endswith("bias") else 1))
                else:
                    parameter.copy_(noise * 0.8 / model.config.hidden_size**0.5)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(narrow)  # .to(dtype) of the model would round the rotary frequencies
        model.config.dtype = narrow
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        return folder

    def make(*, dtype: torch.dtype | None = None, **config: Any) -> Trio:
        folder = written.get(repr(config)) or written.setdefault(repr(config), write(config))

        def stock(precision: torch.dtype) -> Any:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=narrow).to(device).eval()
            assert model.config._attn_implementation == "sdpa"
            assert model.model.rotary_emb.inv_freq.dtype == torch.float32
            return model if precision == narrow else model.to(precision)

        backend = "reference" if place == "cpu" else "te"
        return Trio(
            truth=stock(wide),
            theirs=stock(dtype or narrow),
            ours=tepatch.load("llama", folder, backend=backend, dtype=dtype or narrow),
            limit=limit,
            folder=folder,
            device=device,
        )

    yield make
    torch.set_num_threads(threads)
    if place == "gpu":
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def trio(make_trio: Callable[..., Trio]) -> Trio:
    """The models of most comparisons; whoever changes one makes its own with ``make_trio``."""
    return make_trio()
