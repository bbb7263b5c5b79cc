"""What a training run is asked to do."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from cryodrgn_pipeline.errors import ConfigError
from cryodrgn_pipeline.subspace.em import LEARN_FROM

USUAL_RATE, USUAL_BATCH = 1e-4, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """Recipe of one training; the architecture is `VaeConfig`'s.

    `learn_from`: how many particles teach the subspace and its maps at most, where a model starts from it.
    `learning_rate` None means 1e-4 at a batch of 16, growing with its square root; `beta` None 1/latent_dim,
    or 2 for models that start from the subspace. `coordinate_fraction` is the share of the half plane, drawn
    anew for each batch, on which the loss is taken. `frequency_marching`: the disc of the loss grows over so
    many epochs. `in_memory` and `amp` None decide by memory and device.
    """

    learn_from: int = LEARN_FROM
    epochs: int = 20
    batch_size: int = 16
    learning_rate: float | None = None
    beta: float | None = None
    coordinate_fraction: float = 1.0
    frequency_marching: int = 0
    held_out_fraction: float = 0.05
    checkpoint_every_epochs: int = 5
    checkpoint_every_minutes: float = 15.0
    seed: int = 0
    device: str = "auto"
    in_memory: bool | None = None
    amp: bool | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("learn-from", self.learn_from >= 1, "at least 1"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch-size", self.batch_size >= 1, "at least 1"),
            ("learning-rate", self.learning_rate is None or self.learning_rate > 0, "'auto' or positive"),
            ("beta", self.beta is None or self.beta >= 0, "'auto' or not negative"),
            ("coordinate-fraction", 0 < self.coordinate_fraction <= 1, "in (0, 1]"),
            ("frequency-marching", self.frequency_marching >= 0, "not negative"),
            ("held-out-fraction", 0 <= self.held_out_fraction < 1, "in [0, 1)"),
            ("checkpoint-every-epochs", self.checkpoint_every_epochs >= 1, "at least 1"),
            ("checkpoint-every-minutes", self.checkpoint_every_minutes > 0, "positive"),
            ("threads", self.threads is None or self.threads >= 1, "at least 1"),
        )
        for name, holds, expected in rules:
            if not holds:
                value = getattr(self, name.replace("-", "_"))
                raise ConfigError(f"--{name} {value}: expected a value that is {expected}")

    @property
    def step_size(self) -> float:
        """Adam's learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return USUAL_RATE * math.sqrt(self.batch_size / USUAL_BATCH)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def that_shape_the_result(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the interrupted one."""
        free = (
            "epochs",
            "checkpoint_every_epochs",
            "checkpoint_every_minutes",
            "device",
            "in_memory",
            "threads",
        )
        return {name: value for name, value in asdict(self).items() if name not in free}
