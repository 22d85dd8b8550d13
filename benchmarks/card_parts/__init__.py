"""What `benchmarks/card.py` measures: a file a part, and the processes that it is measured in."""
