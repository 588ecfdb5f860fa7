"""Search spaces without Ray: what is accepted, and what is refused with which words."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuning.space.advice import remarks, weak_rung
from tuning.space.search import Search
from tuning.space.space import SearchSpace, differences, trial_config
from tuning.space.space_file import build_space, load_space
from ugrl import config as configs
from ugrl.data.prepare import prepare
from ugrl.data.shapes import ShapesSource, ShapesSpec
from ugrl.errors import ConfigError
from ugrl.storage import place

SPACE: dict[str, Any] = {
    "config": "shapes",
    "overrides": {"train.steps": 100, "train.lr_warmup_iters": 5, "train.cls_warmup_iters": 20, "train.eval_every": 25},
    "scheduler": {"grace_steps": 50},
    "first": [{"method.contrast.keep": 0.35, "method.uncertainty.d_cls": 1024}],
    "search": {
        "method.uncertainty.alpha": {"loguniform": [1, 50]},
        "method.contrast.keep": {"uniform": [0.05, 0.8]},
        "method.uncertainty.d_cls": {"choice": [256, 1024]},
        "method.uncertainty.radius": {"int": [4, 16]},
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The space with one value replaced; ``/`` separates keys, as paths have dots."""
    tree = copy.deepcopy(SPACE)
    node: Any = tree
    *above, leaf = path.split("/")
    for key in above:
        node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
    node[leaf] = value
    return tree


def test_a_space_is_typed_and_survives_its_own_yaml() -> None:
    space = build_space(SPACE)
    assert [a.path for a in space.search] == list(SPACE["search"])
    assert (space.axis("method.uncertainty.radius").low, space.axis("method.uncertainty.radius").high) == (4, 16)
    assert build_space(yaml.safe_load(space.to_yaml())) == space


def test_a_starting_point_is_completed_from_the_base() -> None:
    (point,) = build_space(SPACE).first
    assert point == {
        "method.uncertainty.alpha": 5.0,
        "method.contrast.keep": 0.35,
        "method.uncertainty.d_cls": 1024,
        "method.uncertainty.radius": 8,
    }


def test_a_trial_is_validated_on_the_tuning_split() -> None:
    space = build_space(SPACE)
    cfg = trial_config(space.base(), {"method.contrast.keep": 0.5}, space.split)
    assert (cfg.data.val_split, cfg.method.contrast.keep, cfg.train.steps) == ("tune_val", 0.5, 100)
    assert trial_config(space.base(), {}).data.val_split == "val"


@pytest.mark.parametrize("name", ["shapes", "coco100", "voc676", "voc", "coco"])
def test_shipped_spaces_search_the_nine_values_from_the_published_point(name: str) -> None:
    space = load_space(name)
    leaves = {a.path.rsplit(".", 1)[-1] for a in space.search}
    assert space.final.best >= 1 and space.final.split == "val"
    nine = {"alpha", "beta", "tau", "keep", "d_cls", "d_seg", "lambda1", "lambda2", "lambda3"}
    more = {"eta", "prototype_weight", "background_bias", "decoder_weight"}
    assert leaves == (nine | more if name == "voc676" else nine)
    published = {k: v for p in space.first for k, v in p.items()}
    assert published["method.uncertainty.d_cls"] == 1024
    assert published["method.contrast.d_seg"] == 512
    assert published["method.contrast.keep"] == 0.35
    base = space.base()
    assert space.scheduler.name == ("none" if name == "coco100" else "asha")
    every = base.train.at(base.train.eval_every)
    if space.scheduler.name == "asha":
        assert space.scheduler.grace_steps > base.train.at(base.train.cls_warmup_iters)
        assert space.scheduler.grace_steps % every == 0
        assert weak_rung(space, base) is None
    assert base.train.steps % every == 0
    assert space.split == "tune_val"


def test_the_corners_are_those_of_voc676_each_pair_of_ends_as_often_as_another() -> None:
    space, around = load_space("corners"), {a.path: a for a in load_space("voc676").search}
    centre, *points = space.first
    assert trial_config(space.base(), centre) == space.base() and space.trials == len(space.first) == 13
    ends = {}
    for axis in space.search:
        assert axis == around[axis.path]
        low, high = (axis.options[0], axis.options[-1]) if axis.options else (axis.low, axis.high)
        assert {point[axis.path] for point in points} == {low, high}
        ends[axis.path] = [1 if point[axis.path] == high else -1 for point in points]
    for one, signs in ends.items():
        assert sum(signs) == 0
        assert all(sum(a * b for a, b in zip(signs, ends[other], strict=True)) == 0 for other in ends if other != one)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("serach", {}, "unknown space key 'serach'; did you mean 'search'?"),
        ("scheduler/grace_step", 5, "unknown space key 'scheduler.grace_step'; did you mean 'grace_steps'?"),
        ("search/method.contrast.tua", {"uniform": [0, 1]}, "did you mean 'method.contrast.tau'?"),
        ("overrides/train.stpes", 5, "did you mean 'train.steps'?"),
        ("search/method.contrast.keep", {"unifrom": [0, 1]}, "unknown kind 'unifrom'; did you mean 'uniform'?"),
        ("search/method.contrast.keep", {"uniform": [0.1, 1.2]}, "'method.contrast.keep' is 1.2; expected > 0 and ≤ 1"),
        ("search/method.contrast.keep", {"uniform": [0.0, 0.5]}, "'method.contrast.keep' is 0.0; expected > 0 and ≤ 1"),
        ("search/method.contrast.keep", {"choice": [0.5, 2]}, "'method.contrast.keep' is 2.0; expected > 0 and ≤ 1"),
        ("search/method.contrast.keep", {"uniform": [0.5, 0.5]}, "expected [low, high] with low < high"),
        ("search/method.contrast.keep", {"loguniform": [0, 0.5]}, "expected low > 0 on a log scale"),
        ("search/method.contrast.keep", 0.3, "expected one of uniform, loguniform, int, logint, choice"),
        ("search/method.uncertainty.radius", {"int": [1.5, 4]}, "expected integers"),
        ("search/method.uncertainty.d_cls", {"choice": [256, 256]}, "two or more different values"),
        ("search/train.steps", {"int": [100, 200]}, "trials that cannot be compared"),
        ("search/train.lr", {"loguniform": [1e-5, "a"]}, "expected [low, high]"),
        ("overrides/method.contrast.keep", 0.4, "'overrides.method.contrast.keep' is also searched"),
        ("first/0/method.contrast.keep", 1.5, "'first[0].method.contrast.keep' is 1.5; expected it within [0.05, 0.8]"),
        ("first/0/method.contrast.keep", 0.9, "'first[0].method.contrast.keep' is 0.9; expected it within [0.05, 0.8]"),
        ("first/0/method.uncertainty.d_cls", 512, "expected it within {256, 1024}"),
        ("first/0/method.contrast.kep", 0.5, "is not searched; did you mean 'method.contrast.keep'?"),
        (
            "search/method.contrast.tau",
            {"uniform": [0.2, 0.5]},
            "is 0.1 (from the base configuration); expected it within",
        ),
        (
            "scheduler/grace_steps",
            20,
            "is 20; expected > both warm-ups (train.lr_warmup_iters 5, train.cls_warmup_iters 20)",
        ),
        ("scheduler/grace_steps", 101, "expected ≤ train.steps 100"),
        ("scheduler/name", "bohb", "expected one of asha, hyperband, median, none"),
        ("scheduler/reduction_factor", 1, "expected an integer > 1"),
        ("scheduler/reduction_factor", 2.5, "expected an integer > 1"),
        ("search/method.uncertainty.radius", {"uniform": [4, 16]}, "is a uniform range, but the key is an integer"),
        ("search/method.uncertainty.radius", {"loguniform": [4, 16]}, "expected logint or a choice"),
        ("search/method.uncertainty.radius", {"int": [4, 16], "step": 1.5}, "expected an integer > 0 and ≤ 12"),
        ("search/method.uncertainty.radius", {"int": [4, 16], "step": 5}, "16 is not a whole number of steps away"),
        ("search/method.contrast.keep", {"uniform": [0.2, 0.8], "step": 1}, "expected a number > 0 and ≤ 0.6"),
        ("search/method.contrast.tau", {"loguniform": [0.1, 1], "step": 0.1}, "a log scale has no step"),
        ("search/method.uncertainty.d_cls", {"choice": [256, 1024], "step": 2}, "a choice has no step"),
        ("search/method.contrast.keep", {"uniform": [0.1, 0.8], "when": {"seed": 1}}, "is not a searched path"),
        (
            "search/method.contrast.keep",
            {"uniform": [0.1, 0.8], "when": {"method.uncertainty.d_cls": 512}},
            "expected values of a choice among 256, 1024",
        ),
        ("search/cluster.workers", {"int": [1, 2]}, "says where a run runs, not what it is"),
        ("search/seed", {"int": [1, 2]}, "is what 'repeats' is for"),
        ("objective", "seg_mio", "'seg_mio' is measured by nothing; did you mean 'seg_miou'?"),
        ("objective", "step_s", "expected a metric first"),
        ("objective", ["seg_miou", "step_s"], "with 2 objectives no trial can be stopped early: expected none"),
        ("sampler", "tpee", "'sampler.name' is 'tpee'; expected one of tpe, random, grid, gp, cmaes, nsga2"),
        ("sampler", "grid", "a grid needs a choice, an int, or a range with a step"),
        ("sampler", "cmaes", "which cannot vary the choice 'method.uncertainty.d_cls'"),
        ("budget", {"hour": 2}, "unknown space key 'budget.hour'; did you mean 'hours'?"),
        ("budget", {"hours": "long"}, "expected a number ≥ 0"),
        ("repeats", {"seeds": 0}, "expected an integer ≥ 1"),
        ("repeats", {"seeds": 2, "skip": "no"}, "expected true or false"),
        ("final", {"best": 1, "split": "tune_val"}, "which the search sees; expected an untouched split"),
        ("final", {"best": 1, "split": "train"}, "the training split; expected an untouched one"),
        ("final", {"every": True, "split": "tune_val"}, "which the search sees; expected an untouched split"),
        ("search/data.mirror", {"uniform": [0, 1]}, "is a uniform range, but the key is true or false"),
        ("constraints", {"step": 1}, "unknown space key 'constraints.step'; did you mean 'step_s'?"),
        ("constraints", {"step_s": 0}, "expected a number > 0"),
        ("resources", {"gpus_per_trial": 1.5}, "expected a fraction ≤ 1, or whole GPUs"),
        ("resources", {"cpus_per_trial": 0}, "expected a number > 0"),
        ("paper", "table5", "expected one of table3, table4, fig7"),
        ("split", "train", "the training split; expected another"),
        ("trials", 0, "'trials' is 0; expected an integer ≥ 1"),
        ("workers", "two", "'workers' is 'two'; expected an integer ≥ 1"),
        ("storage", "study.db", "expected journal or a URL"),
        ("config", "shaeps", "no file 'shaeps', and no shipped one of that name; did you mean 'shapes'?"),
        ("search", {}, "space key 'search' is empty"),
        ("search", [], "space key 'search' is []; expected keys and values"),
        ("search/method.contrast.keep", {"uniform": [0.1, 0.8], "stpe": 0.1}, "keep.stpe'; did you mean 'step'?"),
        ("search/method.contrast.keep", {"uniform": [math.nan, 0.8]}, "is [nan, 0.8]; expected [low, high]"),
        ("search/method.contrast.keep", {"loguniform": [0.8, 0.1]}, "expected [low, high] with low < high"),
        ("search/method.contrast.keep", {"choice": [[0.1], [0.2]]}, "two or more different values"),
        ("search/method.contrast.keep", {"choice": list(range(10**5)) + [[]]}, "is [0, 1, 2, 3, ...]; expected a list"),
        ("search/method.uncertainty.radius", {"int": [4, 1e300]}, "expected integers up to 9007199254740992"),
        ("trials", "many", "'trials' is 'many'; expected an integer ≥ 1"),
        ("trials", 10**9, "'trials' is 1000000000; expected at most 100,000"),
        ("scheduler", "asah", "'scheduler.name' is 'asah'; expected one of asha"),
        ("scheduler", 3, "'scheduler' is 3; expected keys and values"),
        ("scheduler/grace_steps", 50.5, "expected an integer, or a share of the run below 1"),
        ("first", {"train.lr": 1}, "'first' is {'train.lr': 1}; expected a list of points"),
        ("overrides", [1], "'overrides' is [1]; expected keys and values"),
        ("objective", {"seg_miou": 1}, "is measured by nothing"),
        ("config", 3, "'config' is 3; expected text"),
    ],
)
def test_a_bad_space_is_refused_in_one_line(path: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_space(changed(path, value))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_conditional_axis_counts_where_its_condition_holds() -> None:
    tree = copy.deepcopy(SPACE)
    tree["search"] = {
        "method.uncertainty.u_min": {
            "loguniform": [0.01, 0.2],
            "when": {"method.uncertainty.weighting": "inverse_exp"},
        },
        "method.uncertainty.weighting": {"choice": ["inverse_exp", "none"]},
    }
    tree["first"] = [{"method.uncertainty.weighting": "none"}, {}]
    space = build_space(tree)
    # What others depend on comes first, wherever it stands in the file.
    assert [a.name for a in space.search] == ["weighting", "u_min"]
    assert space.first == (
        {"method.uncertainty.weighting": "none"},
        {"method.uncertainty.weighting": "inverse_exp", "method.uncertainty.u_min": 0.05},
    )
    assert build_space(yaml.safe_load(space.to_yaml())) == space
    tree["first"] = [{"method.uncertainty.weighting": "none", "method.uncertainty.u_min": 0.1}]
    with pytest.raises(ConfigError, match="is given, but counts only weighting is inverse_exp"):
        build_space(tree)


def test_conditions_in_a_circle_are_refused() -> None:
    tree = copy.deepcopy(SPACE)
    a, b = "method.uncertainty.weighting", "method.contrast.pool"
    tree["first"] = []
    tree["search"] = {
        a: {"choice": ["inverse_exp", "none"], "when": {b: "ranked"}},
        b: {"choice": ["ranked", "random"], "when": {a: "none"}},
    }
    with pytest.raises(ConfigError, match="depend on each other in a circle"):
        build_space(tree)


def test_a_grid_has_all_its_points_and_sets_the_budget() -> None:
    tree = {
        "config": "shapes",
        "sampler": "grid",
        "scheduler": {"name": "none"},
        "search": {
            "method.uncertainty.weighting": {"choice": ["inverse_exp", "none"]},
            "method.contrast.keep": {"uniform": [0.2, 0.8], "step": 0.3},
            "method.uncertainty.radius": {"int": [4, 8], "step": 4, "when": {"method.uncertainty.weighting": "none"}},
        },
    }
    space = build_space(tree)
    points = space.grid()
    assert len(points) == space.trials == 3 + 6
    assert points[0] == {"method.uncertainty.weighting": "inverse_exp", "method.contrast.keep": 0.2}
    assert points[-1] == {
        "method.uncertainty.weighting": "none",
        "method.contrast.keep": 0.8,
        "method.uncertainty.radius": 8,
    }
    assert len({tuple(sorted(p.items())) for p in points}) == 9
    assert build_space({**tree, "trials": 4}).trials == 4


@pytest.mark.parametrize(("name", "trials", "seeds"), [("table3", 5, 3), ("table4", 6, 3), ("fig7", 16, 2)])
def test_the_papers_tables_run_on_any_configuration(name: str, trials: int, seeds: int) -> None:
    for config in ("voc", "shapes"):
        space = load_space(name, config=config)
        assert (space.trials, space.repeats.seeds, space.repeats.skip) == (trials, seeds, False)
        assert space.paper == name and space.split == "val" and not (space.final.every or space.final.best)
        assert space.scheduler.name == "none" and space.base().train.keep_best == 0


def test_a_table_of_the_paper_is_to_train_on_all_of_train(shards: Path, tmp_path: Path) -> None:
    """Shards whose train split was cut are warned of, before anything is paid for."""
    space = load_space("table4", config="shapes")
    assert space.search[0].options == (0.05, 0.2, 0.35, 0.5, 0.65, 0.8)
    said, *others = remarks(_search(space, shards, tmp_path))[::-1]
    assert not space.steers and not any("steer" in text for text in others)  # of few images, too: they decide nothing
    assert said.startswith("table4 trains on 20 of 24 training images: 'tune_val' was cut out of them")
    whole = tmp_path / "whole"
    prepare(ShapesSource(ShapesSpec(train=24, val=16, size=48, difficulty=0.5, seed=3)), whole, tune_val=0)
    assert not any("training images" in text for text in remarks(_search(space, whole, tmp_path)))


def _search(space: SearchSpace, shards: Path, out: Path) -> Search:
    return Search(space, space.base(), place(shards), space.objectives, out)


def test_differences_name_the_first_key() -> None:
    a, b = build_space(SPACE), build_space(changed("search/method.contrast.keep", {"uniform": [0.1, 0.8]}))
    found = list(differences(a, b))
    assert found == [("search.method.contrast.keep.uniform", [0.05, 0.8], [0.1, 0.8])]
    assert not list(differences(a, build_space(changed("trials", 3)), ignore=("budget",)))


def test_a_file_that_is_not_there_is_looked_up_among_the_shipped_ones(tmp_path: Path) -> None:
    assert load_space("tuning/shapes.yaml") == load_space("shapes")
    with pytest.raises(ConfigError, match="did you mean 'shapes'"):
        load_space("shaps.yaml")
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(changed("trails", 3)))
    with pytest.raises(ConfigError, match=r"mine.yaml: unknown space key 'trails'; did you mean 'trials'\?"):
        load_space(file)


def test_the_command_line_changes_budget_and_base() -> None:
    space = load_space("shapes", overrides={"train.steps": 300}, trials=3, workers=None)
    assert (space.trials, space.workers, space.base().train.steps) == (3, 1, 300)
    assert configs.get(space.base(), "train.eval_every") == 0.125


@pytest.mark.parametrize(
    ("name", "steps", "rung"),
    [
        ("shapes", None, 240),
        ("shapes", 160, 120),
        ("shapes", 300, 228),  # 225, moved on to the validation after it
        ("voc", None, 6000),
        ("voc", 2000, 600),
        ("coco", 8000, 1200),
    ],
)
def test_one_key_shortens_a_run_and_its_rungs_follow(name: str, steps: int | None, rung: int) -> None:
    space = load_space(name, overrides={} if steps is None else {"train.steps": steps})
    assert space.scheduler.grace_steps == rung
    assert build_space(yaml.safe_load(space.to_yaml())) == space  # what a search's folder keeps is in steps


MINIMAL: dict[str, Any] = {"config": "shapes", "trials": 4, "search": {"train.lr": {"loguniform": [1e-4, 1e-2]}}}


def test_the_smallest_space_file_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("config: shapes\ntrials: 4\nsearch:\n  train.lr: {loguniform: [1e-4, 1e-2]}\n")
    space = load_space(file)
    base = space.base()
    assert (space.trials, space.sampler.name, space.scheduler.name) == (4, "tpe", "asha")
    # 1200 steps, warm-ups until 300: half of what is left, at the validation after it.
    assert space.scheduler.grace_steps == 800 and weak_rung(space, base) is None
    assert build_space({**MINIMAL, "objective": ["seg_miou", "step_s"]}).scheduler.name == "none"
    finite = {"train.global_batch": {"choice": [8, 16]}}
    assert build_space({**MINIMAL, "sampler": "grid", "search": finite}).scheduler.name == "none"


@pytest.mark.parametrize(
    ("steps", "grace", "words"),
    [
        (320, 160, "the first rung, at step 160, is 80 steps after the warm-ups"),
        (320, 0.5, "expected scheduler.grace_steps ≥ 200 of 320, or a share such as 0.63"),
        (320, 200, None),
        (20000, 5900, "≥ 6000 of 20000, or a share such as 0.3"),  # a long run needs no half of the rest
        (20000, 6000, None),
    ],
)
def test_a_rung_where_nothing_is_learned_yet_is_named(steps: int, grace: float, words: str | None) -> None:
    overrides = {"train.steps": steps, "train.cls_warmup_iters": 0.25, "train.eval_every": 20}
    space = build_space({**MINIMAL, "overrides": overrides, "scheduler": {"grace_steps": grace}})
    found = weak_rung(space, space.base())
    assert found is None if words is None else words in str(found)


def test_a_grid_without_end_is_refused_at_once() -> None:
    wide = {"train.global_batch": {"int": [1, 10**6]}}
    with pytest.raises(ConfigError, match=r"has 1,000,000 values; a grid has at most 100,000"):
        build_space({**MINIMAL, "sampler": "grid", "search": wide})
    axes = {path: {"int": [1, 1000]} for path in ("train.global_batch", "method.uncertainty.radius")}
    with pytest.raises(ConfigError, match=r"'search' is a grid of 1,000,000 points or more"):
        build_space({**MINIMAL, "sampler": "grid", "search": axes})


def test_a_file_with_odd_keys_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text('config: shapes\nsearch:\n  "train.\\x1b[31mlr\\nx": {uniform: [0, 1]}\n')
    with pytest.raises(ConfigError) as caught:
        load_space(file)
    assert str(caught.value).startswith("mine.yaml: space key 'search.train.\\x1b[31mlr x': unknown config key")
    assert str(caught.value).isprintable()
    file.write_text("config: shapes\ntrials: 4\ntrials: 5\nsearch: {train.lr: {uniform: [0.1, 1]}}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml.*trials"):
        load_space(file)


def test_a_run_shorter_than_its_first_validation_stops_nothing() -> None:
    space = load_space("table3", config="shapes", overrides={"train.steps": 160})  # shapes validates every 200
    assert (space.trials, space.base().train.steps) == (5, 160)
    assert build_space({**MINIMAL, "overrides": {"train.steps": 160}}).scheduler.grace_steps == 160
