"""The only rooms that touch LLaMA-Factory's internals; one file per seam. Tested with the versions in `versions.py`."""
