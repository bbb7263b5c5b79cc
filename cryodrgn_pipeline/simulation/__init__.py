"""Synthetic particles with known answers: the structure, its images, and the files a user would have."""
