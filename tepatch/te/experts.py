"""A mixture of experts: a router, and the experts' MLPs as grouped products.

The experts' matrices are two parameters, ``gate_up_proj`` and ``down_proj``, named and shaped as Hugging Face holds
them in memory. So a packed checkpoint needs no fusing, one that has its experts apart is stacked by its mapping, and
what addresses the experts by these names (PEFT's ``target_parameters``, weight decay, a sharding plan) finds them.
Transformer Engine's ``GroupedLinear`` wants a parameter for each expert; it computes with the slices of ours instead,
and their gradients arrive in the whole.

How many rows each expert gets is read by the host, once for each layer: Transformer Engine (2.20) cuts the batch by
numbers that the host knows. The router is the stock model's own module, in its own precision: it is never quantized,
and whoever records router logits looks for its class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tepatch.te.attention import gated_activation, normal_init
from tepatch.te.backend import Modules, modules
from tepatch.te.tracing import outside_graphs


class Experts(nn.Module):
    """Gated MLPs, of which each token uses some.

    Parameters, with f = ffn_hidden_size: ``gate_up_proj`` [num_experts, 2f, hidden_size], gate above up, and
    ``down_proj`` [num_experts, hidden_size, f]. ``activation`` is a gated activation by Transformer Engine's name.
    """

    caches_weights: bool = True
    """Whether quantized copies of the matrices are kept while they are frozen. ``set_precision`` sets it."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        activation: str = "swiglu",
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        te = modules()
        self.num_experts, self.hidden_size, self.ffn_hidden_size = num_experts, hidden_size, ffn_hidden_size
        self.activation = activation
        self.can_quantize = te.name == "te"
        self._permute, self._unpermute, self._grouped_mlp = te.moe_permute, te.moe_unpermute, te.grouped_mlp
        device = _device(te)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * ffn_hidden_size, hidden_size, device=device))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_hidden_size, device=device))
        for parameter in (self.gate_up_proj, self.down_proj):
            normal_init(init_std)(parameter)

    @outside_graphs  # a compiled graph would be one for these very numbers of rows
    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The experts of each token, weighted and added up.

        ``hidden_states`` ``[tokens, hidden_size]``; ``index`` (whole numbers) and ``weights`` ``[tokens, k]`` are each
        token's experts and what they count. Out: ``[tokens, hidden_size]``.
        """
        counts = torch.bincount(index.flatten(), minlength=self.num_experts).tolist()  # the host waits for this
        rows, order = self._permute(hidden_states, index)
        return self._unpermute(self._grouped_mlp(self, rows, counts), order, weights)

    def extra_repr(self) -> str:
        return f"{self.num_experts}, {self.hidden_size}, {self.ffn_hidden_size}, {self.activation}"


class MixtureOfExperts(nn.Module):
    """A router and experts, as a decoder layer's ``mlp``: a normed input ``[..., hidden_size]`` to the same shape.

    ``gate`` is Hugging Face's router: of rows ``[tokens, hidden_size]`` it gives (logits, weights ``[tokens, k]``,
    experts ``[tokens, k]``). ``jitter_noise`` is how far, at most, training scales each number of the normed input.
    """

    def __init__(self, gate: nn.Module, experts: Experts, *, jitter_noise: float = 0.0) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.jitter_noise = jitter_noise

    def forward(self, normed: Tensor) -> Tensor:
        if self.training and self.jitter_noise > 0:
            normed = normed * torch.empty_like(normed).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
        rows = normed.reshape(-1, normed.shape[-1])
        _, weights, index = self.gate(rows)
        out: Tensor = self.experts(rows, index, weights)
        return out.view(normed.shape)


def mixture_of_experts(
    config: Any, gate: nn.Module, *, num_experts: int, intermediate_size: int, jitter_noise: float = 0.0
) -> MixtureOfExperts:
    """The ``MixtureOfExperts`` of a config with the usual fields, around Hugging Face's router ``gate``.

    Reads ``hidden_size``, ``hidden_act`` and ``initializer_range``. Raises ``UnsupportedError`` for
    an activation that Transformer Engine does not have.
    """
    experts = Experts(
        num_experts,
        config.hidden_size,
        intermediate_size,
        activation=gated_activation(config.hidden_act),
        init_std=config.initializer_range,
    )
    gate = gate.to(experts.down_proj.device)  # Hugging Face's modules do not go to the GPU by themselves
    for parameter in gate.parameters():
        normal_init(config.initializer_range)(parameter)  # nor do they leave their constructor with values
    return MixtureOfExperts(gate, experts, jitter_noise=jitter_noise)


def _device(te: Modules) -> torch.device:
    """Where the backend's own modules would be made."""
    default = torch.get_default_device()
    return torch.device("cuda") if te.default_device == "cuda" and default.type == "cpu" else default
