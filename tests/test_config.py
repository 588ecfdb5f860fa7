from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from ugrl import config
from ugrl.command import shipped
from ugrl.errors import ConfigError


@pytest.mark.parametrize("name", [*shipped("ugrl.configs"), "configs/voc.yaml", "voc.yaml"])
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


def test_all_problems_are_named_at_once() -> None:
    tree = {
        "trian": {},
        "name": "a/b",
        "data": {"scale_min": 3, "crop": "wide"},
        "method": {"contrast": {"tua": 0.1, "keep": 0}, "cam": 3},
        "train": {"steps": 0, "mirror": True},
    }
    with pytest.raises(ConfigError) as info:
        config.build(tree)
    problems = info.value.problems
    assert problems == (
        "unknown config key 'trian'; did you mean 'train'?",
        "config key 'data.crop' is 'wide'; expected an integer",
        "unknown config key 'method.contrast.tua'; did you mean 'tau'?",
        "config key 'method.contrast.keep' is 0.0; expected > 0 and ≤ 1",
        "config section 'method.cam' is 3; expected keys and values",
        "config key 'train.steps' is 0; expected ≥ 1",
        "unknown config key 'train.mirror'; did you mean 'data.mirror'?",
        "config key data.scale_min is 3.0; expected ≤ data.scale_max 2.0",
        "config key name is 'a/b'; expected a name that a folder can have",
    )
    assert all(problem in str(info.value) for problem in problems)
    again = pickle.loads(pickle.dumps(info.value.of("run.yaml")))
    assert again.problems == tuple(f"run.yaml: {problem}" for problem in problems)


def test_all_overrides_are_looked_at() -> None:
    with pytest.raises(ConfigError) as info:
        config.parse_overrides(["nonsense", "train.steps=3", "train.lr=[1", "=2"])
    assert [p[:20] for p in info.value.problems] == [
        "override 'nonsense' ",
        "override 'train.lr=[",
        "override '=2' is not",
    ]
    with pytest.raises(ConfigError) as info:
        config.load("shapes", {"train.stpes": 3, "trian.steps": 3})
    assert [p[:43] for p in info.value.problems] == [
        "shapes.yaml: unknown config key 'train.stpe",
        "shapes.yaml: unknown config key 'trian.step",
    ]


def test_many_problems_are_one_bounded_line() -> None:
    with pytest.raises(ConfigError) as info:
        config.build({f"key{k}": k for k in range(200)})
    assert len(info.value.problems) == 200
    assert len(str(info.value)) < 1000 and str(info.value).endswith("more problems")


def sections(cls: type = config.Config) -> Iterator[type]:
    yield cls
    for hint in get_type_hints(cls).values():
        if is_dataclass(hint):
            yield from sections(hint)


def test_every_key_has_a_text() -> None:
    count = 0
    for section in sections():
        texts = config.field_texts(section)
        assert list(texts) == [f.name for f in fields(section)]
        for name, text in texts.items():
            assert len(text) > 10 and text[-1] == "." and "\n" not in text, f"{section.__name__}.{name}: {text!r}"
        count += sum(not is_dataclass(hint) for hint in get_type_hints(section).values())
        assert len(set(texts.values())) == len(texts)
    assert count == len(config.paths())


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
