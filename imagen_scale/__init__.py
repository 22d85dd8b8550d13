"""Train and sample Imagen-style text-to-image pixel cascades on the hardware people have."""

__version__ = "0.1.0"
