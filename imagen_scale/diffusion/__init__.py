"""Diffusion mathematics: tensors and callables only, no networks and no configuration."""
