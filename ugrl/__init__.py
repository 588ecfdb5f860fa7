"""UGRL: semantic segmentation learned from image-level labels alone, with modelled uncertainty.

The package holds the method and a single-process trainer. It never imports Ray: the packages
``cluster`` and ``tuning`` are built around it.
"""

__version__ = "0.1.0"
