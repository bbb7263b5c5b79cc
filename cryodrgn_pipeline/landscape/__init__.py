"""Latents in; coordinates, clusters, paths, flags and subsets out."""
