"""Functions of a kernel, where images lie among landmarks, and the model that both make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cryodrgn_pipeline.io.checkpoints import load_model, save_model
from cryodrgn_pipeline.models.kernel import KernelFunctions, KernelModel, Landmarks
from cryodrgn_pipeline.subspace.basis import Seen
from cryodrgn_pipeline.subspace.kernel import placed


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


def test_an_image_lies_where_its_likelihood_says_and_never_on_itself() -> None:
    z = circle(60)
    landmarks = Landmarks(z=z, factors=functions_of(z).at(z))
    sure = placed(images(landmarks.factors, 1e4), landmarks)
    torch.testing.assert_close(sure.z, z, atol=1e-2, rtol=0)
    torch.testing.assert_close(sure.factors, landmarks.factors, atol=5e-2, rtol=0)
    itself = placed(images(landmarks.factors, 1e4), landmarks, own=torch.arange(60))
    distance = torch.cdist(z, z).fill_diagonal_(torch.inf).min(1).values
    assert ((itself.z - z).norm(dim=1) > 0.5 * distance).all()


def test_the_posterior_is_that_of_bayes_under_equal_landmarks() -> None:
    z = circle(30)
    landmarks = Landmarks(z=z, factors=functions_of(z).at(z))
    seen = images(landmarks.factors[:5], 0.02, seed=2)
    found = placed(seen, landmarks)
    for i in range(5):
        gram, inner = seen.gram[i].double(), seen.inner[i].double()
        gain = torch.stack([f @ inner - f @ gram @ f / 2 for f in landmarks.factors])
        weight = gain.exp() / gain.exp().sum()
        mean = weight @ z
        torch.testing.assert_close(found.z[i], mean)
        spread = torch.einsum("m,mj,mk->jk", weight, z - mean, z - mean)
        torch.testing.assert_close(found.covariance[i], spread, atol=2e-6, rtol=0)
        torch.testing.assert_close(found.factors[i], weight @ landmarks.factors)
        torch.testing.assert_close(found.evidence[i], gain.exp().mean().log() + seen.known[i] / 2)


def test_a_model_is_stored_whole(tmp_path: Path) -> None:
    z = circle(120)
    functions = functions_of(z)
    rng = torch.Generator().manual_seed(5)
    model = KernelModel(
        maps=torch.randn(4, 8, 8, 8, generator=rng),
        functions=functions,
        turn=torch.randn(7, 4, generator=rng).double(),
        landmarks=Landmarks(z=z.clone(), factors=functions.at(z)),
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
