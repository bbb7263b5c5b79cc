"""CPU kernels of `particle_volumes_sums`: the same sums as fourier.slices, on the points of a ball, compiled.

Imported only where they are used: loading numba and the compiled kernels costs about a second.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from cryodrgn_pipeline.reconstruct_kernels import _corner


@njit(cache=True, fastmath=True, parallel=True)
def splat_cells(cells, starts, slab_edges, cell, rotation, scale, kx, ky, values):  # type: ignore[no-untyped-def]
    """Add the values of images to cells of sums; no two threads write the same plane of a cell.

    `cells` `(C, V, M)` float32 and `starts` `(E, E)` of a `Ball`; `slab_edges` `(S+1,)` planes of kz in FFT
    order shifted by E/2; `cell` `(B, T)` the T cells that an image goes to, −1 for none, and never the same
    one in two columns; `scale` `(B,)` padding times volume over image pixel size; `values` `(B, P, M)`
    float32, of which number 1 and 4 are imaginary parts.
    """
    size, numbers = starts.shape[0], cells.shape[2]
    half, one = size // 2, np.float32(1)
    slabs = slab_edges.shape[0] - 1
    for task in prange(cell.shape[1] * slabs):
        column, slab = task // slabs, task % slabs
        lowest, highest = slab_edges[slab] - half, slab_edges[slab + 1] - half
        value = np.empty(numbers, np.float32)
        for i in range(values.shape[0]):
            if cell[i, column] < 0:
                continue
            sums = cells[cell[i, column]].reshape(-1)
            turn, zoom = rotation[i], scale[i]
            for p in range(kx.shape[0]):
                x0, y0, z0, fx, fy, fz, side = _corner(kx[p], ky[p], turn, zoom)
                if z0 + 1 < lowest or z0 >= highest:
                    continue
                if max(x0, y0, z0) + 1 >= half or min(y0, z0) <= -half:
                    continue
                if (x0 + fx) ** 2 + (y0 + fy) ** 2 + (z0 + fz) ** 2 > half * half:
                    continue
                for v in range(numbers):
                    value[v] = values[i, p, v]
                value[1] *= side
                if numbers > 4:
                    value[4] *= side
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
                        at = (starts[zz, yy] + x0) * numbers
                        for v in range(numbers):
                            sums[at + v] += w0 * value[v]
                            sums[at + numbers + v] += w1 * value[v]


@njit(cache=True, fastmath=True, parallel=True)
def combine_slices(grids, starts, factors, rotation, scale, kx, ky, out):  # type: ignore[no-untyped-def]
    """Σⱼ factorⱼ · slice of grid j for each image, into `out` `(B, P)` complex64; factors of 0 cost nothing.

    `grids` `(K, V)` complex64; `factors` `(B, K)`; the rest as in `splat_cells`.
    """
    size = starts.shape[0]
    half, one = size // 2, np.float32(1)
    for i in prange(out.shape[0]):
        turn, zoom = rotation[i], scale[i]
        used = np.flatnonzero(factors[i])
        for p in range(kx.shape[0]):
            out[i, p] = 0
            x0, y0, z0, fx, fy, fz, side = _corner(kx[p], ky[p], turn, zoom)
            if max(x0, y0, z0) + 1 >= half or min(y0, z0) <= -half:
                continue
            if (x0 + fx) ** 2 + (y0 + fy) ** 2 + (z0 + fz) ** 2 > half * half:
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
                    at = starts[zz, yy] + x0
                    for j in used:
                        a, b = grids[j, at], grids[j, at + 1]
                        u = w * factors[i, j]
                        real += u * ((one - fx) * a.real + fx * b.real)
                        imaginary += u * ((one - fx) * a.imag + fx * b.imag)
            out[i, p] = real + 1j * (side * imaginary)
