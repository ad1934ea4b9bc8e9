"""Sparse mixture-of-experts language models in JAX, compared with their dense twins."""

__version__ = "0.3.0"
