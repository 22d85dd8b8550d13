"""python -m imagen_scale_runtime."""

from .command import main

main()
