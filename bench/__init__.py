"""Measured comparisons: ``python -m bench``."""
