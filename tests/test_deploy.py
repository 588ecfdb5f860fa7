"""Files of cluster/deploy, each against what would read it: linters, schemas, Ray's own validators, a real build."""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from cluster import cli
from cluster.capacity import Capacity, check_fits

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "cluster" / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def tool(name: str) -> str:
    """A command that came with a package, whether or not its environment is active."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, f"{name} is not installed; it is one of the dev dependencies"
    return found


def document(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text())


def pins() -> dict[str, str]:
    lines = [s for s in (DEPLOY / "constraints.txt").read_text().splitlines() if not s.startswith("#")]
    return dict(s.split("==") for s in lines)


# -- the image --------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, words), continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [tuple(s.split(None, 1)) for s in text.replace("\\\n", " ").splitlines() if s.strip()]  # type: ignore[misc]


def in_context(path: str) -> bool:
    """Whether .dockerignore lets a file into the build: the last line that matches it or a parent decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern, parts = line.removeprefix("!").removeprefix("**/"), path.split("/")
        names = parts if "**/" in line else ["/".join(parts[: i + 1]) for i in range(len(parts))]
        if any(fnmatch(name, pattern) for name in names):
            kept = line.startswith("!")
    return kept


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the image's COPY lines bring to its working directory."""
    out = tmp_path_factory.mktemp("image")
    for name, words in instructions():
        if name != "COPY":
            continue
        *sources, target = words.split()
        for source in sources:
            path = ROOT / source
            assert path.exists() and in_context(source), f"COPY {source}: not in the build's context"
            files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
            for file in files:
                if in_context(file.relative_to(ROOT).as_posix()):
                    inside = Path(target) / (file.relative_to(path) if path.is_dir() else file.name)
                    (out / inside).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, out / inside)
    return out


@pytest.fixture(scope="module")
def wheel(context: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the image's `pip install .` builds."""
    out = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    subprocess.run(words, cwd=context, check=True)
    (made,) = out.iterdir()
    return made


def test_the_image_is_clean_to_its_linter() -> None:
    done = subprocess.run([tool("hadolint"), str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_is_pinned_holds_no_secret_and_does_not_run_as_root() -> None:
    steps = instructions()
    names = [name for name, _ in steps]
    base = dict(steps)["FROM"]
    assert names[0] == "FROM" and names.count("FROM") == 1
    assert re.fullmatch(r"python:3\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", base), base
    assert [words for name, words in steps if name == "USER"] == ["1000"]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    assert "ADD" not in names and "ARG" not in names
    assert not re.search(r"token|secret|password|api_key", " ".join(w for n, w in steps if n == "ENV").lower())
    # Gigabytes of dependencies are a layer that a change of the code leaves alone.
    copies = [i for i, name in enumerate(names) if name == "COPY"]
    requirements = next(i for i, (name, words) in enumerate(steps) if name == "RUN" and "requirements.txt" in words)
    assert copies[0] < requirements < copies[1]
    assert steps[copies[0]][1].split() == ["pyproject.toml", "cluster/deploy/constraints.txt", "./"]


def test_the_image_installs_the_dependencies_of_the_project(context: Path) -> None:
    """The image's own line, but for what it installs."""
    (line,) = [words for name, words in instructions() if name == "RUN" and "requirements.txt" in words]
    listing, install = line.split("&&")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["sh", "-c", listing], cwd=context, env=os.environ | {"PATH": path}, check=True)
    assert (context / "requirements.txt").read_text().splitlines() == PROJECT["dependencies"]
    words = shlex.split(install)
    named = [words[i + 1] for i, word in enumerate(words) if word in ("--constraint", "--requirement")]
    assert words[:2] == ["pip", "install"] and named == ["constraints.txt", "requirements.txt"]
    assert all((context / name).is_file() for name in named)


def test_the_image_builds_the_whole_project_from_what_it_copies(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    for package in ("ugrl", "cluster", "tuning"):
        here = [p for p in (ROOT / package).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        missing = {p.relative_to(ROOT).as_posix() for p in here} - held
        assert not missing, f"not in the wheel: {sorted(missing)}"
    entries = next(zipfile.ZipFile(wheel).read(n).decode() for n in held if n.endswith("entry_points.txt"))
    assert set(re.findall(r"^(\S+) = ", entries, re.MULTILINE)) == {"ugrl", "ugrl-train", "ugrl-tune"}


def test_the_commands_of_the_image_start_and_find_what_was_shipped(wheel: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*words, str(wheel)], check=True)
    # One process for all of them, as their scripts call it: importing torch is what takes the time.
    calls = {"ugrl": "ugrl.cli", "ugrl-train": "cluster.cli", "ugrl-tune": "tuning.cli"}
    for name, module in calls.items():
        assert f"from {module} import main" in (tmp_path / "bin" / name).read_text()
    code = "\n".join(
        [f"import contextlib, {', '.join(calls.values())}, cluster, ugrl", "print(cluster.__file__, ugrl.__file__)"]
        + [f"with contextlib.suppress(SystemExit): {module}.main(['--help'])" for module in calls.values()]
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    where, *shown = done.stdout.splitlines()
    assert where.count(str(tmp_path)) == 2  # not this checkout
    text = " ".join(" ".join(shown).split())
    assert (
        "ugrl prepare" in text
        and "coco100, own, own-gpu, shapes, voc, voc-afa" in text
        and "table3, table4, voc" in text
    )


def test_every_dependency_is_pinned_to_a_version_that_the_project_allows() -> None:
    pinned = pins()
    wanted = [Requirement(text) for text in PROJECT["dependencies"]]
    assert sorted(pinned) == sorted(r.name for r in wanted)
    for each in wanted:
        assert each.specifier.contains(Version(pinned[each.name])), f"{each} does not allow {pinned[each.name]}"


# -- Kubernetes -------------------------------------------------------------------------------


def fields(required: str = "", **known: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": known, "required": required.split(), "additionalProperties": False}


TEXT, WHOLE, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
POD = {"type": "object"}  # checked against Kubernetes' own schema
GROUP = {"rayStartParams": TEXTS, "template": POD, "resources": TEXTS, "labels": TEXTS}
CLUSTER = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=fields(mode={"enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=FLAG),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions={"type": "object"},
    gcsFaultToleranceOptions={"type": "object"},
    headServiceAnnotations=TEXTS,
    suspend=FLAG,
    headGroupSpec=fields("template rayStartParams", serviceType=TEXT, enableIngress=FLAG, headService=POD, **GROUP),
    workerGroupSpecs={
        "type": "array",
        "minItems": 1,
        "items": fields(
            "groupName template minReplicas maxReplicas rayStartParams",
            groupName=TEXT,
            replicas=WHOLE,
            minReplicas=WHOLE,
            maxReplicas=WHOLE,
            numOfHosts=WHOLE,
            idleTimeoutSeconds=WHOLE,
            suspend=FLAG,
            scaleStrategy={"type": "object"},
            **GROUP,
        ),
    },
)
# The spec of ray.io/v1 RayJob as the operator documents it, without what selects other clusters.
RAYJOB = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields("name", name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}, labels=TEXTS),
    spec=fields(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        runtimeEnvYAML=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        submitterPodTemplate=POD,
        submitterConfig=fields(backoffLimit=WHOLE),
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=WHOLE,
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        backoffLimit=WHOLE,
        jobId=TEXT,
        metadata=TEXTS,
        suspend=FLAG,
        managedBy=TEXT,
        entrypointNumCpus={"type": "number"},
        entrypointNumGpus={"type": "number"},
        entrypointResources=TEXT,
        deletionStrategy={"type": "object"},
        preRunningDeadlineSeconds=WHOLE,
        rayClusterSpec=CLUSTER,
    ),
)


def check_rayjob(job: dict[str, Any]) -> None:
    jsonschema.validate(job, RAYJOB)
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(pod, "1.33", strict=True)


@pytest.fixture
def job() -> dict[str, Any]:
    return document("kuberay/rayjob.yaml")


def test_the_rayjob_has_only_fields_that_exist(job: dict[str, Any]) -> None:
    check_rayjob(job)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "ttlSecondsAfterFinish"], 600),
        (["spec", "authOptions"], {"mode": "token"}),  # it belongs to the cluster
        (["spec", "rayClusterSpec", "authOptions", "mode"], "Token"),
        (["spec", "rayClusterSpec", "rayVersion"], 2.60),  # YAML without quotes
        (["spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "volumeMount"], []),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "terminationGracePeriod"], 9),
    ],
)
def test_the_schema_refuses_what_kubernetes_would_drop(
    job: dict[str, Any], path: list[str | int], value: object
) -> None:
    wrong: Any = copy.deepcopy(job)
    node = wrong
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_rayjob(wrong)


def test_the_rayjob_fits_together(job: dict[str, Any]) -> None:
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == pins()["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0
    stop_wait = int(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounted = {m["name"] for c in pod["containers"] for m in c["volumeMounts"]}
        assert mounted == {v["name"] for v in pod["volumes"]}
        assert {c["image"].rsplit(":", 1)[1] for c in pod["containers"]} == {PROJECT["version"]}
        hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        waits = int(re.search(r"seq (\d+)", hook).group(1))  # type: ignore[union-attr]
        assert stop_wait < waits < pod["terminationGracePeriodSeconds"]


def test_the_run_of_the_rayjob_is_valid_and_fits_its_cluster(job: dict[str, Any]) -> None:
    program, *words = shlex.split(job["spec"]["entrypoint"])
    assert program == "ugrl-train"
    args = cli.build_parser().parse_intermixed_args(words)
    assert args.resume and Path(args.out).is_absolute() and Path(args.data).is_absolute()
    cfg = cli.load_config(args)
    assert cfg.cluster.address == "auto"
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    nodes, cpus, gpus = group["replicas"], float(limits["cpu"]), float(limits["nvidia.com/gpu"])
    assert check_fits(cfg, cfg.cluster.workers, Capacity(nodes * cpus, nodes * gpus, cpus)) == nodes * gpus


def test_the_run_that_the_slurm_script_shows_is_valid_and_fits_its_nodes() -> None:
    text = (DEPLOY / "slurm" / "train.sbatch").read_text()
    shown = re.search(r"^#   sbatch (.*?)\n#\n", text, re.MULTILINE | re.DOTALL)
    words = shlex.split(shown.group(1).replace("\\\n#", " "))  # type: ignore[union-attr]
    at = next(i for i, word in enumerate(words) if word.endswith("train.sbatch"))
    assert (ROOT / words[at]).is_file() and words[at + 1] == "ugrl-train"
    asked = {k: int(v) for k, v in (w.removeprefix("--").split("=") for w in words[:at])}
    cfg = cli.load_config(cli.build_parser().parse_intermixed_args(words[at + 2 :]))
    nodes, cpus, gpus = (asked[k] for k in ("nodes", "cpus-per-task", "gpus-per-node"))
    assert check_fits(cfg, cfg.cluster.workers, Capacity(nodes * cpus, nodes * gpus, cpus)) == nodes * gpus


@pytest.mark.parametrize(("group", "title"), [("head", "ugrl-train"), ("worker", "ray::RayTrainWorker")])
def test_a_pod_is_held_until_the_run_has_left_it(job: dict[str, Any], group: str, title: str, tmp_path: Path) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    spec = cluster["headGroupSpec"] if group == "head" else cluster["workerGroupSpecs"][0]
    words = spec["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    # Only this test's processes are looked at: other runs on the machine are not its business.
    mine = tmp_path / "proc"
    mine.mkdir()
    words = [w.replace("/proc/", f"{mine}/") for w in words]
    with subprocess.Popen(["sleep", "60"], executable=shutil.which("sleep")) as other:
        (mine / str(other.pid)).symlink_to(f"/proc/{other.pid}")
        assert subprocess.run(words, timeout=30, check=False).returncode == 0  # nothing of ours: at once
        with subprocess.Popen([title, "60"], executable=shutil.which("sleep")) as run:
            (mine / str(run.pid)).symlink_to(f"/proc/{run.pid}")
            with pytest.raises(subprocess.TimeoutExpired):
                subprocess.run(words, timeout=2, check=False)
            run.terminate()
        assert subprocess.run(words, timeout=30, check=False).returncode == 0
        other.terminate()


# -- ray up, jobs -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ray-up.yaml", "ray-up-local.yaml"])
def test_ray_accepts_the_cluster_file(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    made = prepare_config(document(name))
    validate_config(made)
    assert any(target.endswith(".ray/auth_token") for target in made["file_mounts"])
    started = " ".join(made["head_start_ray_commands"] + made["worker_start_ray_commands"])
    in_docker = " ".join(made["docker"].get("run_options", []))
    assert "RAY_AUTH_MODE=token" in in_docker or started.count("RAY_AUTH_MODE=token ray start") == 2
    assert "0.0.0.0" not in started  # the dashboard stays on loopback; `ray dashboard` is a tunnel
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config(document(name) | {"idle_timeout": 5}))


def test_ray_accepts_the_runtime_environment_of_jobs(job: dict[str, Any]) -> None:
    from ray.runtime_env import RuntimeEnv

    mine = document("runtime-env.yaml")
    RuntimeEnv(**mine)
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"] == mine["env_vars"]


def test_the_working_directory_of_a_job_is_the_code_alone(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    repo, made = tmp_path / "repo", tmp_path / "made.zip"
    kept = ["ugrl/data/make.py", "ugrl/configs/voc.yaml", "cluster/deploy/Dockerfile", "tuning/voc.yaml", "README.md"]
    big = [
        ".git/x",
        ".venv/lib/x",
        "data/shapes/x",
        "runs/a/x",
        "shards/x",
        "masks/x",
        "bench/out/x",
        "build/site/x",
        "dist/x",
        "ugrl.egg-info/x",
    ]
    for name in (*kept, *big, "ugrl/__pycache__/x"):
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text("x")
    # Without .gitignore: a checkout may lack it, and it does not name .git.
    create_package(str(repo), made, include_gitignore=False, excludes=document("runtime-env.yaml")["excludes"])
    assert sorted(n for n in zipfile.ZipFile(made).namelist() if not n.endswith("/")) == sorted(kept)
