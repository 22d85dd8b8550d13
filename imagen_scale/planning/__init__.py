"""How many bytes a training step needs, and the cheapest way to fit."""
