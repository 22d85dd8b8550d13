"""Where pictures with captions come from, and what of it can be used."""
