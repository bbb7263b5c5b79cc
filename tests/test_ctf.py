"""The CTF against its closed form, written out independently here."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from cryodrgn_pipeline.fourier.ctf import ctf, electron_wavelength_a


def closed_form(kx, ky, du, dv, angle_deg, kv, cs_mm, w, phase_deg):
    volts = kv * 1e3
    wavelength = 12.2639 / math.sqrt(volts + 0.97845e-6 * volts**2)
    s2 = kx**2 + ky**2
    theta = np.arctan2(ky, kx) - math.radians(angle_deg)
    defocus = 0.5 * (du + dv + (du - dv) * np.cos(2 * theta))
    gamma = 2 * math.pi * (-0.5 * defocus * wavelength * s2 + 0.25 * cs_mm * 1e7 * wavelength**3 * s2**2)
    gamma -= math.radians(phase_deg)
    return -(math.sqrt(1 - w**2) * np.sin(gamma) - w * np.cos(gamma))


def evaluate(kx, ky, du, dv, angle_deg, kv, cs_mm, w, phase_deg):
    def one(value):
        return torch.tensor([value], dtype=torch.float64)

    return ctf(
        torch.from_numpy(ky),
        torch.from_numpy(kx),
        defocus_u_a=one(du),
        defocus_v_a=one(dv),
        defocus_angle_deg=one(angle_deg),
        voltage_kv=one(kv),
        cs_mm=one(cs_mm),
        amplitude_contrast=one(w),
        phase_shift_deg=one(phase_deg),
    )[0].numpy()


@given(
    du=st.floats(-5e3, 5e4),
    dv=st.floats(-5e3, 5e4),
    angle=st.floats(-180, 180),
    kv=st.sampled_from([100.0, 200.0, 300.0]),
    cs=st.floats(0.001, 3),
    w=st.floats(0, 0.3),
    phase=st.floats(0, 180),
)
def test_the_ctf_equals_its_closed_form_also_when_u_is_below_v(du, dv, angle, kv, cs, w, phase):
    k = np.random.default_rng(0).uniform(-0.25, 0.25, (2, 50))
    np.testing.assert_allclose(
        evaluate(*k, du, dv, angle, kv, cs, w, phase),
        closed_form(*k, du, dv, angle, kv, cs, w, phase),
        atol=1e-9,
    )


def test_the_ctf_at_zero_frequency_is_the_amplitude_contrast_in_relions_sign():
    zero = np.zeros(1)
    np.testing.assert_allclose(evaluate(zero, zero, 1.5e4, 1.4e4, 20.0, 300.0, 2.7, 0.07, 0.0), [0.07])


def test_underfocus_starts_positive():
    k = np.linspace(0.005, 0.02, 10)
    assert (evaluate(k, 0 * k, 1.5e4, 1.5e4, 0.0, 300.0, 2.7, 0.07, 0.0) > 0).all()


def test_the_defocus_angle_turns_from_x_towards_y():
    du, dv, angle = 2e4, 1e4, 30.0
    along = np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle))]) * 0.05
    seen = evaluate(along[:1], along[1:], du, dv, angle, 300.0, 2.7, 0.1, 0.0)
    round_u = evaluate(np.array([0.05]), np.array([0.0]), du, du, 0.0, 300.0, 2.7, 0.1, 0.0)
    np.testing.assert_allclose(seen, round_u, atol=1e-9)


def test_the_wavelength_at_300_kv_is_the_tabulated_one():
    torch.testing.assert_close(
        electron_wavelength_a(torch.tensor([300.0], dtype=torch.float64)),
        torch.tensor([0.019687], dtype=torch.float64),
        atol=1e-6,
        rtol=0,
    )
