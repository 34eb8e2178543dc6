"""Train, scale, run and study diffusion models for visual perception."""

__version__ = "0.1.0"
