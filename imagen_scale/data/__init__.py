"""Pictures and captions: where they come from, how they are prepared, and in which order."""
