"""How far two results may be apart that add the same numbers in another order: a bound from the arithmetic.

A processor's vectors, threads and BLAS decide in which order it adds, so what one processor gives bounds nothing on
another. What holds for every order is in N. J. Higham, "Accuracy and Stability of Numerical Algorithms" (2nd edition,
SIAM 2002), with the unit roundoff u = eps / 2 and gamma_n = n u / (1 - n u):

- Section 3.1: a computed sum of n products x_i y_i is off by at most gamma_n times the sum of the |x_i y_i|.
- Section 3.5: so is each element of a matrix product, |AB - fl(AB)| <= gamma_n |A| |B|.
- Lemma 3.3: gamma_j + gamma_k + gamma_j gamma_k <= gamma_(j + k). Where products follow on each other, their numbers
  of terms add up, and an operation on single elements is one term more.

Two results of n terms are each within gamma_n of the exact one, and so within n eps / (1 - n eps) of each other: with
eps in the place of u, the bound is for two results of one precision, and leaves half of itself to spare where the
other one is computed in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ELEMENTWISE = 16
"""Operations on single elements along a decoder layer: norms, rotation, softmax, activation, what is added."""


def gamma(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """How far two sums of so many terms may be apart in ``dtype``, over the sum of the terms' absolute values."""
    product = terms * torch.finfo(dtype).eps
    assert 0 < product < 1, f"{terms} terms: too many to say anything in {dtype}"
    return product / (1 - product)


def assert_close(found: Tensor, expected: Tensor, *, terms: int, condition: float = 1.0, name: str = "") -> None:
    """Fail if an element of ``found`` is further from ``expected`` than another order of summation explains.

    The bound is ``condition * gamma(terms)``, of the largest element of ``expected``. ``terms`` counts those that are
    added one after another on the longest way to an element. ``condition`` is the sum of their absolute values over
    the largest element, for one product; for random numbers it is about sqrt(n) / 6. Through a model it is left at 1:
    errors that all have the same sign, which gamma is for, are sqrt(n) times those that are met.

    ``expected`` is of the dtype of ``found``, or a reference in float64. Zeros have to be zeros. What is not finite is
    close to nothing.
    """
    assert found.shape == expected.shape, f"{name}: {list(found.shape)}, and not {list(expected.shape)}"
    assert expected.dtype in (found.dtype, torch.float64), f"{name}: {found.dtype}, and not {expected.dtype}"
    if not found.numel():
        return
    found, expected, bound = found.detach(), expected.detach().double(), condition * gamma(terms, found.dtype)
    largest, error = float(expected.abs().max()), float((found.double() - expected).abs().max())
    assert error <= bound * largest < float("inf"), (
        f"{name}: off by {error:.3g}, and may be by {bound:.3g} of the largest element, {largest:.3g}"
    )


def scores(query: Tensor, key: Tensor, scale: float) -> float:
    """The condition of attention over its values: what an error of the scores is multiplied by.

    A score is a sum of products; softmax makes a relative error of a weight of its absolute error, once in the
    numerator and once in the sum. Shapes: [..., channels].
    """
    query, key = (tensor.detach().double().abs().flatten(0, -2) for tensor in (query, key))
    return 1 + 2 * scale * float((query @ key.T).max())


def forward_terms(config: Any, keys: int) -> int:
    """The terms on the way from embeddings to logits, in a decoder or encoder of this config that attends to ``keys``.

    As many as there are in the longest sums of each product: of scores, softmax, values, projections and norms.
    """
    config = config.get_text_config()
    width, ffn = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    channels = getattr(config, "head_dim", None) or width // heads
    norm = 2 * width  # a LayerNorm has two sums
    attention = norm + width + channels + 2 * keys + heads * channels
    experts = getattr(config, "num_experts_per_tok", None) or 0
    layer = attention + norm + width + ffn + experts + ELEMENTWISE
    return int(config.num_hidden_layers * layer + norm + width)


def gradient_terms(config: Any, keys: int, tokens: int) -> int:
    """The terms on the way to the gradient of a parameter: forth, and back through the transposed products.

    A loss is a mean over ``tokens``, and so is the gradient of a parameter a sum over them.
    """
    text = config.get_text_config()
    width, ffn, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
    channels = getattr(text, "head_dim", None) or width // heads
    norm = 2 * width
    attention = norm + width + channels + (1 + heads) * keys + 3 * heads * channels
    layer = attention + norm + width + 2 * ffn + ELEMENTWISE
    back = 2 * getattr(text, "vocab_size", 0) + text.num_hidden_layers * layer + norm + tokens
    return forward_terms(config, keys) + int(back)
