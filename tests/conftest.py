from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.predictions import trained
from tests.small import TINY
from tests.teachers import SPEC, shifted, truth
from ugrl.config import Config, load
from ugrl.data.mask_folder import TaughtSource
from ugrl.data.prepare import prepare
from ugrl.data.shapes import ShapesSource
from ugrl.predict.model import Model
from ugrl.train.loop import Trainer
from ugrl.train.run import ensure_shards

# A shell starts what runs in its background with SIGINT ignored, and processes of the tests would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session", autouse=True)
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of the user's: neither clusters, credentials and settings in the environment nor files at home."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("RAY_", "UGRL_", "MLFLOW_", "OPTUNA_", "SLURM_", "AWS_")) and name != "RAY_TMPDIR":
                patch.delenv(name)
        # But for a font cache, which takes seconds to make.
        patch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib")))
        patch.setenv("HOME", str(home))
        patch.setenv("UGRL_DATA", str(home / "data"))
        patch.setenv("UGRL_CACHE", str(home / "cache"))
        yield


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty generated images of 48 px: train 20, tune_val 4, val 16."""
    out = tmp_path_factory.mktemp("shards") / "shapes"
    prepare(ShapesSource(SPEC), out, tune_val=0.17, seed=0, progress=False)
    return out


@pytest.fixture(scope="session")
def small() -> Config:
    """The run that clusters repeat, whatever happens to them."""
    return load("shapes", TINY)


@pytest.fixture(scope="session")
def small_shards(small: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UGRL_DATA", str(tmp_path_factory.mktemp("data")))
        return Path(ensure_shards(small, None))


@pytest.fixture(scope="session")
def alone(small: Config, small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, undisturbed, in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    Trainer(small, shards=small_shards, out=out, quiet=True, device="cpu").fit()
    return out


@pytest.fixture(scope="session")
def base(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended, to be read."""
    return trained(shards, tmp_path_factory.mktemp("trained") / "base")


@pytest.fixture(scope="session")
def model(base: Path) -> Model:
    return Model(base, device="cpu")


@pytest.fixture(scope="session")
def teacher(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "sam"
    for split in ("train", "tune_val"):
        truth(shards, split, folder, shifted)
    return folder


@pytest.fixture(scope="session")
def taught(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of ``shards``, with teacher masks for those of train."""
    out = tmp_path_factory.mktemp("taught") / "shards"
    prepare(TaughtSource(ShapesSource(SPEC), teacher), out, tune_val=0.17, seed=0, progress=False)
    return out
