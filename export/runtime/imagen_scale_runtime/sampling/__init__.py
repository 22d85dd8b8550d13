"""Options of stages, the same file as the main package's."""
