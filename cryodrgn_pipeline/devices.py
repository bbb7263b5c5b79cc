"""The device that arithmetic runs on, and the threads."""

from __future__ import annotations

import os

import torch

from cryodrgn_pipeline.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; each process that torchrun starts on a node has its own.

    `cuda` without one is a `ConfigError`, and so are fewer GPUs than processes.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {name}: expected auto, cpu or cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError(
            "--device cuda: this torch sees no GPU. Use --device auto or cpu, or check the driver."
        )
    if name == "cpu" or not available:
        return torch.device("cpu")
    if "LOCAL_RANK" not in os.environ:
        return torch.device("cuda")
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= there:
        asked = os.environ["LOCAL_WORLD_SIZE"]
        raise ConfigError(f"--processes {asked}: this node has {there} GPUs, and each process needs its own")
    return torch.device("cuda", local)


def use_threads(threads: int | None) -> None:
    """Let torch use so many threads of the CPU (None: all), or this process's part of them under torchrun."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if threads is not None or here > 1:
        torch.set_num_threads(max(1, (threads or torch.get_num_threads()) // here))
