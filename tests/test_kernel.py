"""Functions of a kernel, where images lie among landmarks, and the model that both make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cryodrgn_pipeline.io.checkpoints import load_model, save_model
from cryodrgn_pipeline.models.kernel import KernelFunctions, KernelModel
from cryodrgn_pipeline.subspace.basis import Seen
from cryodrgn_pipeline.subspace.kernel import _functions, placed


def circle(count: int, spread: float = 0.0) -> torch.Tensor:
    """Points near a circle in the plane, as a large rotation lays particles in a subspace."""
    rng = torch.Generator().manual_seed(1)
    angle = 2 * torch.pi * torch.rand(count, generator=rng).double()
    noise = spread * torch.randn(count, 2, generator=rng).double()
    return torch.stack([angle.cos(), angle.sin()], dim=1) + noise


def functions_of(z: torch.Tensor, most: int = 6) -> KernelFunctions:
    return KernelFunctions.of(z, z[:100], torch.full((z.shape[1],), 0.5).double(), most)


def images(factors: torch.Tensor, precision: float, seed: int = 0) -> Seen:
    """What images with these factors say about maps whose slices are random, at a signal-to-noise ratio."""
    rng = torch.Generator().manual_seed(seed)
    n, r = factors.shape
    slices = precision**0.5 * torch.randn(n, r, 50, generator=rng).double()
    image = (factors[:, None] @ slices)[:, 0] + torch.randn(n, 50, generator=rng).double()
    return Seen(
        features=torch.zeros(n, 1),
        gram=(slices @ slices.transpose(1, 2)).float(),
        inner=(slices @ image[..., None])[..., 0].float(),
        power=image.square().sum(1).float(),
        known=torch.linspace(0, 2, n),
        coefficients=50,
    )


def test_functions_have_mean_0_variance_1_and_no_correlation_and_come_by_falling_share() -> None:
    z = circle(400, 0.1)
    functions = functions_of(z)
    values = functions.at(z)
    assert values.shape == (400, 7)
    torch.testing.assert_close(values.T @ values / 400, torch.eye(7).double(), atol=1e-6, rtol=0)
    assert functions.share[0] == 1
    assert (functions.share.diff() <= 0).all()


def test_functions_bend_where_coordinates_cannot() -> None:
    z = circle(400)
    angle = torch.atan2(z[:, 1], z[:, 0])
    wanted = (2 * angle).cos()
    for known, least in (
        (functions_of(z).at(z), 0.98),
        (torch.nn.functional.pad(z, (1, 0), value=1.0), None),
    ):
        left = wanted - known @ torch.linalg.lstsq(known, wanted[:, None]).solution[:, 0]
        explained = 1 - float(left.var() / wanted.var())
        assert explained > least if least else explained < 0.05


def test_an_image_lies_where_its_likelihood_says_wherever_it_lay_before() -> None:
    z = circle(60)
    functions = KernelFunctions.of(z, z, torch.full((2,), 0.5).double(), 6)
    axes = torch.tensor([[1.0, 0.0], [0.0, 0.5]]).double()
    seen, elsewhere = images(functions.at(z), 1e4), z.roll(7, 0)
    found = placed(seen, elsewhere, functions, axes)
    torch.testing.assert_close(found.z, z @ axes, atol=1e-2, rtol=0)
    torch.testing.assert_close(found.factors, functions.at(z), atol=5e-2, rtol=0)


def test_between_landmarks_an_image_that_says_much_stays_at_its_own_place() -> None:
    z = circle(60)
    landmarks = z[::10]
    functions = KernelFunctions.of(z, landmarks, torch.ones(2).double(), 5)
    seen, axes = images(functions.at(z), 1e6), torch.eye(2).double()
    found = placed(seen, z, functions, axes, own=torch.arange(0, 60, 10))
    torch.testing.assert_close(found.z, z, atol=1e-3, rtol=0)


def test_the_posterior_is_that_of_bayes_under_equal_places() -> None:
    z = circle(30)
    functions = KernelFunctions.of(z, z[:20], torch.full((2,), 0.5).double(), 6)
    seen, place = images(functions.at(z), 0.02, seed=2), z + 0.1
    found = placed(seen, place, functions, torch.eye(2).double(), own=torch.arange(20))
    for i in (3, 25):  # a landmark, which is not asked at its landmark, and one that is none
        others = [m for m in range(20) if m != i]
        places = torch.cat([z[others], place[i : i + 1]])
        factors = functions.at(places)
        gram, inner = seen.gram[i].double(), seen.inner[i].double()
        gain = torch.stack([f @ inner - f @ gram @ f / 2 for f in factors])
        weight = gain.exp() / gain.exp().sum()
        mean = weight @ places
        torch.testing.assert_close(found.z[i], mean)
        spread = torch.einsum("m,mj,mk->jk", weight, places - mean, places - mean)
        torch.testing.assert_close(found.covariance[i], spread, atol=2e-6, rtol=0)
        torch.testing.assert_close(found.factors[i], weight @ factors)
        expected = gain.exp().sum().log() - np.log(20) + seen.known[i] / 2
        torch.testing.assert_close(found.evidence[i], expected)


def test_a_model_is_stored_whole(tmp_path: Path) -> None:
    z = circle(120)
    functions = functions_of(z)
    rng = torch.Generator().manual_seed(5)
    model = KernelModel(
        maps=torch.randn(4, 8, 8, 8, generator=rng),
        functions=functions,
        turn=torch.randn(7, 4, generator=rng).double(),
        placing=functions_of(circle(120, 0.2)),
        axes=torch.eye(2).double(),
        latent_dim=3,
        pixel_size_a=5.0,
    )
    save_model(tmp_path / "model.safetensors", model)
    again = load_model(tmp_path / "model.safetensors")
    assert isinstance(again, KernelModel)
    assert (again.latent_dim, again.pixel_size_a, again.coordinates) == (3, 5.0, 2)
    point = torch.tensor([0.4, -0.8, 9.0])  # the third coordinate carries nothing
    torch.testing.assert_close(again.density(point, 8), model.density(point, 8))
    expected = torch.tensordot((functions.at(point[None, :2]) @ model.turn)[0].float(), model.maps, dims=1)
    torch.testing.assert_close(model.density(point, 8), expected)
    far = model.factors(torch.full((1, 3), 1e6))
    assert np.isfinite(far.numpy()).all()


@pytest.mark.parametrize("most", [1, 4])
def test_no_more_functions_than_asked_for(most: int) -> None:
    assert len(functions_of(circle(200), most)) == most


@pytest.mark.parametrize(("std", "expected"), [(0.001, 1.0), (0.5, 2.0)])
def test_a_kernel_is_at_least_as_wide_as_the_particles_lie(std: float, expected: float) -> None:
    z = circle(400)
    z = z / z.std(0)
    rows = torch.arange(400)
    functions = _functions(z, torch.full_like(z, std**2), rows[:100], rows, 5)
    torch.testing.assert_close(functions.width, torch.full((2,), expected).double(), atol=1e-6, rtol=0)
