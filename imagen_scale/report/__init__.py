"""`imagen-scale report`: one HTML page about a run, with everything inside it.

A run may be in progress, and parts of it missing or damaged: what cannot be read is said on the
page and never stops it.
"""
