"""What the subspace costs per image and per map, measured against the formulas of docs/scaling.md.

    python benchmarks/subspace_speed.py --boxes 32 64 128 --maps 7 --threads 2
    python benchmarks/subspace_speed.py --boxes 64 128 256 --maps 7 --images 2000 --device cuda

Images are noise: what they show does not change what they cost. Times exclude compilation.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cryodrgn_pipeline.fourier_images import FourierImages
from cryodrgn_pipeline.models.basis import BasisConfig, BasisVae
from cryodrgn_pipeline.subspace.basis import BATCH_SIZE, Seen, _elbo, _one_thread
from cryodrgn_pipeline.subspace.images import level_plane
from cryodrgn_pipeline.subspace.memory import required_bytes
from cryodrgn_pipeline.subspace.solve import Lattice, solve
from cryodrgn_pipeline.subspace.sums import NormalEquations, inner_products, pack

CG_ITERATIONS = 4


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """The least of some runs, after one that compiles."""
    taken = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def status_kib(name: str) -> int:
    """A line of this process's status; its own peak, where getrusage starts from that of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def noise_images(box_size_px: int, count: int, device: str) -> FourierImages:
    """Images at random directions."""
    rng = torch.Generator().manual_seed(0)
    plane = level_plane(box_size_px, box_size_px)
    rotation, _ = torch.linalg.qr(torch.randn(count, 3, 3, generator=rng))
    return FourierImages(
        plane=plane.to(device),
        coefficients=torch.complex(*torch.randn(2, count, len(plane), generator=rng)).to(device),
        ctf=torch.randn(count, len(plane), generator=rng).to(device),
        rotation=rotation.to(device),
        scale=torch.ones(count, device=device),
        noise_group=torch.zeros(count, dtype=torch.long, device=device),
    )


def passes(box_size_px: int, maps: int, count: int, device: str) -> tuple[float, float]:
    """Milliseconds an image of the pass that sums and of the pass that looks."""
    images = noise_images(box_size_px, count, device)
    weight = torch.ones(1, len(images.plane), device=device)
    linear = torch.randn(count, maps, device=device)
    second = pack(linear[:, :, None] * linear[:, None])
    sums = NormalEquations(box_size_px, maps, device=device)
    lattice = Lattice(box_size_px, device=device)
    columns = lattice.columns(torch.randn(maps, *(box_size_px,) * 3))
    summed = seconds(lambda: sums.add(images, weight, linear, second))
    seen = seconds(lambda: inner_products(columns, lattice.size, images, weight))
    return 1e3 * summed / count, 1e3 * seen / count


def solved(box_size_px: int, maps: int, device: str) -> float:
    """Sums of a few images and their solve, in seconds: what --memory measures in a process of its own."""
    images, lattice = noise_images(box_size_px, 8, device), Lattice(box_size_px, device=device)
    linear = torch.randn(8, maps, device=device)
    sums = NormalEquations(box_size_px, maps, device=device)
    weight = torch.ones(1, len(images.plane), device=device)
    sums.add(images, weight, linear, pack(linear[:, :, None] * linear[:, None]))
    start = time.perf_counter()
    back, normal = sums.complete(lattice)
    del sums
    solve(lattice, back, normal, torch.ones(maps, box_size_px // 2 + 1), iterations=CG_ITERATIONS)
    return time.perf_counter() - start


def network_step(maps: int) -> float:
    """Milliseconds an image of a training step of the network in the span of the maps."""
    rng = torch.Generator().manual_seed(0)
    root = torch.randn(4096, maps, 2 * maps, generator=rng)
    seen = Seen(
        features=torch.randn(4096, 2 * (maps - 1), generator=rng),
        gram=root @ root.mT,
        inner=torch.randn(4096, maps, generator=rng),
        power=torch.ones(4096),
        known=torch.zeros(4096),
        coefficients=1000,
    )
    vae = BasisVae(BasisConfig(components=maps - 1))
    optimiser = torch.optim.Adam(vae.parameters(), lr=1e-3)

    def steps() -> None:
        for _ in range(50):
            rows = torch.randint(4096, (BATCH_SIZE,), generator=rng)
            loss = -_elbo(vae, seen, rows, rng).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    with _one_thread():
        return 1e3 * seconds(steps) / (50 * BATCH_SIZE)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--boxes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--maps", type=int, default=7, help="mean and components")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--memory", type=int, metavar="BOX", help="only solve at this box: seconds, peak GiB")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        before = status_kib("VmRSS")
        taken = min(solved(options.memory, options.maps, options.device) for _ in range(2))
        peak = (status_kib("VmHWM") - before) / 2**20
        print(taken, torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else peak)
        return 0
    print(
        "| box (px) | sum, ms an image | 10⁹ multiply-adds a second | look, ms an image | 10⁹ a second "
        "| solve, s | peak GiB | by the formula |\n" + "|---" * 8 + "|"
    )
    k = options.maps
    pairs = k * (k + 1) // 2
    for box in options.boxes:
        summed, seen = passes(box, k, options.images, options.device)
        points = len(level_plane(box, box))
        words = [sys.executable, __file__, "--memory", str(box), "--maps", str(k)]
        words += ["--threads", str(options.threads), "--device", options.device]
        printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        took, peak = map(float, printed.split())
        to_sum, to_look = points * 8 * (2 * k + pairs), points * (16 * k + 2 * pairs)
        print(
            f"| {box} | {summed:.2f} | {to_sum / summed / 1e6:.2f} | {seen:.2f} | {to_look / seen / 1e6:.2f} "
            f"| {took:.2f} | {peak:.2f} | {required_bytes(box, k, CG_ITERATIONS) / 2**30:.2f} |"
        )
    print(f"\nNetwork step, {k - 1} components, batches of {BATCH_SIZE}: {network_step(k):.4f} ms an image")
    return 0


if __name__ == "__main__":
    sys.exit(main())
