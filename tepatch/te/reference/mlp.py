"""The reference for ``te.LayerNormMLP`` and the activations that it knows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tepatch.errors import Problem, UnsupportedError
from tepatch.te.norms import Device, Init, NormedInput, default_init, initialize
from tepatch.te.projections import FusedMLP


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


_tanh_gelu = functools.partial(F.gelu, approximate="tanh")

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "gelu": (_tanh_gelu, False),
    "geglu": (_tanh_gelu, True),
    "qgelu": (_quick_gelu, False),
    "qgeglu": (_quick_gelu, True),
    "relu": (F.relu, False),
    "reglu": (F.relu, True),
    "srelu": (_squared_relu, False),
    "sreglu": (_squared_relu, True),
    "silu": (F.silu, False),
    "swiglu": (F.silu, True),
    "glu": (torch.sigmoid, True),
}
"""By name: the function f, and whether it gates. A gated one computes f(first half) * second half; note that
``torch.nn.functional.glu`` gates with the other half."""


class LayerNormMLP(FusedMLP, NormedInput):
    """A norm and a two-layer MLP, as ``te.LayerNormMLP``: [..., hidden_size] to [..., hidden_size].

    Parameters, with f = ffn_hidden_size and n = 2f where the activation gates, else n = f:
    ``layernorm_weight`` [hidden_size], ``layernorm_bias`` [hidden_size] (normalization "LayerNorm" only),
    ``fc1_weight`` [n, hidden_size], ``fc1_bias`` [n], ``fc2_weight`` [hidden_size, f], ``fc2_bias``
    [hidden_size].

    Raises:
        UnsupportedError: ``activation`` or ``normalization`` is unknown here.
    """

    fc1_bias: nn.Parameter | None
    fc2_bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        eps: float = 1e-5,
        *,
        bias: bool = True,
        init_method: Init | None = None,
        output_layer_init_method: Init | None = None,
        normalization: str = "LayerNorm",
        activation: str = "gelu",
        zero_centered_gamma: bool = False,
        params_dtype: torch.dtype | None = None,
        device: Device = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            eps=eps,
            normalization=normalization,
            zero_centered_gamma=zero_centered_gamma,
            dtype=params_dtype,
            device=device,
        )
        if activation not in ACTIVATIONS:
            raise UnsupportedError(
                Problem(
                    where="activation",
                    what="the reference modules have no such activation",
                    expected=f"one of {', '.join(ACTIVATIONS)}",
                    found=repr(activation),
                )
            )
        self.hidden_size = hidden_size
        self.ffn_hidden_size = ffn_hidden_size
        self.activation = activation
        self.name = name
        self._init_method = init_method or default_init
        self._output_layer_init_method = output_layer_init_method or default_init
        empty = functools.partial(torch.empty, dtype=params_dtype, device=device)
        fc1_features = 2 * ffn_hidden_size if ACTIVATIONS[activation][1] else ffn_hidden_size
        self.fc1_weight = nn.Parameter(empty(fc1_features, hidden_size))
        self.register_parameter("fc1_bias", nn.Parameter(empty(fc1_features)) if bias else None)
        self.fc2_weight = nn.Parameter(empty(hidden_size, ffn_hidden_size))
        self.register_parameter("fc2_bias", nn.Parameter(empty(hidden_size)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the norm the identity, fill weights by the init methods and biases with zeros; not on meta."""
        self.reset_norm_parameters()
        initialize(self.fc1_weight, self._init_method)
        initialize(self.fc1_bias, nn.init.zeros_)
        initialize(self.fc2_weight, self._output_layer_init_method)
        initialize(self.fc2_bias, nn.init.zeros_)

    def compute(self, inp: Tensor) -> Tensor:
        first, _ = self.first_with_normed(inp)
        return self.second(self.activate(first))

    def first_with_normed(self, inp: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.normed(inp)
        return self.first_of_normed(normed), normed

    def first_of_normed(self, normed: Tensor) -> Tensor:
        return F.linear(normed, self.fc1_weight, self.fc1_bias)

    def activate(self, first: Tensor) -> Tensor:
        return activate(first, self.activation)

    def second(self, activated: Tensor) -> Tensor:
        return F.linear(activated, self.fc2_weight, self.fc2_bias)

    def extra_repr(self) -> str:
        sizes = f"{self.hidden_size}, {self.ffn_hidden_size}"
        return f"{sizes}, {self.normalization}, {self.activation}, bias={self.fc1_bias is not None}"


def activate(fc1: Tensor, activation: str) -> Tensor:
    """One of ``ACTIVATIONS`` of the first layer's output, in float32 or wider; the dtype stays the input's."""
    function, gates = ACTIVATIONS[activation]
    x = fc1.to(torch.promote_types(fc1.dtype, torch.float32))
    if not gates:
        return function(x).to(fc1.dtype)
    gate, up = x.chunk(2, dim=-1)
    return (function(gate) * up).to(fc1.dtype)
