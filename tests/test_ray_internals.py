"""Ray's private parts: they are there in the version that they were written for, and what happens without each."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed")

from packaging.requirements import Requirement  # noqa: E402

from cluster import ray_internals as internals  # noqa: E402
from ugrl.errors import ConfigError  # noqa: E402

ROOT = Path(__file__).parents[1]
# Imports, and paths of attributes, that lead into Ray's private modules.
HIDDEN = re.compile(r"ray\.[\w.]*_(private|internal)\b|iter_internal_ref_bundles")


def test_this_file_was_written_for_the_installed_ray() -> None:
    """After an update of Ray: compare ``cluster/ray_internals.py`` with it, then change ``MADE_FOR``."""
    assert ray.__version__.startswith(internals.MADE_FOR + ".")
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (wanted,) = [r for r in map(Requirement, dependencies) if r.name == "ray"]
    assert wanted.specifier == Requirement(f"ray>={internals.MADE_FOR},<{internals.BELOW}").specifier


def test_no_other_file_uses_private_parts() -> None:
    files = [p for top in ("ugrl", "cluster", "tuning") for p in (ROOT / top).rglob("*.py")]
    found = {p.relative_to(ROOT).as_posix() for p in files if HIDDEN.search(p.read_text())}
    assert found == {"cluster/ray_internals.py"}


@pytest.mark.parametrize("part", internals.PRIVATE, ids=lambda part: part.name)
def test_each_part_is_there(part: internals.Private) -> None:
    assert part.exists(), part.without


def test_every_part_is_listed() -> None:
    defined = {v for v in vars(internals).values() if isinstance(v, internals.Private)}
    assert defined == set(internals.PRIVATE) and len(internals.PRIVATE) == len(defined)


def test_parts_take_what_they_are_given() -> None:
    """Names and signatures that are used beyond the parts themselves."""
    from ray.data import DataContext
    from ray.train.v2._internal import exceptions
    from ray.train.v2._internal.callbacks import datasets
    from ray.train.v2.api import data_parallel_trainer

    assert "dashboard_agent_listen_port" in inspect.signature(internals.START_PARAMETERS.get()).parameters
    assert "custom_execution_callback_classes" in {f.name for f in dataclasses.fields(DataContext)}
    assert hasattr(internals.EXECUTION_CALLBACK.get(), "on_execution_step")
    assert internals.ExecutionCallback is internals.EXECUTION_CALLBACK.get()
    for name in ("after_controller_start", "_maybe_send_resource_request"):
        assert hasattr(internals.FIXED_POLICY.get(), name)
    for name in internals.NOT_STARTED | internals.NOT_HEALTHY:
        assert issubclass(getattr(exceptions, name), Exception)
    trainer = Path(inspect.getfile(data_parallel_trainer)).read_text()
    assert "scaling_policy=" in trainer
    for name in internals.UNUSED_CALLBACKS | internals.UNUSED_IF_PRIVATE:
        assert f"{name}(" in trainer
    assert datasets.DatasetsCallback.__name__ in internals.UNUSED_CALLBACKS
    source = "".join(p.read_text() for p in Path(inspect.getfile(exceptions)).parent.rglob("*.py"))
    for file in (internals.SNAPSHOT, internals.STORAGE_MARKER):
        assert file in source


def gone(part: internals.Private) -> internals.Private:
    """The part under a name that no version of Ray has."""
    return dataclasses.replace(part, name=f"{part.name}_gone")


@pytest.mark.parametrize("part", internals.PRIVATE, ids=lambda part: part.name)
def test_a_part_that_is_gone_is_none_or_one_line(part: internals.Private) -> None:
    missing = gone(part)
    assert not missing.exists()
    assert not dataclasses.replace(part, module="ray._private.gone").exists()
    if not part.required:
        assert missing.get() is None
        return
    with pytest.raises(ConfigError) as caught:
        missing.get()
    assert str(caught.value) == (
        f"Ray {ray.__version__} has no {part.module}.{part.name}_gone: {part.without}; install ray>=2.60,<2.70"
    )


def test_addresses_are_not_checked_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "FIND_CLUSTER", gone(internals.FIND_CLUSTER))
    monkeypatch.setattr(internals, "FIND_HOST", gone(internals.FIND_HOST))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert internals.find_cluster() is None and internals.host_for_ray("localhost") == "localhost"
    from cluster.connect import check

    check("auto")  # Ray itself says that there is none


# A run of Ray Data and Ray Train on a cluster of its own, with nothing of Ray's that is not required.
WITHOUT = """
import ctypes, dataclasses, sys
libc = ctypes.CDLL(None)  # a destructor that aborts, as those do that Ray's threads outlive
libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)
from cluster import ray_internals as internals
if sys.argv[1] == "without":
    for name, part in list(vars(internals).items()):
        if isinstance(part, internals.Private) and not part.required:
            setattr(internals, name, dataclasses.replace(part, name=part.name + "_gone"))
    internals.ExecutionCallback = object
from cluster.connect import start_ray, stop_ray
import ray.data, ray.train
have = start_ray(cpus=2)
print(have, internals.is_private())
internals.start_data_actors()
data = ray.data.from_items([{"k": k} for k in range(6)], override_num_blocks=3)
internals.pause_scheduler(data.context)
print(len(data.context.custom_execution_callback_classes), [ray.get(b).num_rows for b in internals.block_refs(data)])
trainer = internals.torch_trainer(
    train_loop_per_worker=lambda config: print(config["n"], file=open(config["out"] + "/seen", "w")),
    train_loop_config={"n": 7, "out": sys.argv[2]},
    scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
    run_config=ray.train.RunConfig(storage_path=sys.argv[2], name="run"),
)
print([type(c).__name__ for c in trainer._create_default_callbacks()].count("PlacementGroupCleanerCallback"))
trainer.fit()
print(open(sys.argv[2] + "/seen").read().strip())
stop_ray()
print(ray.is_initialized())
sys.exit(7)
"""


@pytest.mark.ray
@pytest.mark.parametrize("how", ["with", "without"])
def test_a_run_needs_only_the_required_parts(how: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, how, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 7, done.stderr[-3000:]  # its own: no destructor came before
    private = how == "with"
    cleaners = 0 if private else 1
    assert [s for s in done.stdout.splitlines() if not s.startswith("(")] == [
        f"2 CPUs {private}",
        f"{int(private)} [2, 2, 2]",
        str(cleaners),
        "7",
        "False",
    ]


def test_reading_processes_import_no_module_of_ray_train() -> None:
    code = "import sys; import cluster.ray_internals; print([m for m in sys.modules if m.startswith('ray.train')][:3])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert importlib.import_module("cluster.read_tasks")
