"""Masks, scores, CAMs and uncertainties of images, by a trained network: for the command line and for Python alike."""
