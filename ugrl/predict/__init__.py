"""Masks, scores, CAMs and uncertainties of images, by a trained network: for the command line and for Python alike."""

#: The names of palettes (:mod:`ugrl.predict.palettes`), the default one first.
PALETTES = ("voc", "safe", "tol")
