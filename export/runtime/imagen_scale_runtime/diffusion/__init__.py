"""The mathematics of sampling, the same files as the main package's."""
