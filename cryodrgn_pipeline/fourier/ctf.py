"""The contrast transfer function in RELION's sign: CTF(0) = +amplitude contrast, positive for underfocus."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def electron_wavelength_a(voltage_kv: Tensor) -> Tensor:
    """Relativistic electron wavelength in Å for an acceleration voltage in kV."""
    volts = voltage_kv * 1e3
    return 12.2639 / torch.sqrt(volts + 0.97845e-6 * volts**2)


def ctf(
    ky_per_a: Tensor,
    kx_per_a: Tensor,
    *,
    defocus_u_a: Tensor,
    defocus_v_a: Tensor,
    defocus_angle_deg: Tensor,
    voltage_kv: Tensor,
    cs_mm: Tensor,
    amplitude_contrast: Tensor,
    phase_shift_deg: Tensor,
) -> Tensor:
    """CTF at spatial frequencies, by the weak-phase formula that RELION and CTFFIND4 share.

    Parameters
    ----------
    ky_per_a, kx_per_a
        `(P,)` or `(B, P)` frequency components along image rows (y) and columns (x), in 1/Å.
    defocus_u_a, defocus_v_a, defocus_angle_deg
        `(B,)` defocus along the two principal axes in Å (positive is underfocus) and the angle of the
        first from the x axis in degrees.
    voltage_kv, cs_mm, amplitude_contrast, phase_shift_deg
        `(B,)` kV, mm, fraction, degrees.

    Returns
    -------
    `(B, P)`: √(1−w²) sin(−γ) + w cos γ, with
    γ = 2π(−½ Δf(θ) λ s² + ¼ Cs λ³ s⁴) − φ and Δf(θ) = ½(Δu + Δv + (Δu − Δv) cos 2(θ − θ_ast)).
    """

    def column(value: Tensor) -> Tensor:
        return value[..., None]

    wavelength = electron_wavelength_a(column(voltage_kv))
    axis = column(torch.deg2rad(defocus_angle_deg)) * 2
    squared = ky_per_a**2 + kx_per_a**2
    # cos 2(θ − θ_ast) s², without an arctangent: a quadratic form in (kx, ky)
    astigmatic = torch.cos(axis) * (kx_per_a**2 - ky_per_a**2) + torch.sin(axis) * (2 * kx_per_a * ky_per_a)
    mean, difference = column(defocus_u_a + defocus_v_a) / 2, column(defocus_u_a - defocus_v_a) / 2
    spherical = column(cs_mm) * 1e7
    gamma = (
        -math.pi * wavelength * (mean * squared + difference * astigmatic)
        + math.pi / 2 * spherical * wavelength**3 * squared**2
        - torch.deg2rad(column(phase_shift_deg))
    )
    w = column(amplitude_contrast)
    return w * torch.cos(gamma) - torch.sqrt(1 - w**2) * torch.sin(gamma)
