"""UGRL: semantic segmentation learned from image-level labels alone, with modelled uncertainty.

The package holds the method and a single-process trainer. It never imports Ray: the packages
``cluster`` and ``tuning`` are built around it.

``import ugrl`` alone imports nothing else. What :data:`__all__` names is imported when it is first used.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers; tests/test_api.py holds it against the table below
    from ugrl.api import Run as Run
    from ugrl.api import load as load
    from ugrl.api import prepare as prepare
    from ugrl.api import train as train
    from ugrl.api import tune as tune
    from ugrl.config import Config as Config
    from ugrl.errors import UgrlError as UgrlError
    from ugrl.method.cam import multi_scale_cam as multi_scale_cam
    from ugrl.method.class_vectors import class_positions as class_positions
    from ugrl.method.class_vectors import class_vectors as class_vectors
    from ugrl.method.contrast import contrastive_loss as contrastive_loss
    from ugrl.method.losses import affinity_loss as affinity_loss
    from ugrl.method.losses import classification_loss as classification_loss
    from ugrl.method.losses import segmentation_loss as segmentation_loss
    from ugrl.method.pool import reliable_pool as reliable_pool
    from ugrl.method.prototypes import Prototypes as Prototypes
    from ugrl.method.pseudo import pseudo_labels as pseudo_labels
    from ugrl.method.refine import PAR as PAR
    from ugrl.method.refine import refine_labels as refine_labels
    from ugrl.method.weighting import modulation_weights as modulation_weights
    from ugrl.model.families import make_backbone as make_backbone
    from ugrl.model.network import UGRLNet as UGRLNet
    from ugrl.model.pretrained import load_weights as load_weights
    from ugrl.predict.model import Model as Model
    from ugrl.predict.prediction import Prediction as Prediction

__version__ = "0.1.0"

# Name → the module that has it. What is here is the public interface (docs/api.md); tests/test_api.py freezes it.
_HOMES = {
    "load": "ugrl.api",
    "prepare": "ugrl.api",
    "tune": "ugrl.api",
    "Run": "ugrl.api",
    "Model": "ugrl.predict.model",
    "Prediction": "ugrl.predict.prediction",
    "Config": "ugrl.config",
    "UgrlError": "ugrl.errors",
    "UGRLNet": "ugrl.model.network",
    "make_backbone": "ugrl.model.families",
    "load_weights": "ugrl.model.pretrained",
    "Prototypes": "ugrl.method.prototypes",
    "PAR": "ugrl.method.refine",
    "multi_scale_cam": "ugrl.method.cam",
    "class_positions": "ugrl.method.class_vectors",
    "class_vectors": "ugrl.method.class_vectors",
    "pseudo_labels": "ugrl.method.pseudo",
    "refine_labels": "ugrl.method.refine",
    "reliable_pool": "ugrl.method.pool",
    "modulation_weights": "ugrl.method.weighting",
    "classification_loss": "ugrl.method.losses",
    "segmentation_loss": "ugrl.method.losses",
    "affinity_loss": "ugrl.method.losses",
    "contrastive_loss": "ugrl.method.contrast",
}
# `train` is a package, and a function too (ugrl/train/__init__.py).
__all__ = ["train", *_HOMES]


def __getattr__(name: str) -> object:
    if name == "train":
        return _import_module("ugrl.train")
    if name not in _HOMES:
        raise AttributeError(f"module 'ugrl' has no attribute '{name}'")
    found = getattr(_import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
