"""Commands of `imagen-scale` in files of their own; `imagen_scale.commands.main` gathers them."""
