"""Validation: passes over whole images, what is counted, and how labels look."""

#: The names of palettes (:mod:`ugrl.eval.palettes`), the default one first.
PALETTES = ("voc", "safe", "tol")
