"""The reference for ``te.Linear`` and ``te.LayerNormLinear``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tepatch.te.norms import Device, Init, NormedInput, default_init, initialize
from tepatch.te.projections import FusedLinear, FusedNormLinear


class Linear(FusedLinear):
    """A matrix product with an optional bias, as ``te.Linear``: [..., in_features] to [..., out_features].

    Parameters: ``weight`` [out_features, in_features], ``bias`` [out_features].
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        init_method: Init | None = None,
        params_dtype: torch.dtype | None = None,
        device: Device = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.name = name
        self._init_method = init_method or default_init
        _add_weight_and_bias(self, in_features, out_features, bias=bias, dtype=params_dtype, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the weight by ``init_method`` (normal, 0.023 by default), the bias with zeros; not on meta."""
        initialize(self.weight, self._init_method)
        initialize(self.bias, nn.init.zeros_)

    def compute(self, inp: Tensor) -> Tensor:
        return F.linear(inp, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class LayerNormLinear(FusedNormLinear, NormedInput):
    """A norm and then a matrix product, as ``te.LayerNormLinear``: [..., in_features] to [..., out_features].

    Parameters: ``layernorm_weight`` [in_features], ``layernorm_bias`` [in_features] (normalization
    "LayerNorm" only), ``weight`` [out_features, in_features], ``bias`` [out_features]. With
    ``return_layernorm_output`` the result is (output, normed input).

    Raises:
        UnsupportedError: ``normalization`` is neither "LayerNorm" nor "RMSNorm".
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        *,
        bias: bool = True,
        init_method: Init | None = None,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        params_dtype: torch.dtype | None = None,
        device: Device = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            in_features,
            eps=eps,
            normalization=normalization,
            zero_centered_gamma=zero_centered_gamma,
            dtype=params_dtype,
            device=device,
        )
        self.in_features = in_features
        self.out_features = out_features
        self.return_layernorm_output = return_layernorm_output
        self.name = name
        self._init_method = init_method or default_init
        _add_weight_and_bias(self, in_features, out_features, bias=bias, dtype=params_dtype, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the norm the identity, fill the weight by ``init_method``, zero the bias; not on meta."""
        self.reset_norm_parameters()
        initialize(self.weight, self._init_method)
        initialize(self.bias, nn.init.zeros_)

    def compute(self, inp: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out, normed = self.compute_with_normed(inp)
        return (out, normed) if self.return_layernorm_output else out

    def compute_with_normed(self, inp: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.normed(inp)
        return self.compute_of_normed(normed), normed

    def compute_of_normed(self, normed: Tensor) -> Tensor:
        return F.linear(normed, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.normalization}, bias={self.bias is not None}"


def _add_weight_and_bias(
    module: Linear | LayerNormLinear,
    in_features: int,
    out_features: int,
    *,
    bias: bool,
    dtype: torch.dtype | None,
    device: Device,
) -> None:
    module.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))
    shift = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
    module.register_parameter("bias", shift)
