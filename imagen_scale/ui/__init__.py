"""A page on this machine that samples a run: the form, both stages as they denoise, the history.

Nothing here samples or writes pictures by itself: `cascade` and `sample_folder` do.
"""
