"""The version of this package: read by the build, shown by --version, written into files."""

__version__ = "0.1.0"
