"""Is the patched model the model that it claims to be? Logits compared with Hugging Face's, beside its own error.

The reference is Hugging Face's model in float32 with the very weights that the patched model holds (rounded to
its dtype first), so that what is measured is arithmetic. Low precision has errors of its own: Hugging Face's
bfloat16 is measured against the same reference, and is the yardstick.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from tepatch.checkpoint import open_checkpoint
from tepatch.errors import CheckpointError, PlanError, Problem
from tepatch.hf.config import AutoClass, read_config
from tepatch.hf.prepare import AUTO
from tepatch.loading import load
from tepatch.patch import Patch
from tepatch.report import Report
from tepatch.te import BackendName
from tepatch.transfer.reader import on_cpu_by_default

CHUNK = 512
"""Tokens compared at a time: bounds the float64 temporaries."""
FULL_PRECISION_BOUND = 1e-4
"""Largest error of a float32 model, over the largest logit."""
TF32_BOUND = 5e-3
"""The same with Transformer Engine, which multiplies float32 matrices in TF32 (10 bits of mantissa)."""
HALF_PRECISION_FACTOR = 1.5
"""How many times transformers' own relative error in bfloat16 a bfloat16 or float16 model may have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far logits ``[batch, tokens, vocabulary]`` are from a reference's, over all positions."""

    max_error: float
    """Largest ``|x - ref|``."""
    max_error_relative: float
    """``max_error`` over the largest ``|ref|``."""
    mean_error: float
    """Mean ``|x - ref|``."""
    relative_error: float
    """``||x - ref|| / ||ref||`` (Euclidean norms over everything)."""
    kl_divergence: float
    """Mean over positions of KL(ref || x) between the next-token distributions, in nats."""
    top1_agreement: float
    """Share of positions at which both have the same most likely token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The result of ``verify``."""

    patch: str
    location: str
    tokens: int
    dtype: str
    device: str
    backend: str
    ours: Agreement
    """The patched model against Hugging Face in float32."""
    hf_bfloat16: Agreement
    """Hugging Face's own bfloat16 against the same reference."""
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether the patched model keeps to its bound."""

    passed: bool
    measure: str
    """The field of ``Agreement`` that is bounded."""
    value: float
    bound: float

    def __str__(self) -> str:
        name = "largest error / largest logit" if self.measure == "max_error_relative" else "relative error"
        if self.passed:
            return f"passed: {name} {self.value:.4g} is within the bound, {self.bound:.4g}"
        return f"FAILED: {name} {self.value:.4g} is not within the bound, {self.bound:.4g}"


def judge(verification: Verification) -> Verdict:
    """Hold a verification against the bound for its dtype. A NaN keeps to no bound."""
    ours, theirs = verification.ours, verification.hf_bfloat16
    if verification.dtype in ("bfloat16", "float16"):
        measure, value, bound = "relative_error", ours.relative_error, HALF_PRECISION_FACTOR * theirs.relative_error
    else:
        bound = TF32_BOUND if verification.backend == "te" else FULL_PRECISION_BOUND
        measure, value = "max_error_relative", ours.max_error_relative
    return Verdict(passed=value <= bound, measure=measure, value=value, bound=bound)


def compare_logits(logits: torch.Tensor, reference: torch.Tensor) -> Agreement:
    """Compare two ``[..., vocabulary]`` tensors of logits; sums in float64. Raises ``PlanError`` if shapes differ."""
    if logits.shape != reference.shape:
        raise PlanError(
            Problem(
                where="logits",
                what="the models do not give logits of the same shape",
                expected=str(list(reference.shape)),
                found=str(list(logits.shape)),
            )
        )
    x, y = (t.reshape(-1, t.shape[-1]) for t in (logits, reference))
    largest = squared = norm = total = divergence = same = biggest = 0.0
    for a, b in zip(torch.split(x, CHUNK), torch.split(y, CHUNK), strict=True):
        a, b = a.double(), b.to(a.device).double()
        difference = (a - b).abs()
        # max() of a NaN is NaN: an error that is not a number must not vanish in a comparison.
        largest = max(largest, float(difference.max().nan_to_num(float("inf"))))
        biggest = max(biggest, float(b.abs().max()))
        squared += float(difference.square().sum())
        norm += float(b.square().sum())
        total += float(difference.sum())
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        divergence += float((log_b.exp() * (log_b - log_a)).sum())
        same += float((a.argmax(-1) == b.argmax(-1)).sum())
    rows = max(x.shape[0], 1)
    return Agreement(
        max_error=largest,
        max_error_relative=largest / max(biggest, 1e-300),
        mean_error=total / max(x.numel(), 1),
        relative_error=(squared / max(norm, 1e-300)) ** 0.5,
        kl_divergence=divergence / rows,
        top1_agreement=same / rows,
    )


@on_cpu_by_default
def verify(
    patch: str | Patch,
    location: str | PathLike[str],
    *,
    token_ids: torch.Tensor | Sequence[Sequence[int]],
    dtype: torch.dtype | str = AUTO,
    device: torch.device | str | None = None,
    backend: BackendName = AUTO,
    mapping: str | PathLike[str] | None = None,
    auto_class: AutoClass = None,
    drop: Sequence[str] = (),
) -> Verification:
    """Load a checkpoint with the patch and with transformers, and compare their logits over ``token_ids``.

    ``token_ids`` is ``[batch, tokens]``. The other arguments are those of ``load``, and so are the errors. The
    models are loaded one after the other. Raises ``PlanError`` also for a class whose models give no logits.
    """
    if Path(location).is_file():
        raise CheckpointError(
            Problem(where=str(location), what="transformers loads folders, not files", fix="give the file's folder")
        )
    checkpoint = open_checkpoint(location)
    if checkpoint.manifest is not None:
        raise CheckpointError(
            Problem(
                where=str(location),
                what="transformers can not load a checkpoint in the layout of patched layers, to compare with it",
                fix="verify the original, and prove with 'tepatch certify' that this one holds the same",
            )
        )
    folder = checkpoint.config_folder
    ids, vocabulary = torch.as_tensor(token_ids), read_config(folder).get_text_config().vocab_size
    if ids.numel() == 0 or int(ids.max()) >= vocabulary or int(ids.min()) < 0:
        raise PlanError(
            Problem(
                where="token_ids",
                what="token ids outside the vocabulary, or none at all",
                expected=f"at least one, each from 0 to {vocabulary - 1}",
                fix="use the checkpoint's own tokenizer",
            )
        )
    model = load(
        patch,
        location,
        dtype=dtype,
        device=device,
        backend=backend,
        mapping=mapping,
        auto_class=auto_class,
        drop=drop,
        progress=False,
    )
    report: Report = model.tepatch  # type: ignore[assignment]
    used, where = next(model.parameters()).dtype, next(model.parameters()).device
    cls = type(model)
    ours = _logits(model, ids)
    del model
    _collect()
    # Loaded in the patched model's dtype, so that both hold the same rounded weights. Hugging Face computes its
    # rotary frequencies in float32 at every dtype, and .float() leaves them so.
    stock: Any = cls.from_pretrained(folder, dtype=used, local_files_only=True, trust_remote_code=False)
    reference = _logits(stock.float().to(where), ids)
    stock = None
    _collect()
    stock = cls.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False)
    half = _logits(stock.to(where), ids)
    return Verification(
        patch=report.patch,
        location=str(location),
        tokens=ids.numel(),
        dtype=report.dtype,
        device=report.device,
        backend=report.backend,
        ours=compare_logits(ours, reference),
        hf_bfloat16=compare_logits(half, reference),
        versions=report.versions,
    )


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model.eval()(input_ids=ids.to(model.device), use_cache=False)
    logits: torch.Tensor | None = getattr(out, "logits", None)
    if logits is None:
        raise PlanError(
            Problem(
                where=type(model).__name__,
                what="models of this class give no logits to compare",
                found=", ".join(out),
                fix="choose a class with one head (auto_class='AutoModelForCausalLM')",
            )
        )
    return logits.float().cpu()


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
