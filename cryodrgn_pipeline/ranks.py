"""Ranks: processes that compute one result together, on one node or on several, over torch.distributed.

torchrun starts them (`launch`). All run the same code on the same numbers: each works on its share of the
images, sums are reduced over all, and rank 0 alone writes. One process on its own is the only rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from cryodrgn_pipeline.errors import LostRankError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What one rank does alone (reading, writing) the others wait for; of a rank that died, torchrun tells them.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among those that compute together: number `rank` of `size`, `local_size` on its node."""

    rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's part of `count` things in a row; shares differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor, of the same shape on all ranks, by its sum over them."""
        if self.size > 1:
            import torch.distributed as dist

            for tensor in tensors:
                dist.all_reduce(tensor)

    def largest(self, *numbers: float) -> list[float]:
        """The largest of each number over all ranks."""
        if self.size == 1:
            return list(numbers)
        import torch
        import torch.distributed as dist

        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [float(value) for value in values]

    def gathered(self, values: Tensor) -> Tensor:
        """All shares one after the other, on every rank: `(n, …)` here → `(N, …)`."""
        if self.size == 1:
            return values
        import torch
        import torch.distributed as dist

        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(values)
        dist.all_reduce(counts)
        padded = values.new_zeros((int(counts.max()), *values.shape[1:]))
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])

    def told(self, values: Tensor) -> Tensor:
        """The tensor of rank 0, where the others have one of the same shape and type."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        values = values.contiguous()
        dist.broadcast(values, 0)
        return values


ALONE = Ranks()


def started_by_torchrun() -> bool:
    """Whether this process is one of several (or the one) that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """This process among the ranks that torchrun started, connected while the block runs.

    Tensors on the CPU go through gloo, those on a GPU through NCCL.

    Raises
    ------
    LostRankError
        If another rank was lost on the way.
    """
    if not started_by_torchrun():
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(
            rank=dist.get_rank(), size=dist.get_world_size(), local_size=int(os.environ["LOCAL_WORLD_SIZE"])
        )
        dist.all_reduce(torch.zeros(1))  # none takes its end of a connection away that another still uses
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise
        raise LostRankError(f"another process was lost ({str(error).splitlines()[0]})") from error
    finally:
        dist.destroy_process_group()
