"""Make training rows from questions or documents: stages, one file each, run by `pipeline`."""
