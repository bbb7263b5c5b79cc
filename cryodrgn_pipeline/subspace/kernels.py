"""CPU kernels of the subspace: the same sums as `sums.py` makes with torch, compiled.

Imported only where they are used: loading numba and the compiled kernels costs about a second. Symmetric
K × K matrices are packed by rows of the lower triangle, (0,0) (1,0) (1,1) (2,0) …, everywhere.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from cryodrgn_pipeline.reconstruct_kernels import _corner


@njit(cache=True, fastmath=True, parallel=True)
def splat(  # type: ignore[no-untyped-def]
    right, normal, size, slab_edges, linear, second, rotation, scale, kx, ky, image, ctf, weight, group
):
    """Add Σ w c a y to `right` and Σ w c² S to `normal`; no two threads write the same plane.

    `right` `(G, 2K)` float32, K real then K imaginary parts; `normal` `(G, K(K+1)/2)`, G = E·E·(E/2+1) grid
    points; `slab_edges` `(T+1,)` planes of kz in FFT order shifted by E/2; `scale` `(B,)` padding times
    volume over image pixel size; `image` `(B, P)` complex64; `weight` `(groups, P)`, `group` `(B,)`;
    `linear` `(B, K)` the factor of each map in each image, `second` `(B, K(K+1)/2)` its second moments.
    """
    half, stride = size // 2, size // 2 + 1
    maps, pairs, one = linear.shape[1], second.shape[1], np.float32(1)
    for slab in prange(slab_edges.shape[0] - 1):
        lowest, highest = slab_edges[slab] - half, slab_edges[slab + 1] - half
        value = np.empty(2 * maps, np.float32)
        square = np.empty(pairs, np.float32)
        for i in range(image.shape[0]):
            turn, zoom, of_group = rotation[i], scale[i], group[i]
            for p in range(kx.shape[0]):
                x0, y0, z0, fx, fy, fz, side = _corner(kx[p], ky[p], turn, zoom)
                if z0 + 1 < lowest or z0 >= highest:
                    continue
                if max(x0, y0, z0) + 1 >= half or min(y0, z0) <= -half:
                    continue
                cw = ctf[i, p] * weight[of_group, p]
                real, imaginary, c2w = cw * image[i, p].real, side * cw * image[i, p].imag, cw * ctf[i, p]
                for j in range(maps):
                    value[j] = real * linear[i, j]
                    value[maps + j] = imaginary * linear[i, j]
                for j in range(pairs):
                    square[j] = c2w * second[i, j]
                for dz in range(2):
                    zz = z0 + dz
                    if zz < lowest or zz >= highest:
                        continue
                    wz = fz if dz else one - fz
                    zz = zz + size if zz < 0 else zz
                    for dy in range(2):
                        wy = wz * (fy if dy else one - fy)
                        yy = y0 + dy
                        yy = yy + size if yy < 0 else yy
                        for dx in range(2):
                            w = wy * (fx if dx else one - fx)
                            at = (zz * size + yy) * stride + x0 + dx
                            for j in range(2 * maps):
                                right[at, j] += w * value[j]
                            for j in range(pairs):
                                normal[at, j] += w * square[j]


@njit(cache=True, fastmath=True, parallel=True)
def inner_products(  # type: ignore[no-untyped-def]
    grids, size, gram, inner, power, rotation, scale, kx, ky, image, ctf, weight, group
):
    """Inner products of each image's K CTF-filtered slices with each other, with the image, and its power.

    `grids` `(G, 2K)` float32, K real then K imaginary parts; out: `gram` `(B, K(K+1)/2)`, `inner` `(B, K)`,
    `power` `(B,)`. The rest as in `splat`.
    """
    half, stride, maps, one = size // 2, size // 2 + 1, grids.shape[1] // 2, np.float32(1)
    for i in prange(image.shape[0]):
        turn, zoom, of_group = rotation[i], scale[i], group[i]
        sample = np.empty(2 * maps, np.float32)
        products = np.zeros(gram.shape[1], np.float32)
        against = np.zeros(maps, np.float32)
        total = 0.0
        for p in range(kx.shape[0]):
            x0, y0, z0, fx, fy, fz, side = _corner(kx[p], ky[p], turn, zoom)
            w_noise = weight[of_group, p]
            real, imaginary = image[i, p].real, side * image[i, p].imag
            total += w_noise * (real * real + imaginary * imaginary)
            if max(x0, y0, z0) + 1 >= half or min(y0, z0) <= -half:
                continue
            sample[:] = 0
            for dz in range(2):
                wz = fz if dz else one - fz
                zz = z0 + dz
                zz = zz + size if zz < 0 else zz
                for dy in range(2):
                    w = wz * (fy if dy else one - fy)
                    yy = y0 + dy
                    yy = yy + size if yy < 0 else yy
                    w0, w1 = w * (one - fx), w * fx
                    at = (zz * size + yy) * stride + x0
                    for j in range(2 * maps):
                        sample[j] += w0 * grids[at, j] + w1 * grids[at + 1, j]
            cw = ctf[i, p] * w_noise
            c2w, n = cw * ctf[i, p], 0
            for j in range(maps):
                against[j] += cw * (sample[j] * real + sample[maps + j] * imaginary)
                a, b = c2w * sample[j], c2w * sample[maps + j]
                for k in range(j + 1):
                    products[n] += a * sample[k] + b * sample[maps + k]
                    n += 1
        gram[i], inner[i], power[i] = products, against, total


@njit(cache=True, fastmath=True, parallel=True)
def apply_packed(packed, spectra, out):  # type: ignore[no-untyped-def]
    """Multiply `(K, G)` complex spectra by a packed symmetric matrix `(G, K(K+1)/2)` at each point."""
    maps = spectra.shape[0]
    for g in prange(spectra.shape[1]):
        n = 0
        for j in range(maps):
            out[j, g] = 0
            for k in range(j):
                out[j, g] += packed[g, n] * spectra[k, g]
                out[k, g] += packed[g, n] * spectra[j, g]
                n += 1
            out[j, g] += packed[g, n] * spectra[j, g]
            n += 1


@njit(cache=True, parallel=True)
def invert_packed(packed, ridge, shell, out):  # type: ignore[no-untyped-def]
    """Inverses of packed positive `(G, K(K+1)/2)` with `ridge[shell[g]]` `(S, K)` on the diagonal."""
    maps = ridge.shape[1]
    for g in prange(packed.shape[0]):
        low = np.zeros((maps, maps))
        inverse = np.zeros((maps, maps))
        n = 0
        for j in range(maps):  # Cholesky factor, row by row
            for k in range(j + 1):
                value = float(packed[g, n])
                n += 1
                if j == k:
                    value = max(value, 0.0) + ridge[shell[g], j]
                for m in range(k):
                    value -= low[j, m] * low[k, m]
                if j == k:
                    low[j, j] = np.sqrt(max(value, 1e-6 * ridge[shell[g], j]))
                else:
                    low[j, k] = value / low[k, k]
        for j in range(maps):  # its inverse
            inverse[j, j] = 1 / low[j, j]
            for k in range(j):
                value = 0.0
                for m in range(k, j):
                    value -= low[j, m] * inverse[m, k]
                inverse[j, k] = value / low[j, j]
        n = 0
        for j in range(maps):
            for k in range(j + 1):
                value = 0.0
                for m in range(j, maps):
                    value += inverse[m, j] * inverse[m, k]
                out[g, n] = value
                n += 1
