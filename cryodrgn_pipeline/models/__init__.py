"""Encoder, decoders and the variational autoencoder: torch modules only."""
