"""Writing pictures, the same files as the main package's."""
