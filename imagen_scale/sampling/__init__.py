"""Sampling: a trained cascade from text to pictures, one stage in memory at a time."""
