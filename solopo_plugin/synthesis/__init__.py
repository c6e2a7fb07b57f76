"""Make training rows from questions: six stages, one file each, run by `pipeline`."""
