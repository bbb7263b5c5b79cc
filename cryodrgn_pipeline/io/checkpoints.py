"""Weights in safetensors with the architecture beside them; resume state without pickled objects."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.atomic import replacing
from cryodrgn_pipeline.models.basis import BasisConfig, BasisModel, BasisVae
from cryodrgn_pipeline.models.linear import LinearModel
from cryodrgn_pipeline.models.vae import Vae, VaeConfig, decoded_density

MODEL_FILE = "model.safetensors"
VAE, LINEAR, BASIS = (f"cryodrgn_pipeline.{kind}.1" for kind in ("vae", "linear", "basis"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """A model with what its numbers mean: `scale` is the σ by which coefficients were divided."""

    vae: Vae
    scale: float
    pixel_size_a: float

    @property
    def box_size_px(self) -> int:
        """Box of the images the model was trained on."""
        return self.vae.config.box_size_px

    @property
    def latent_dim(self) -> int:
        """Size of z."""
        return self.vae.config.latent_dim

    def density(self, z: torch.Tensor, box_size_px: int) -> torch.Tensor:
        """The map at z `(latent_dim,)` in the grey scale of the images: `(d, d, d)` float32 on the CPU."""
        coarser = (box_size_px / self.box_size_px) ** 3
        return decoded_density(self.vae, z, box_size_px) * (self.scale * coarser)


Model = TrainedModel | LinearModel | BasisModel


def save_model(path: Path, model: Model) -> None:
    """Write weights or maps and, as JSON metadata, what they belong to, atomically."""
    if isinstance(model, TrainedModel):
        tensors = model.vae.state_dict()
        meta = {"format": VAE, "config": json.dumps(model.vae.config.as_dict()), "scale": repr(model.scale)}
    elif isinstance(model, LinearModel):
        tensors = {"maps": model.maps, "spread": model.spread}
        config = {"latent_dim": model.latent_dim, "curved": model.curved}
        meta = {"format": LINEAR, "config": json.dumps(config)}
    else:
        tensors = {"maps": model.maps, "turn": model.turn}
        tensors |= {f"vae.{name}": value for name, value in model.vae.state_dict().items()}
        meta = {"format": BASIS, "config": json.dumps(model.vae.config.as_dict())}
    meta["pixel_size_a"] = repr(model.pixel_size_a)
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(plain, metadata=meta))


def load_model(run: Path, device: str | torch.device = "cpu") -> Model:
    """The model of a run folder, or of one weights file, in evaluation mode on `device`.

    Raises `InputFormatError` when the file is missing, damaged or of another kind.
    """
    path = Path(run)
    path = path / MODEL_FILE if path.is_dir() else path
    if not path.is_file():
        raise InputFormatError(
            f"{path}: no trained model. Expected the output of `train`; if training was interrupted, "
            "run the same `train` command with --resume."
        )
    try:
        with safe_open(path, framework="pt") as stored:
            meta = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (no dict)
    except SafetensorError as error:
        raise InputFormatError(f"{path}: not a readable safetensors file ({error}). Train again.") from error
    if meta.get("format") not in (VAE, LINEAR, BASIS):
        known = f"{VAE!r}, {LINEAR!r} or {BASIS!r}"
        raise InputFormatError(f"{path}: format {meta.get('format')!r}, expected {known}.")
    config, pixel_size_a = json.loads(meta["config"]), float(meta["pixel_size_a"])
    if meta["format"] == LINEAR:
        on_device = {name: value.to(device) for name, value in tensors.items()}
        return LinearModel(**on_device, pixel_size_a=pixel_size_a, **config)
    if meta["format"] == BASIS:
        basis = BasisVae(BasisConfig(**config))
        weights = {name.removeprefix("vae."): v for name, v in tensors.items() if name.startswith("vae.")}
        basis.load_state_dict(weights)
        maps, turn = tensors["maps"].to(device), tensors["turn"].to(device)
        return BasisModel(vae=basis.to(device).eval(), maps=maps, turn=turn, pixel_size_a=pixel_size_a)
    vae = Vae(VaeConfig(**config))
    vae.load_state_dict(tensors)
    return TrainedModel(vae=vae.to(device).eval(), scale=float(meta["scale"]), pixel_size_a=pixel_size_a)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a resume state (tensors and plain values only), atomically."""
    with replacing(path) as temporary:
        content = io.BytesIO()  # torch's own writer reports a full disk as a RuntimeError without a file name
        torch.save(state, content)
        temporary.write_bytes(content.getbuffer())


def load_state(path: Path) -> dict[str, Any]:
    """Read a resume state; only tensors and plain values are accepted from the file.

    Raises `InputFormatError` when the file is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputFormatError(
            f"{path}: no readable checkpoint ({error}). Remove it and train again."
        ) from error
    return state
