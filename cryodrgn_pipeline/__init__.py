"""Heterogeneous cryo-EM reconstruction from a consensus refinement, as one Snakemake workflow."""

__version__ = "0.1.0"
