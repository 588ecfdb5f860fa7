"""What a run is: one typed, frozen tree, validated as a whole before anything starts.

YAML goes in, a plain dict comes out, and the same dotted paths (``method.uncertainty.alpha``) name
a command-line override and an axis of a search space. An unknown key is refused and the nearest
one is named.

>>> cfg = build({"train": {"steps": 100, "cls_warmup_iters": 20, "lr_warmup_iters": 10}})
>>> cfg.train.steps, cfg.method.contrast.tau
(100, 0.1)
>>> build({"trian": {}})
Traceback (most recent call last):
ugrl.errors.ConfigError: unknown config key 'trian'; did you mean 'train'?
"""

from ugrl.config.keys import check_path as check_path
from ugrl.config.keys import field_texts as field_texts
from ugrl.config.keys import get as get
from ugrl.config.keys import override as override
from ugrl.config.keys import paths as paths
from ugrl.config.keys import to_dict as to_dict
from ugrl.config.load import as_tree as as_tree
from ugrl.config.load import check_revealed as check_revealed
from ugrl.config.load import dump as dump
from ugrl.config.load import find_yaml as find_yaml
from ugrl.config.load import load as load
from ugrl.config.load import parse_overrides as parse_overrides
from ugrl.config.load import public_dict as public_dict
from ugrl.config.load import read_yaml as read_yaml
from ugrl.config.tree import SCALES as SCALES
from ugrl.config.tree import CamConfig as CamConfig
from ugrl.config.tree import ClusterConfig as ClusterConfig
from ugrl.config.tree import Config as Config
from ugrl.config.tree import ContrastConfig as ContrastConfig
from ugrl.config.tree import DataConfig as DataConfig
from ugrl.config.tree import EvalConfig as EvalConfig
from ugrl.config.tree import LossConfig as LossConfig
from ugrl.config.tree import MethodConfig as MethodConfig
from ugrl.config.tree import ModelConfig as ModelConfig
from ugrl.config.tree import PseudoConfig as PseudoConfig
from ugrl.config.tree import ShapesConfig as ShapesConfig
from ugrl.config.tree import Steps as Steps
from ugrl.config.tree import TrainConfig as TrainConfig
from ugrl.config.tree import UncertaintyConfig as UncertaintyConfig
from ugrl.config.values import bounds_text as bounds_text
from ugrl.config.values import build as build
from ugrl.config.values import type_name as type_name
from ugrl.secrets import public_tree as public_tree
from ugrl.text import nearest as nearest
