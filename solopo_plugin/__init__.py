"""SoLoPO (arXiv:2505.11166) as a training stage of LLaMA-Factory. Importing this imports nothing heavy."""

__version__ = "0.1.0"
