"""Encoder, decoder and VAE: sizes that are known, symmetries that must hold, work that is not done twice."""

import pytest
import torch

from cryodrgn_pipeline.fourier.transforms import half_plane, half_plane_coefficients, hartley, symmetrise
from cryodrgn_pipeline.models.encoder import ImageEncoder
from cryodrgn_pipeline.models.layers import HiddenLayers
from cryodrgn_pipeline.models.positional import PositionalEncoding
from cryodrgn_pipeline.models.vae import Vae, VaeConfig
from cryodrgn_pipeline.training.losses import kl_divergence, reconstruction


def n_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_published_architecture_has_the_published_number_of_parameters():
    vae = Vae(VaeConfig(box_size_px=128))
    assert n_parameters(vae.encoder) == pytest.approx(16.3e6, rel=0.01)
    assert n_parameters(vae.decoder) == pytest.approx(3.55e6, rel=0.01)


def test_the_encoder_reads_the_hartley_values_of_the_whole_disc():
    images = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    plane = half_plane(16, 7)
    encoder = ImageEncoder(len(plane), 1, width=1, depth=0, residual=False)
    seen = []
    encoder.first.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    encoder(half_plane_coefficients(images, plane))
    lattice = symmetrise(hartley(images))
    here = lattice[:, plane.ky + 8, plane.kx + 8]
    opposite = lattice[:, 8 - plane.ky, 8 - plane.kx]
    torch.testing.assert_close(seen[0], torch.cat([here, opposite], dim=1), atol=1e-4, rtol=1e-4)


def test_a_residual_layer_adds_its_input():
    x = torch.rand(3, 4)
    layers = HiddenLayers(4, 1, residual=True)
    torch.nn.init.zeros_(layers.layers[0].weight)
    torch.nn.init.zeros_(layers.layers[0].bias)
    torch.testing.assert_close(layers(x), x)


def test_gaussian_and_geometric_encodings_have_three_d_features_and_known_frequencies():
    generator = torch.Generator().manual_seed(0)
    gaussian = PositionalEncoding(64, "gaussian", generator)
    geometric = PositionalEncoding(64, "geometric", generator)
    assert gaussian.n_features == geometric.n_features == 192
    assert gaussian.frequencies.std() == pytest.approx(0.5 * 32, rel=0.1)
    assert geometric.frequencies.max() == pytest.approx(32)
    assert geometric.frequencies[geometric.frequencies > 0].min() == pytest.approx(1)
    k = torch.tensor([[0.1, -0.2, 0.3]])
    features = geometric(k)
    torch.testing.assert_close(features[0, :96] ** 2 + features[0, 96:] ** 2, torch.ones(96))


def test_the_split_first_layer_equals_one_layer_over_coordinate_and_latent():
    vae = Vae(VaeConfig(box_size_px=8, latent_dim=3, decoder_width=5, encoder_width=5))
    decoder = vae.decoder
    coordinates, z = torch.rand(2, 7, 3) - 0.5, torch.randn(2, 3)
    joint = torch.cat([decoder.encoding(coordinates), z[:, None].expand(-1, 7, -1)], dim=-1)
    weight = torch.cat([decoder.coordinate_weight, decoder.latent_part.weight], dim=1)
    x = torch.relu(joint @ weight.T + decoder.latent_part.bias)
    expected = torch.view_as_complex(decoder.last(decoder.hidden(x)))
    torch.testing.assert_close(decoder(coordinates, z), expected)


def test_the_hartley_decoder_is_friedel_symmetric_by_construction():
    vae = Vae(VaeConfig(box_size_px=8, latent_dim=2, decoder_width=8, encoder_width=8, domain="hartley"))
    k, z = torch.rand(2, 9, 3) - 0.5, torch.randn(2, 2)
    torch.testing.assert_close(vae.decoder(k, z), vae.decoder(-k, z).conj())


def test_the_loss_is_the_mean_squared_error_of_hartley_values_over_the_disc():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 16, 16, generator=generator)
    plane = half_plane(16, 7)
    k = torch.cat([plane.ky, -plane.ky]) + 8, torch.cat([plane.kx, -plane.kx]) + 8
    difference = (symmetrise(hartley(a)) - symmetrise(hartley(b)))[:, k[0], k[1]]
    torch.testing.assert_close(
        reconstruction(half_plane_coefficients(a, plane), half_plane_coefficients(b, plane)),
        (difference**2).mean(1),
    )


def test_the_kl_divergence_agrees_with_torch_distributions():
    mean, log_variance = torch.randn(4, 3), torch.randn(4, 3)
    posterior = torch.distributions.Normal(mean, torch.exp(0.5 * log_variance))
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(kl_divergence(mean, log_variance), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"encoder_type": "conv"},
        {"decoder_type": "conv"},
        {"positional_encoding": "none"},
        {"domain": "real"},
        {"mask_radius": 1.5},
        {"mask_radius": 0.2},
        {"encoder_mask_radius": 1.2},
        {"encoder_input": "real"},
        {"encoder_filter": "none"},
        {"loss": "coloured"},
        {"encoder": "basis"},
        {"decoder": "subspace"},
    ],
)
def test_an_unknown_architecture_is_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        VaeConfig(box_size_px=8, **wrong)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = Vae(VaeConfig(box_size_px=8, encoder_width=4, decoder_width=4, seed=3)).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    second = Vae(VaeConfig(box_size_px=8, encoder_width=4, decoder_width=4, seed=3)).state_dict()
    other = Vae(VaeConfig(box_size_px=8, encoder_width=4, decoder_width=4, seed=4)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["decoder.coordinate_weight"], other["decoder.coordinate_weight"])
