"""Tensor to tensor: transforms, CTF, slices, shifts, cropping, shell statistics. No files, no config."""
