from __future__ import annotations

from pathlib import Path

import pytest

from ugrl import config
from ugrl.errors import ConfigError


@pytest.mark.parametrize("name", ["shapes", "coco100", "voc", "coco", "configs/voc.yaml", "voc.yaml"])
def test_shipped_configs_load_and_round_trip(name: str) -> None:
    cfg = config.load(name)
    assert config.build(config.to_dict(cfg)) == cfg


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.contrast.tua=0.1"], "did you mean 'method.contrast.tau'"),
        (["train.alpha=1"], "did you mean 'method.uncertainty.alpha'"),
        (["method.contrast.keep=0"], "'method.contrast.keep' is 0.0; expected > 0 and ≤ 1"),
        (["method.contrast.keep=1.5"], "'method.contrast.keep' is 1.5; expected > 0 and ≤ 1"),
        (["train.steps=many"], "'train.steps' is 'many'; expected an integer"),
        (["train.steps=0.5"], "'train.steps' is 0.5; expected an integer"),
        (["train.stochastic=1"], "expected true or false"),
        (["method.setting=V"], "expected one of IV, III, II, I, Base"),
        (["train.cls_warmup_iters=20000"], "expected < train.steps 20000"),
        (["method.cam.scales=[0.5, 2]"], "expected 1.0 among them"),
        (["method.cam.scales=[]"], "expected a list of a number"),
        (["data.scale_min=3"], "expected ≤ data.scale_max"),
        (["train.lr=.nan"], "expected a number"),
        (["nonsense"], "is not section.key=value"),
        (["train.steps=[1"], "override 'train.steps=[1': line 1, column 3: not valid YAML"),
    ],
)
def test_bad_values_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as info:
        config.load("voc", config.parse_overrides(words))
    assert message in str(info.value)
    assert "\n" not in str(info.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'shapes'"):
        config.load("shaeps.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: {steps: 1\nmodel")
    with pytest.raises(ConfigError, match=r"broken\.yaml: line 2"):
        config.load(broken)
    typo = tmp_path / "typo.yaml"
    typo.write_text("trian: {steps: 1}")
    with pytest.raises(ConfigError, match=r"typo\.yaml: unknown config key 'trian'; did you mean 'train'"):
        config.load(typo)
    flat = tmp_path / "flat.yaml"
    flat.write_text("train: 3")
    with pytest.raises(ConfigError, match="section 'train' is 3"):
        config.load(flat)


def test_numbers_as_yaml_reads_them() -> None:
    cfg = config.load("voc", config.parse_overrides(["train.lr=6e-5", "train.steps=2e4", "model.weights=null"]))
    assert cfg.train.lr == 6e-5
    assert cfg.train.steps == 20000
    assert cfg.model.weights is None


def test_defaults_are_the_methods() -> None:
    """The published values, and the documented defaults of the others."""
    defaults = config.paths()
    expected = {
        "method.uncertainty.alpha": 5.0,
        "method.uncertainty.beta": 5.0,
        "method.uncertainty.eta": 0.99,
        "method.uncertainty.d_cls": 1024,
        "method.contrast.tau": 0.1,
        "method.contrast.keep": 0.35,
        "method.contrast.d_seg": 512,
        "method.loss.lambda1": 0.1,
        "method.loss.lambda2": 0.1,
        "method.loss.lambda3": 0.1,
        "method.cam.high": 0.55,
        "method.cam.low": 0.35,
        "eval.cam_background": 0.45,
    }
    assert {k: defaults[k] for k in expected} == expected
