"""Low-rank updates of linear layers (LoRA, Hu et al. 2021, arXiv 2106.09685), which keep the names of the weights.

The library peft renames every layer that it changes (`base_layer`), so that checkpoints would lose timm's names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DOWN, _UP = "lora_down", "lora_up"


class LoRALinear(nn.Linear):
    """Linear layer with weight W + B A (equation 3 with α = r); only A (r, in) and B (out, r) are trained, B from 0."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias  # (out, in), (out,)
        self.lora_down = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_up = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.lora_down), self.lora_up)


def add_lora(model: nn.Module, rank: int) -> None:
    """Replace every linear layer of a model, in place; all other parameters are frozen."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, LoRALinear(child, rank))


def merge_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with W + B A in the place of W, A and B, as a model without LoRA has them."""
    merged = {name: value for name, value in state.items() if not name.endswith((_DOWN, _UP))}
    for name, down in state.items():
        if name.endswith(f".{_DOWN}"):
            layer = name.removesuffix(_DOWN)
            merged[f"{layer}weight"] = state[f"{layer}weight"] + state[f"{layer}{_UP}"] @ down
    return merged
