"""Weights in safetensors with the architecture beside them; resume state without pickled objects."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.atomic import replacing
from cryodrgn_pipeline.models.basis import BasisConfig, BasisModel, BasisVae
from cryodrgn_pipeline.models.encoder import Reading
from cryodrgn_pipeline.models.from_subspace import ImageBasisVae, ResidualVae
from cryodrgn_pipeline.models.kernel import KernelFunctions, KernelModel
from cryodrgn_pipeline.models.linear import LinearModel
from cryodrgn_pipeline.models.subspace import Subspace
from cryodrgn_pipeline.models.vae import GreyReference, Vae, VaeConfig, decoded_density

MODEL_FILE = "model.safetensors"
FORMATS = VAE, LINEAR, BASIS, KERNEL, RESIDUAL = tuple(
    f"cryodrgn_pipeline.{kind}.1" for kind in ("vae", "linear", "basis", "kernel", "residual")
)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """A decoder with what its numbers mean: `scale` is the σ by which coefficients were divided.

    `input_scale`, of the encoder's Wiener filter, and `grey` are there for new images.
    """

    vae: Vae | ResidualVae
    scale: float
    pixel_size_a: float
    input_scale: float = 1.0
    grey: GreyReference | None = None

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
        drawn = decoded_density(self.vae.decoder, self.vae.config, z, box_size_px) * (self.scale * coarser)
        if isinstance(self.vae, ResidualVae):
            drawn += self.vae.start.density(z, box_size_px).cpu()
        return drawn


Model = TrainedModel | LinearModel | BasisModel | KernelModel


def save_model(path: Path, model: Model) -> None:
    """Write weights or maps and, as JSON metadata, what they belong to, atomically."""
    tensors, config = _parts(model)
    kind = {LinearModel: LINEAR, BasisModel: BASIS, KernelModel: KERNEL}.get(type(model), VAE)
    if isinstance(model, TrainedModel):
        kind = RESIDUAL if isinstance(model.vae, ResidualVae) else kind
    meta = {"format": kind, "config": json.dumps(config), "pixel_size_a": repr(model.pixel_size_a)}
    if isinstance(model, TrainedModel):
        meta |= {"scale": repr(model.scale), "input_scale": repr(model.input_scale)}
        meta |= {} if model.grey is None else {"grey": json.dumps(asdict(model.grey))}
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(plain, metadata=meta))


def _parts(model: Model) -> tuple[Tensors, dict[str, Any]]:
    """A model's tensors and its plain values."""
    tensors: Tensors = {}
    if isinstance(model, TrainedModel) and isinstance(model.vae, ResidualVae):
        tensors, config = _parts(model.vae.start)
        tensors |= {f"residual.{name}": value for name, value in model.vae.decoder.state_dict().items()}
        return tensors, {"residual": model.vae.config.as_dict(), "start": config}
    if isinstance(model, TrainedModel):
        return dict(model.vae.state_dict()), model.vae.config.as_dict()
    if isinstance(model, LinearModel):
        tensors = {"maps": model.maps, "spread": model.spread}
        config = {"latent_dim": model.latent_dim, "curved": model.curved}
    elif isinstance(model, KernelModel):
        tensors = {"maps": model.maps, "turn": model.turn, "axes": model.axes}
        for prefix, part in (("functions", model.functions), ("placing", model.placing)):
            tensors |= {f"{prefix}.{each.name}": getattr(part, each.name) for each in fields(part)}
        config = {"latent_dim": model.latent_dim}
    else:
        tensors = {"maps": model.maps, "turn": model.turn}
        tensors |= {f"vae.{name}": value for name, value in model.vae.state_dict().items()}
        config = model.vae.config.as_dict()
        if isinstance(model.vae, ImageBasisVae):
            config = model.vae.basis.config.as_dict() | {"encoder": config}
        if model.reading is not None:
            config |= {"reading": asdict(model.reading)}
    if (subspace := model.subspace) is not None:
        tensors |= {"subspace.maps": subspace.maps, "subspace.mask": subspace.mask}
        tensors |= {} if subspace.drawn is None else {"subspace.drawn": subspace.drawn}
        config |= {
            "subspace": {
                "grey": subspace.grey,
                "scale_spread": subspace.scale_spread,
                "shift_spread": subspace.shift_spread,
            }
        }
    return tensors, config


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
    kind = meta.get("format")
    if kind not in FORMATS:
        raise InputFormatError(f"{path}: format {kind!r}, expected one of {', '.join(FORMATS)}.")
    config, pixel_size_a = json.loads(meta["config"]), float(meta["pixel_size_a"])
    if kind == LINEAR:
        subspace = _subspace(tensors, config)
        on_device = {name: tensors[name].to(device) for name in ("maps", "spread")}
        return LinearModel(**on_device, pixel_size_a=pixel_size_a, subspace=subspace, **config)
    if kind == KERNEL:
        return KernelModel(
            maps=tensors["maps"].to(device),
            turn=tensors["turn"].to(device),
            functions=KernelFunctions(**_under("functions.", tensors)).to(device),
            placing=KernelFunctions(**_under("placing.", tensors)),
            axes=tensors["axes"],
            pixel_size_a=pixel_size_a,
            subspace=_subspace(tensors, config),
            latent_dim=config["latent_dim"],
        )
    if kind == BASIS:
        return _basis_model(tensors, config, pixel_size_a, device)
    scale = float(meta["scale"])
    vae: Vae | ResidualVae
    if kind == RESIDUAL:
        start = _basis_model(tensors, config["start"], pixel_size_a, device)
        vae = ResidualVae(VaeConfig(**config["residual"]), start, scale)
        vae.decoder.load_state_dict(_under("residual.", tensors))
    else:
        vae = Vae(VaeConfig(**config))
        vae.load_state_dict(tensors)
    return TrainedModel(
        vae=vae.to(device).eval(),
        scale=scale,
        pixel_size_a=pixel_size_a,
        input_scale=float(meta.get("input_scale", 1)),
        grey=GreyReference(**json.loads(meta["grey"])) if "grey" in meta else None,
    )


def _basis_model(
    tensors: Tensors, config: dict[str, Any], pixel_size_a: float, device: str | torch.device
) -> BasisModel:
    subspace, reading, encoder = (
        _subspace(tensors, config),
        config.pop("reading", None),
        config.pop("encoder", None),
    )
    basis = BasisVae(BasisConfig(**config))
    vae = basis if encoder is None else ImageBasisVae(VaeConfig(**encoder), basis)
    vae.load_state_dict(_under("vae.", tensors))
    return BasisModel(
        vae=vae.to(device).eval(),
        maps=tensors["maps"].to(device),
        turn=tensors["turn"].to(device),
        pixel_size_a=pixel_size_a,
        subspace=subspace,
        reading=reading and Reading(**reading),
    )


def _subspace(tensors: Tensors, config: dict[str, Any]) -> Subspace | None:
    spreads = config.pop("subspace", None)
    parts = _under("subspace.", tensors)
    return spreads and Subspace(maps=parts["maps"], mask=parts["mask"], drawn=parts.get("drawn"), **spreads)


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


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
