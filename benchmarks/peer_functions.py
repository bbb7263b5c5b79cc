"""What cryoDRGN's own functions make of a set: run inside cryoDRGN's environment by compare_cryodrgn.py.

Calls public functions of the installed package only, and writes plain arrays to OUT.npz.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from cryodrgn import fft
from cryodrgn.ctf import compute_ctf, load_ctf_for_training
from cryodrgn.dataset import ImageDataset
from cryodrgn.lattice import Lattice
from cryodrgn.pose import PoseTracker
from cryodrgn.source import ImageSource


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("star", type=Path)
    parser.add_argument("--poses", type=Path, required=True)
    parser.add_argument("--ctf", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    star, datadir, rows = str(arguments.star), str(arguments.star.parent), arguments.rows
    raw = torch.as_tensor(ImageSource.from_file(star, datadir=datadir).images(np.array(rows)))
    box = raw.shape[-1]
    side = box + 1  # their transforms repeat the Nyquist edge
    table = np.asarray(load_ctf_for_training(box, str(arguments.ctf)), dtype=np.float64)
    poses = PoseTracker.load(str(arguments.poses), len(table), box)
    rotation, translation_px = poses.get_pose(torch.arange(len(table)))
    lattice = Lattice(side)

    transfer = []
    for row in rows:
        pixel_size_a, *columns = (torch.tensor([value]) for value in table[row].tolist())
        transfer.append(compute_ctf(lattice.freqs2d / pixel_size_a, *columns).reshape(side, side))

    def prepared(*, window: bool) -> torch.Tensor:
        data = ImageDataset(star, lazy=False, norm=(0, 1), invert_data=False, window=window, datadir=datadir)
        return torch.stack([torch.as_tensor(data[row]["y"]).reshape(side, side) for row in rows])

    plain = prepared(window=False)
    shift = translation_px[rows].reshape(len(rows), 1, 2)
    centred = lattice.translate_ht(plain.reshape(len(rows), -1), shift).reshape(len(rows), side, side)
    np.savez(
        arguments.out,
        rotation=rotation.numpy(),
        translation_px=translation_px.numpy(),
        ctf_table=table,
        ctf=torch.stack(transfer).numpy(),
        hartley=fft.ht2_center(raw).numpy(),
        windowed=prepared(window=True).numpy(),
        centred=centred.numpy(),
    )


if __name__ == "__main__":
    main()
