"""Batches and a model in, metrics and checkpoints out."""
