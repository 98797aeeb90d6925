"""The reference norms, alone and as the first step of ``LayerNormLinear`` and ``LayerNormMLP``.

All arithmetic is in float32 (float64 for float64 inputs), gamma included, and rounds once at the end. Hugging
Face's Llama norm rounds before it multiplies by gamma: in float32 the two agree, in bfloat16 by one rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tepatch.errors import Problem, UnsupportedError

Init = Callable[[Tensor], object]
Device = str | torch.device | None

default_init: Init = functools.partial(nn.init.normal_, mean=0.0, std=0.023)
"""What Transformer Engine fills weights with unless it is given an ``init_method``."""


def initialize(parameter: nn.Parameter | None, method: Init) -> None:
    """Fill a parameter in place, unless it is switched off or on meta."""
    if parameter is not None and not parameter.is_meta:
        with torch.no_grad():
            method(parameter)


def identity_gamma(*, zero_centered: bool) -> Init:
    """Give the initialisation under which a norm's gamma multiplies by one."""
    return nn.init.zeros_ if zero_centered else nn.init.ones_


def rms_norm(x: Tensor, gamma: Tensor, *, eps: float, zero_centered_gamma: bool) -> Tensor:
    """Divide by the root mean square over gamma's dimensions and scale; float32 or wider, not rounded.

    y = x / sqrt(mean(x^2) + eps) * gamma, with 1 + gamma in place of gamma where it is zero-centered
    (Zhang and Sennrich 2019, arXiv:1910.07467).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)
    mean_square = x.square().mean(dim=tuple(range(-gamma.dim(), 0)), keepdim=True)
    return x * torch.rsqrt(mean_square + eps) * _scale(gamma, wide, zero_centered_gamma)


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, *, eps: float, zero_centered_gamma: bool) -> Tensor:
    """Standardise over gamma's dimensions, scale and shift; float32 or wider, not rounded.

    y = (x - mean(x)) / sqrt(var(x) + eps) * gamma + beta, with 1 + gamma where gamma is zero-centered
    (Ba et al. 2016, arXiv:1607.06450).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = _scale(gamma, wide, zero_centered_gamma)
    return F.layer_norm(x.to(wide), gamma.shape, scale, beta.to(wide), eps)


def _scale(gamma: Tensor, dtype: torch.dtype, zero_centered: bool) -> Tensor:
    return gamma.to(dtype) + 1 if zero_centered else gamma.to(dtype)


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimensions, as ``te.RMSNorm``; the output has the weight's dtype.

    Parameter: ``weight`` [normalized_shape].
    """

    def __init__(
        self,
        normalized_shape: int | Iterable[int],
        eps: float = 1e-5,
        *,
        zero_centered_gamma: bool = False,
        dtype: torch.dtype | None = None,
        device: Device = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered_gamma = zero_centered_gamma
        self.weight = nn.Parameter(torch.empty(_shape(normalized_shape), dtype=dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make it multiply by one; does nothing on meta."""
        initialize(self.weight, identity_gamma(zero_centered=self.zero_centered_gamma))

    def forward(self, inp: Tensor) -> Tensor:
        # The input is rounded to the weight's dtype first, as Transformer Engine does where the two differ.
        x = inp.to(self.weight.dtype)
        y = rms_norm(x, self.weight, eps=self.eps, zero_centered_gamma=self.zero_centered_gamma)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}, zero_centered_gamma={self.zero_centered_gamma}"


class LayerNorm(nn.Module):
    """Layer norm over the last dimensions, as ``te.LayerNorm``; the output has the weight's dtype.

    Parameters: ``weight`` and ``bias`` [normalized_shape].
    """

    def __init__(
        self,
        normalized_shape: int | Iterable[int],
        eps: float = 1e-5,
        *,
        zero_centered_gamma: bool = False,
        dtype: torch.dtype | None = None,
        device: Device = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered_gamma = zero_centered_gamma
        shape = _shape(normalized_shape)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make it multiply by one and add zero; does nothing on meta."""
        initialize(self.weight, identity_gamma(zero_centered=self.zero_centered_gamma))
        initialize(self.bias, nn.init.zeros_)

    def forward(self, inp: Tensor) -> Tensor:
        x = inp.to(self.weight.dtype)
        y = layer_norm(x, self.weight, self.bias, eps=self.eps, zero_centered_gamma=self.zero_centered_gamma)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}, zero_centered_gamma={self.zero_centered_gamma}"


class NormedInput(nn.Module):
    """The norm that ``LayerNormLinear`` and ``LayerNormMLP`` begin with, and its parameters."""

    layernorm_bias: nn.Parameter | None

    def __init__(
        self,
        features: int,
        *,
        eps: float,
        normalization: str,
        zero_centered_gamma: bool,
        dtype: torch.dtype | None,
        device: Device,
    ) -> None:
        super().__init__()
        if normalization not in ("LayerNorm", "RMSNorm"):
            raise UnsupportedError(
                Problem(
                    where="normalization",
                    what="there is no such normalization",
                    expected="'LayerNorm' or 'RMSNorm'",
                    found=repr(normalization),
                )
            )
        self.eps = eps
        self.normalization = normalization
        self.zero_centered_gamma = zero_centered_gamma
        self.layernorm_weight = nn.Parameter(torch.empty(features, dtype=dtype, device=device))
        shift = torch.empty(features, dtype=dtype, device=device) if normalization == "LayerNorm" else None
        self.register_parameter("layernorm_bias", None if shift is None else nn.Parameter(shift))

    def reset_norm_parameters(self) -> None:
        """Make the norm multiply by one and add zero; does nothing on meta."""
        initialize(self.layernorm_weight, identity_gamma(zero_centered=self.zero_centered_gamma))
        initialize(self.layernorm_bias, nn.init.zeros_)


def _shape(normalized_shape: int | Iterable[int]) -> tuple[int, ...]:
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
