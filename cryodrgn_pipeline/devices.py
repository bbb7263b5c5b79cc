"""The device that arithmetic runs on."""

from __future__ import annotations

import torch

from cryodrgn_pipeline.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; `cuda` without one is a `ConfigError`."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {name}: expected auto, cpu or cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError(
            "--device cuda: this torch sees no GPU. Use --device auto or cpu, or check the driver."
        )
    return torch.device("cuda" if name != "cpu" and available else "cpu")
