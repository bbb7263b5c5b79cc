"""One pydantic model per section of config.yaml: every key, its default, its unit and its meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
CRYOSPARC_PATTERN = r"^[PWJ][0-9]+$"
OVERRIDES = "x-overrides"  # marks a section that lists only what differs from the one of the same name

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
PathText = Annotated[str, Field(min_length=1)]
CryosparcId = Annotated[str, Field(pattern=CRYOSPARC_PATTERN)]
Count = Annotated[int, Field(ge=1)]
Auto = Literal["auto"]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A part of config.yaml; keys that it does not know are refused, texts are no numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


def _overriding(section: Section) -> Any:
    name = type(section).__name__.lower()
    text = f"what differs here from the section {name} below"
    return Field(section, description=text, json_schema_extra={OVERRIDES: True})


class Conventions(Section):
    """Remedies for a source whose poses deviate from its format; the convention check names them."""

    transpose_rotations: bool = Field(False, description="the angles describe the inverse rotation")
    negate_shifts: bool = Field(False, description="the shifts have the other sign")
    shift_scale: Positive = Field(1.0, description="factor on the shifts, for another pixel size")
    mirror_hand: bool = Field(False, description="the poses belong to the mirror image")


class Preprocess(Section):
    """Particle images to one stack: recentred, sign-corrected, Fourier-cropped, windowed."""

    box_size_px: Annotated[int, Field(ge=8, multiple_of=2)] = Field(
        128, description="even box to Fourier-crop to; 128 for a first look, 256 for detail"
    )
    window: bool = Field(True, description="fade the corners of the box out")
    window_inner: Annotated[float, Field(ge=0, le=2)] = Field(
        0.85, description="the window is 1 inside this fraction of the half box"
    )
    window_outer: Annotated[float, Field(gt=0, le=2)] = Field(
        0.99, description="... and falls linearly to 0 at this one"
    )
    mask_radius_a: Positive | None = Field(
        None,
        description="soft circular mask of this radius in Å, against micelles and neighbours; null = none",
    )
    dtype: Literal["float32", "float16"] = Field("float32", description="float16 halves the stack on disk")


class Consensus(Section):
    """Half-map backprojection with the given poses, its FSC, and the convention check."""

    check: Literal["stop", "warn", "off", False] = Field(  # YAML reads a bare `off` as false
        "stop", description="what a contradicted convention does: stop, warn or off"
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="draws half sets where the source has none")


class Train(Section):
    """The latent model and its training; the default takes latent_dim, learn_from and seed only."""

    method: Literal["vae", "subspace"] = Field(
        "vae", description="vae, or subspace: linear; takes latent_dim, learn_from and seed only"
    )
    encoder: Literal["subspace", "image"] = Field(
        "subspace", description="what the vae's encoder reads: the posterior in the subspace, or the image"
    )
    decoder: Literal["kernel", "basis", "mlp"] = Field(
        "kernel",
        description="maps in the subspace by a kernel or by a network (basis); mlp: a coordinate network",
    )
    latent_dim: Count = Field(8, description="dimensions of z")
    learn_from: Count = Field(
        200_000, description="particles that subspace and maps are learnt from at most; all are placed"
    )
    epochs: Count = Field(20, description="passes over the particles; raise it to continue a run")
    batch_size: Count = Field(16, description="images per step")
    learning_rate: Auto | Positive = Field(
        "auto", description="of Adam, such as 1.0e-4 (with the point); auto = 1e-4 √(batch_size / 16)"
    )
    beta: Literal["auto"] | Annotated[float, Field(ge=0)] = Field(
        "auto", description="weight of the prior on z; auto = 1 / latent_dim, or 2 from the subspace"
    )
    loss: Literal["white", "whitened"] = Field(
        "white", description="noise in the mlp's loss: white, or the spectrum of each optics group"
    )
    encoder_layers: Count = Field(3, description="hidden layers of the encoder")
    encoder_width: Count = Field(1024, description="their width; 256 for a first look without a GPU")
    encoder_type: Literal["resid", "mlp"] = Field("resid", description="resid or mlp")
    decoder_layers: Count = Field(3, description="hidden layers of the decoder")
    decoder_width: Count = Field(1024, description="their width; 256 for a first look without a GPU")
    decoder_type: Literal["resid", "mlp"] = Field("resid", description="resid or mlp")
    positional_encoding: Literal["gaussian", "geometric"] = Field(
        "gaussian", description="gaussian or geometric"
    )
    domain: Literal["fourier", "hartley"] = Field("fourier", description="what the decoder draws")
    mask_radius: Fraction = Field(1.0, description="disc of frequencies in the loss, fraction of Nyquist")
    encoder_mask_radius: Fraction | None = Field(
        None, description="disc of frequencies that the encoder reads; null = that of the loss"
    )
    encoder_input: Literal["aligned", "image"] = Field(
        "aligned", description="images turned to in-plane angle 0 for the encoder, or as they are"
    )
    encoder_filter: Literal["phase-flip", "wiener"] = Field(
        "phase-flip", description="what undoes the CTF before the encoder reads"
    )
    coordinate_fraction: Fraction = Field(
        1.0, description="random part of the frequencies used per step; below 1 is faster"
    )
    frequency_marching: Annotated[int, Field(ge=0)] = Field(
        0, description="epochs over which the disc of the mlp's loss grows to its radius; 0 = none"
    )
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="particles kept from training, to watch for overfitting"
    )
    checkpoint_every_epochs: Count = Field(5, description="save every so many epochs")
    checkpoint_every_minutes: Positive = Field(15.0, description="... and every so many minutes")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="same seed, same run")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU when there is one")
    in_memory: bool | None = Field(
        None, description="hold the stack in memory (true) or read it lazily (false); null = by free memory"
    )
    amp: bool | None = Field(None, description="mixed precision; null = on a GPU only")


class Volumes(Section):
    """Which volumes are made with a trained model, and how."""

    source: Literal["decoder", "particles"] = Field(
        "decoder", description="decoder, or particles: their images, with half maps and a resolution"
    )
    independent_halves: bool = Field(
        False, description="half maps from a subspace of each half set's own (particles only)"
    )
    memory_gb: Positive | None = Field(
        None, description="memory to use, GiB; null = 60 % of what is available (particles only)"
    )
    centers: bool = Field(True, description="one volume per cluster centre of the analysis")
    principal_components: Annotated[int, Field(ge=0)] = Field(
        2, description="a series along each of the first so many; at most analyze's, and latent_dim"
    )
    direct_path: bool = Field(False, description="a series along the straight line between clusters")
    graph_path: bool = Field(False, description="a series along a path that stays among the particles")
    box_size_px: Annotated[int, Field(ge=8, multiple_of=2)] | None = Field(
        None, description="decode at this smaller even box; null = the stack's (decoder only)"
    )
    low_pass_a: Positive | None = Field(None, description="low-pass filter, resolution in Å; null = none")
    flip_hand: bool = Field(False, description="mirror the volumes")
    crop_px: Annotated[int, Field(ge=8, multiple_of=2)] | None = Field(
        None, description="cut to this even box; null = keep"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU when there is one")


class Analyze(Section):
    """PCA, clusters, UMAP, traversals and outliers of the latent table."""

    clusters: Literal["auto"] | Count = Field(
        "auto", description="k-means clusters; auto: distinct groups where there are such, else 20"
    )
    principal_components: Annotated[int, Field(ge=0)] = Field(
        2, description="latent traversals written, one per component"
    )
    traversal_points: Annotated[int, Field(ge=2)] = Field(10, description="points per traversal")
    snap: bool = Field(False, description="move the points along components to the nearest particles")
    through: list[int] = Field(
        [], description="clusters that the direct and graph paths pass; [] = the two farthest apart"
    )
    umap: bool = Field(True, description="compute a UMAP; minutes for a million particles")
    umap_max_particles: Annotated[int, Field(ge=20)] = Field(
        200_000, description="particles the UMAP is fitted to"
    )
    junk_threshold: Positive = Field(
        5.0, description="robust standard deviations of loss or |z| above which a particle is flagged"
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of k-means and UMAP")


class StepResources(Section):
    """What one job of a step asks for; memory and time double with each retry."""

    threads: Count = Field(1, description="cores; fewer when --cores allows fewer")
    mem_mb: Auto | Count = Field("auto", description="memory in MB; auto = by particles, box and settings")
    runtime_min: Auto | Count = Field("auto", description="wall time in minutes; auto = as for mem_mb")
    disk_mb: Auto | Count = Field("auto", description="disk in MB that is written; auto = as for mem_mb")


class NodeResources(StepResources):
    """... on one node, or under Slurm on several that share the images."""

    nodes: Count = Field(1, description="nodes; threads, memory and GPUs are those of each")


class GpuResources(NodeResources):
    """... with GPUs, which the profiles local-gpu and slurm hand out."""

    gpus: Annotated[int, Field(ge=0)] = Field(1, description="GPUs; in training each has a process")


class Resources(Section):
    """What a job of each step asks a cluster for; auto: `cryodrgn-pipeline plan` shows what that gives."""

    import_: StepResources = Field(StepResources(), alias="import")
    preprocess: StepResources = StepResources(threads=4)
    consensus: NodeResources = NodeResources(threads=4)
    subset: StepResources = StepResources()
    train: GpuResources = GpuResources(threads=8)
    analyze: StepResources = StepResources(threads=4)
    volumes: GpuResources = GpuResources(threads=4)
    report: StepResources = StepResources()
    cryosparc: StepResources = StepResources()


class Subset(Section):
    """Some of a dataset's particles: listed in a file, or chosen from what an earlier run found."""

    ids: PathText | None = Field(None, description="file with one particle id per line")
    from_run: Name | None = Field(None, description="choose by the analysis of this run instead")
    from_subset: Name = Field("all", description="... of this subset")
    clusters: list[int] = Field([], description="particles of these clusters")
    ranges: list[str] = Field([], description="particles in these ranges, such as z_0:-1:2")
    where: str | None = Field(None, description="particles for which this holds, such as 'z_0 > 1'")
    without_junk: bool = Field(False, description="leave out particles flagged as junk")
    invert: bool = Field(False, description="take all the others")


class Run(Section):
    """One training with all that follows; what it does not say is taken from the sections below."""

    subsets: Annotated[list[Name], Field(min_length=1)] = Field(["all"], description="train on each of these")
    box_size_px: Annotated[int, Field(ge=8, multiple_of=2)] | None = Field(
        None, description="a box of its own; null = preprocess.box_size_px"
    )
    train: Train = _overriding(Train())
    analyze: Analyze = _overriding(Analyze())
    volumes: Volumes = _overriding(Volumes())


class CryosparcJob(Section):
    """Particles of a job in a running cryoSPARC instead of a file."""

    project: CryosparcId | None = Field(None, description="such as P3")
    job: CryosparcId | None = Field(None, description="the refinement, such as J42")
    output: PathText = Field("particles", description="its output of particles")
    volume: PathText | None = Field("volume", description="its output with the consensus map; null = none")
    mask: PathText | None = Field("mask", description="its output with a soft mask; null = none")
    project_folder: PathText | None = Field(
        None, description="where the project's folder is mounted here; null = as cryoSPARC says"
    )


class CryosparcPush(Section):
    """Results of each run into cryoSPARC, as an external job; off without a workspace."""

    workspace: CryosparcId | None = Field(None, description="where the external jobs go, such as W1")
    project: CryosparcId | None = Field(None, description="null = that of cryosparc")
    job: CryosparcId | None = Field(
        None, description="the job that the particles are from; null = that of cryosparc"
    )
    output: PathText | None = Field(None, description="its output of particles; null = that of cryosparc")
    clusters: bool = Field(True, description="one output of particles per cluster")
    subsets: list[Name] = Field([], description="... and per named subset, in runs on all particles")
    volumes: list[PathText] = Field(
        ["centers"], description="series whose maps go along: centers, pc1, direct, graph"
    )
    import_volumes: bool = Field(
        False, description="maps by cryoSPARC's own job Import 3D Volumes instead of outputs of ours"
    )


class Dataset(Section):
    """One consensus refinement and what is to be done with it."""

    particles: PathText | None = Field(
        None, description="RELION .star or cryoSPARC .cs file of the refinement; or use cryosparc"
    )
    cryosparc: CryosparcJob = Field(CryosparcJob(), description="a job in a running cryoSPARC instead")
    push: CryosparcPush = Field(CryosparcPush(), description="results into cryoSPARC")
    passthrough: list[PathText] = Field([], description="cryoSPARC passthrough .cs files of the same job")
    datadir: PathText | None = Field(None, description="folder that the image paths are relative to")
    class_: Annotated[int, Field(ge=0)] | None = Field(
        None, alias="class", description="class to take from an ab initio or heterogeneous refinement"
    )
    set_: dict[str, float | str] = Field(
        {}, alias="set", description="columns to overwrite, such as voltage_kv: 300"
    )
    conventions: Conventions = Field(Conventions(), description="remedies named by the convention check")
    reference: PathText | None = Field(
        None, description="your own consensus map (.mrc), so that hand and pixel size are checked as well"
    )
    mask: PathText | None = Field(
        None, description="soft mask (.mrc) for the FSC, in any box; null = from the map"
    )
    preprocess: Preprocess = _overriding(Preprocess())
    consensus: Consensus = _overriding(Consensus())
    subsets: dict[Name, Subset] = Field({}, description="named particle subsets; 'all' is always there")
    export: list[Literal["star", "cs"]] = Field(
        [], description="write each subset's particles as star (RELION) and/or cs (cryoSPARC) files"
    )
    runs: Annotated[dict[Name, Run], Field(min_length=1)] = Field(
        {"vae": Run()}, description="named trainings"
    )


class Cryosparc(Section):
    """The command line that talks to cryoSPARC: of another environment, for another version of its client."""

    executable: PathText = Field("cryodrgn-pipeline", description="a name on PATH, or a path")
    tools: Literal["5", "4.7"] = Field(
        "5", description="environment file to use with --software-deployment-method conda"
    )


class Pathvars(Section):
    """Folders for what the workflow writes, relative to the working directory."""

    results: PathText = Field("results", description="results")
    logs: PathText = Field("logs", description="one log per job")
    benchmarks: PathText = Field("logs/benchmarks", description="time and memory per job")


class Config(Section):
    """The whole of config.yaml."""

    datasets: dict[Name, Dataset] = Field({}, description="the refinements to work on, each with a name")
    preprocess: Preprocess = Preprocess()
    consensus: Consensus = Consensus()
    train: Train = Train()
    analyze: Analyze = Analyze()
    volumes: Volumes = Volumes()
    resources: Resources = Resources()
    cryosparc: Cryosparc = Cryosparc()
    pathvars: Pathvars = Pathvars()
