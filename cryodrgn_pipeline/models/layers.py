"""Fully connected stacks, plain and residual, that encoder and decoder share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ResidualLinear(nn.Linear):
    """x + W x + b, computed as one product (W + 1) x + b so that the skip costs no pass over memory."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` → `(..., width)`."""
        identity = torch.eye(self.in_features, device=self.weight.device, dtype=self.weight.dtype)
        return functional.linear(x, self.weight + identity, self.bias)


class HiddenLayers(nn.Module):
    """`depth` layers of `width` units, each followed by a ReLU; `residual` adds a skip around each."""

    def __init__(self, width: int, depth: int, *, residual: bool) -> None:
        super().__init__()
        layer = ResidualLinear if residual else lambda w: nn.Linear(w, w)
        self.layers = nn.ModuleList(layer(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` → `(..., width)`."""
        for layer in self.layers:
            x = functional.relu_(layer(x))
        return x
