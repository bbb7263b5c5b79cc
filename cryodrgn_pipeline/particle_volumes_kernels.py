"""CPU kernels of `particle_volumes_sums`: the same sums as fourier.slices, compiled.

Imported only where they are used: loading numba and the compiled kernels costs about a second.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from cryodrgn_pipeline.reconstruct_kernels import _corner


@njit(cache=True, fastmath=True, parallel=True)
def splat_cells(grids, slab_edges, cell, rotation, scale, kx, ky, values):  # type: ignore[no-untyped-def]
    """Add the values of images to one grid for each of T targets; no two threads write the same plane.

    `grids` `(T, C, E, E, E/2+1, V)` float32; `slab_edges` `(S+1,)` planes of kz in FFT order shifted by E/2;
    `cell` `(B, T)` which of a target's C grids an image goes to, −1 for none; `scale` `(B,)` padding times
    volume over image pixel size; `values` `(B, P, V)` float32, of which number 1 and 3 are imaginary parts.
    """
    size, kinds = grids.shape[2], grids.shape[5]
    half, stride, one = size // 2, size // 2 + 1, np.float32(1)
    slabs = slab_edges.shape[0] - 1
    for task in prange(grids.shape[0] * slabs):
        target, slab = task // slabs, task % slabs
        lowest, highest = slab_edges[slab] - half, slab_edges[slab + 1] - half
        value = np.empty(kinds, np.float32)
        for i in range(values.shape[0]):
            if cell[i, target] < 0:
                continue
            grid = grids[target, cell[i, target]].reshape(-1)
            turn, zoom = rotation[i], scale[i]
            for p in range(kx.shape[0]):
                x0, y0, z0, fx, fy, fz, side = _corner(kx[p], ky[p], turn, zoom)
                if z0 + 1 < lowest or z0 >= highest:
                    continue
                if max(x0, y0, z0) + 1 >= half or min(y0, z0) <= -half:
                    continue
                for v in range(kinds):
                    value[v] = values[i, p, v]
                value[1] *= side
                value[3] *= side
                for dz in range(2):
                    zz = z0 + dz
                    if zz < lowest or zz >= highest:
                        continue
                    wz = fz if dz else one - fz
                    zz = zz + size if zz < 0 else zz
                    for dy in range(2):
                        w = wz * (fy if dy else one - fy)
                        yy = y0 + dy
                        yy = yy + size if yy < 0 else yy
                        w0, w1 = w * (one - fx), w * fx
                        at = ((zz * size + yy) * stride + x0) * kinds
                        for v in range(kinds):
                            grid[at + v] += w0 * value[v]
                            grid[at + kinds + v] += w1 * value[v]


@njit(cache=True, fastmath=True, parallel=True)
def combine_slices(grids, factors, rotation, scale, kx, ky, out):  # type: ignore[no-untyped-def]
    """Σⱼ factorⱼ · slice of grid j for each image, into `out` `(B, P)` complex64; factors of 0 cost nothing.

    `grids` `(K, E, E, E/2+1)` complex64; `factors` `(B, K)`; the rest as in `splat_cells`.
    """
    size = grids.shape[1]
    half, one = size // 2, np.float32(1)
    for i in prange(out.shape[0]):
        turn, zoom = rotation[i], scale[i]
        used = np.flatnonzero(factors[i])
        for p in range(kx.shape[0]):
            out[i, p] = 0
            x0, y0, z0, fx, fy, fz, side = _corner(kx[p], ky[p], turn, zoom)
            if max(x0, y0, z0) + 1 >= half or min(y0, z0) <= -half:
                continue
            real, imaginary = np.float32(0), np.float32(0)
            for dz in range(2):
                wz = fz if dz else one - fz
                zz = z0 + dz
                zz = zz + size if zz < 0 else zz
                for dy in range(2):
                    w = wz * (fy if dy else one - fy)
                    yy = y0 + dy
                    yy = yy + size if yy < 0 else yy
                    for j in used:
                        a, b = grids[j, zz, yy, x0], grids[j, zz, yy, x0 + 1]
                        u = w * factors[i, j]
                        real += u * ((one - fx) * a.real + fx * b.real)
                        imaginary += u * ((one - fx) * a.imag + fx * b.imag)
            out[i, p] = real + 1j * (side * imaginary)
