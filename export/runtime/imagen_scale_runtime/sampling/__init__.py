"""What is asked for and what is not read of it, the same files as the main package's."""
