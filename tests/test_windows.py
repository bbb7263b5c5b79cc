"""The order of an epoch, and how its images are read from disk: once, in long runs, a window ahead."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cryodrgn_pipeline.io.mrc import MrcImages, MrcStackWriter
from cryodrgn_pipeline.models.vae import VaeConfig
from cryodrgn_pipeline.ranks import Ranks
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.training import windows
from cryodrgn_pipeline.training.data import TrainingData
from cryodrgn_pipeline.training.windows import Windows, read_in_order

BOX, COUNT = 8, 1000
IMAGE_BYTES = 2 * BOX**2


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> MrcImages:
    """1000 float16 images; image n is n everywhere."""
    path = tmp_path_factory.mktemp("windows") / "images.mrcs"
    with MrcStackWriter(path, n_images=COUNT, box_size_px=BOX, voxel_size_a=1.0, dtype="float16") as stack:
        stack.append(np.broadcast_to(np.arange(COUNT, dtype=np.float32)[:, None, None], (COUNT, BOX, BOX)))
    return MrcImages(path)


@pytest.fixture
def reads(images: MrcImages, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each read from the disk took."""
    counts: list[int] = []
    fill: Callable[..., None] = MrcImages._fill

    def counted(self: MrcImages, first: int, raw: np.ndarray) -> None:
        counts.append(len(raw))
        fill(self, first, raw)

    monkeypatch.setattr(MrcImages, "_fill", counted)
    return counts


def test_an_epoch_sees_every_image_once_in_an_order_fixed_by_seed_and_epoch() -> None:
    rows = np.flatnonzero(np.arange(COUNT) % 3)
    sizes = Windows(chunk=10, window=60)
    order = sizes.order(rows, 0, 1)
    assert sorted(order) == rows.tolist()
    assert order.tolist() == sizes.order(rows, 0, 1).tolist()
    assert order.tolist() != sizes.order(rows, 0, 2).tolist()
    assert order.tolist() != sizes.order(rows, 1, 1).tolist()


def test_a_window_holds_whole_chunks_from_everywhere_mixed() -> None:
    order = Windows(chunk=10, window=60).order(np.arange(COUNT), 0, 0)
    for start in range(0, COUNT - 60, 60):
        window = order[start : start + 60]
        runs = np.count_nonzero(np.diff(np.sort(window)) > 1) + 1
        assert runs <= 7  # six chunks, one of which may lie across the end of the stack
        assert np.count_nonzero(np.diff(window) == 1) < 12
    assert order[:60].max() - order[:60].min() > COUNT / 3


def test_images_come_in_the_order_asked_for_whatever_the_windows(images: MrcImages) -> None:
    order = np.random.default_rng(0).permutation(COUNT)[:500]
    parts = [order[i : i + 16] for i in range(0, 500, 16)]
    for sizes in ([0] * len(parts), list(range(len(parts))), [i // 5 for i in range(len(parts))]):
        read = list(read_in_order(images, parts, sizes))
        assert [part[:, 0, 0].astype(int).tolist() for part in read] == [part.tolist() for part in parts]
        assert read[0].dtype == np.float16
    assert list(read_in_order(images, [], [])) == []


def test_a_window_is_read_in_runs_and_an_epoch_reads_the_stack_once(
    images: MrcImages, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cryodrgn_pipeline.io.mrc.GAP_BYTES", 0)
    sizes, batch = Windows(chunk=25, window=100), 20
    order = sizes.order(np.arange(COUNT), 0, 0)
    parts = [order[i : i + batch] for i in range(0, COUNT, batch)]
    list(read_in_order(images, parts, [i * batch // sizes.window for i in range(len(parts))]))
    assert sum(reads) == COUNT
    assert len(reads) <= 10 * 5 + 2


def test_small_gaps_are_read_through_and_large_ones_are_not(
    images: MrcImages, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cryodrgn_pipeline.io.mrc.GAP_BYTES", 3 * IMAGE_BYTES)
    index = np.array([5, 6, 8, 11, 400, 401, 900])
    assert images.read_stored(index)[:, 0, 0].astype(int).tolist() == index.tolist()
    assert reads == [7, 2, 1]
    monkeypatch.setattr("cryodrgn_pipeline.io.mrc.RUN_BYTES", 4 * IMAGE_BYTES)
    reads.clear()
    assert images.read_stored(index)[:, 0, 0].astype(int).tolist() == index.tolist()
    assert max(reads) <= 4
    with pytest.raises(ValueError, match="rising"):
        images.read_stored(index[::-1])


def test_ranks_read_their_shares_of_the_same_batches(tiny_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "CHUNK_BYTES", 8 * 1024)
    monkeypatch.setattr(windows, "WINDOW_BYTES", 24 * 1024)
    stack, model = Stack.open(tiny_set / "stack"), VaeConfig(box_size_px=16, latent_dim=2)
    lazy, held = (
        TrainingData(stack, np.arange(96), model, in_memory=in_memory, device=torch.device("cpu"))
        for in_memory in (False, True)
    )
    order = lazy.epoch_order(np.arange(96), 0, 1)
    assert order.tolist() == held.epoch_order(np.arange(96), 0, 1).tolist()
    whole = list(held.batches(order, 10, first=2))
    for rank in range(3):
        mine = list(lazy.batches(order, 10, first=2, ranks=Ranks(rank=rank, size=3)))
        assert len(mine) == len(whole) == 8
        for one, every in zip(mine, whole, strict=True):
            share = Ranks(rank=rank, size=3).share(len(every.rows))
            assert one.rows.tolist() == every.rows[share].tolist()
            assert torch.equal(one.coefficients, every.coefficients[share])


MEMORY = """
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np, torch
from cryodrgn_pipeline.io.mrc import MrcImages
from cryodrgn_pipeline.models.vae import VaeConfig
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.training import windows
from cryodrgn_pipeline.training.data import TrainingData

def peak_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
windows.CHUNK_BYTES, windows.WINDOW_BYTES = 2**17, 2**21
path, count = sys.argv[1], int(sys.argv[2])
tiny = Stack.open(path)
rows = np.arange(count)
particles = tiny.particles.take(rows % len(tiny))
particles = replace(particles, particle_id=rows.astype(np.uint64))
stack = replace(tiny, images=MrcImages(sys.argv[3]), particles=particles)
model = VaeConfig(box_size_px=16, latent_dim=2)
data = TrainingData(stack, rows, model, in_memory=False, device=torch.device("cpu"), scale=1.0)
before, images = peak_kib(), 0
for batch in data.batches(data.epoch_order(rows, 0, 0), 256):
    images += len(batch.rows)
print(images, peak_kib() - before)
"""


def test_the_memory_of_an_epoch_is_that_of_its_windows_however_many_images(
    tiny_set: Path, tmp_path: Path
) -> None:
    """Sparse stacks: the holes of a file read as zeros."""
    grown = []
    for count in (15_000, 150_000):
        path = tmp_path / f"{count}.mrcs"
        with MrcStackWriter(path, n_images=1, box_size_px=16, voxel_size_a=1.0, dtype="float16") as stack:
            stack.append(np.zeros((1, 16, 16), np.float32))
        header = bytearray(path.read_bytes()[:1024])
        header[8:12] = np.int32(count).tobytes()
        with path.open("r+b") as file:
            file.write(header)
            file.truncate(1024 + count * 512)
        words = [sys.executable, "-c", MEMORY, str(tiny_set / "stack"), str(count), str(path)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        seen, grown_kib = done.stdout.split()
        assert int(seen) == count
        grown.append(int(grown_kib) / 1024)
    assert grown[1] < 50  # MiB; the stack has 73
    assert grown[1] - grown[0] < 10  # and of these the order of the epoch and its batches take 4
