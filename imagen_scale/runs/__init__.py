"""What lies on disk: a run, its checkpoints, inference files and records."""
