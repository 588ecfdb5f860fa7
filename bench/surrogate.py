"""A stand-in for training: learning curves that were measured, and a Gaussian process through them.

    python -m bench.surrogate space > space.yaml       # the search that was measured: random, nothing stopped early
    ugrl-tune --space space.yaml --out DIR             # run it; so for --repeats, below
    python -m bench.surrogate collect DIR [DIR ...]    # its learning curves, into bench/data/shapes.json
    python -m bench.surrogate check                    # what the process explains of them

``space --repeats`` prints a second search, whose only purpose is the noise: a few points of the first one, each with
several seeds.

A curve is the objective at every validation. The process predicts whole curves: one kernel over the searched values,
with a length of its own for each, one covariance between the validations for what the values explain, and another one
for what they do not. That second one is the noise of a simulated trial: correlated along the curve, and at each
validation as large as the residuals of the measured runs whose value is about its own. In a basis in which the two
covariances are diagonal the validations are independent processes, which is how it is fitted: by marginal likelihood,
with a prior that keeps lengths long where nothing speaks for short ones.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tuning.space.axis import Axis
from tuning.space.space import SearchSpace
from tuning.space.space_file import build_space

DATA = Path(__file__).resolve().parent / "data" / "shapes.json"

#: tuning/shapes.yaml on smaller images and with three quarters of its steps, its warm-ups and validations in
#: proportion, and with the learning rate.
SPACE: dict[str, Any] = {
    "config": "shapes",
    "overrides": {
        "data.shapes.size": 32,
        "data.crop": 32,
        "data.threads": 1,
        "method.cam.scales": [1.0],
        "train.steps": 240,
        "train.lr_warmup_iters": 12,
        "train.cls_warmup_iters": 72,
        "train.eval_every": 60,
        "train.checkpoint_every": 240,
        "train.picture_every": 100000,
        "train.keep_checkpoints": 1,
    },
    "budget": {"trials": 120},
    "sampler": "random",
    "scheduler": {"name": "none"},
    "seed": 1,
    "search": {
        "train.lr": {"loguniform": [2e-4, 8e-3]},
        "method.uncertainty.alpha": {"loguniform": [1, 50]},
        "method.uncertainty.beta": {"loguniform": [1, 50]},
        "method.contrast.tau": {"loguniform": [0.03, 1]},
        "method.contrast.keep": {"uniform": [0.05, 0.8]},
        "method.uncertainty.d_cls": {"choice": [256, 512, 1024, 2048]},
        "method.contrast.d_seg": {"choice": [128, 256, 512, 1024]},
        "method.loss.lambda1": {"loguniform": [0.01, 1]},
        "method.loss.lambda2": {"loguniform": [0.01, 1]},
        "method.loss.lambda3": {"loguniform": [0.01, 1]},
    },
}


# --- measured runs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One measured run.

    Attributes:
        point: Dotted path → value.
        seed: Of the run.
        scores: The objective at each validation.
        seconds: That it trained.
    """

    point: Mapping[str, Any]
    seed: int
    scores: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class Measured:
    """Runs of one space.

    Attributes:
        space: That they were run in.
        objective: What was measured.
        steps: Of the validations.
        curves: One a run.
    """

    space: SearchSpace
    objective: str
    steps: tuple[int, ...]
    curves: tuple[Curve, ...]

    @classmethod
    def load(cls, path: Path = DATA) -> Measured:
        """Read what :meth:`save` wrote."""
        tree = json.loads(path.read_text(encoding="utf-8"))
        paths = tree["axes"]
        curves = (Curve(dict(zip(paths, p, strict=True)), seed, tuple(y), s) for p, seed, y, s in tree["runs"])
        return cls(build_space(tree["space"]), tree["objective"], tuple(tree["steps"]), tuple(curves))

    def save(self, path: Path = DATA) -> None:
        """Write a JSON file with one run a line."""
        paths = [a.path for a in self.space.search]
        head = {"space": self.space.to_dict(), "objective": self.objective, "steps": self.steps, "axes": paths}
        rows = [
            json.dumps([[_short(c.point[p]) for p in paths], c.seed, [_short(y) for y in c.scores], round(c.seconds)])
            for c in self.curves
        ]
        lines = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
        text = ",\n".join([*lines, '"runs": [\n' + ",\n".join(rows) + "\n]"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{" + text + "}\n", encoding="utf-8")

    @cached_property
    def x_ND(self) -> np.ndarray:
        """The points in the unit cube."""
        return unit(self.space.search, [c.point for c in self.curves])

    @cached_property
    def y_NS(self) -> np.ndarray:
        """The curves."""
        return np.array([c.scores for c in self.curves])

    def repeated_deviation(self) -> tuple[np.ndarray, int]:
        """Standard deviation between runs of one point at each validation, and how many degrees of freedom it has."""
        squares, degrees = np.zeros(len(self.steps)), 0
        for same in _groups(self.x_ND):
            if len(same) > 1:
                squares += ((self.y_NS[same] - self.y_NS[same].mean(0)) ** 2).sum(0)
                degrees += len(same) - 1
        return np.sqrt(squares / max(1, degrees)), degrees


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _groups(x_ND: np.ndarray) -> list[np.ndarray]:
    """Indices of equal rows."""
    _, which = np.unique(x_ND, axis=0, return_inverse=True)
    return [np.flatnonzero(which == k) for k in range(which.max() + 1)]


def unit(axes: Sequence[Axis], points: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Points in the unit cube: a logarithm where the axis is one; a choice by its place in the list."""

    def place(axis: Axis, value: Any) -> float:
        if axis.kind == "choice":
            return axis.options.index(value) / max(1, len(axis.options) - 1)
        low, high = (math.log(v) if axis.log else v for v in (axis.low, axis.high))
        return ((math.log(value) if axis.log else value) - low) / (high - low)

    return np.array([[place(a, p[a.path]) for a in axes] for p in points])


def collect(folders: Sequence[Path]) -> Measured:
    """The curves of all runs that came to their end, of searches of one space."""
    from tuning.study.record import read_trials
    from tuning.study.search_folder import stored_search

    curves, found = [], None
    for folder in folders:
        search, study = stored_search(folder)
        found = found or search
        for row in read_trials(study, search.objectives):
            for run in row.runs:
                if run.ended:
                    curves.append(Curve(row.params, run.seed, tuple(v for _, v in run.curve), run.seconds))
    if found is None or not curves:
        raise SystemExit("no run has ended")
    every = found.base.train.at(found.base.train.eval_every)
    steps = tuple(range(every, found.steps + 1, every))
    whole = tuple(c for c in curves if len(c.scores) == len(steps))  # a score that is no number is not in a curve
    return Measured(found.space, found.objective, steps, whole)


# --- the process --------------------------------------------------------------------------------------------------


class Surrogate:
    """A Gaussian process over the points of a space whose values are learning curves.

    Attributes:
        steps: Of the validations.
        noise_SS: Covariance of what the point does not explain.
        lengths_D: Of the kernel, in units of the cube's side: long where a value hardly matters.

    Args:
        data: What to fit.
        fixed: Parameters of an earlier fit to use instead of looking for them.
    """

    def __init__(self, data: Measured, fixed: np.ndarray | None = None) -> None:
        self.axes, self.steps = data.space.search, data.steps
        self._x, self._y = data.x_ND, data.y_NS
        self._middle, self._scale = self._y.mean(0), self._y.std(0) + 1e-9
        self._z = (self._y - self._middle) / self._scale
        self.parameters = self._fit() if fixed is None else fixed
        self.lengths_D, self._gain, self._turn, self._mean = self._read(self.parameters)
        self._back = np.linalg.inv(self._turn)
        self.noise_SS = self._scale[:, None] * (self._back @ self._back.T) * self._scale
        self._draw = np.linalg.cholesky(self.noise_SS)
        self._solved = self._solve(np.arange(len(self._x)))
        self._seen, self._sizes = self._noise_sizes()

    # The standardised curves z, turned by T, are independent: T_s (z − m) ~ N(0, g_s K + I).

    def _read(self, found: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        d, s = self._x.shape[1], len(self.steps)
        lengths, gain, turn, mean = np.split(found, np.cumsum([d, s, s * s]))
        return np.exp(lengths), np.exp(gain), turn.reshape(s, s), mean

    def _fit(self) -> np.ndarray:
        import torch
        from scipy.optimize import minimize

        d, s, n = self._x.shape[1], len(self.steps), len(self._x)
        gaps = torch.from_numpy((self._x[:, None] - self._x[None]) ** 2)
        z, eye = torch.from_numpy(self._z), torch.eye(n, dtype=torch.float64)
        # A kernel's length grows with the root of the number of values, or all points are strangers.
        usual = 0.5 * math.log(d)

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            p = torch.tensor(flat, requires_grad=True)
            lengths, gain, turn, mean = torch.split(p, [d, s, s * s, s])
            kernel = torch.exp(-0.5 * (gaps / torch.exp(2 * lengths)).sum(-1))
            latent = (z - mean) @ turn.reshape(s, s).T
            total = -n * torch.linalg.slogdet(turn.reshape(s, s)).logabsdet
            for k in range(s):
                factor = torch.linalg.cholesky(torch.exp(gain[k]) * kernel + eye)
                half = torch.linalg.solve_triangular(factor, latent[:, k : k + 1], upper=False)
                total = total + factor.diagonal().log().sum() + 0.5 * (half**2).sum()
            total = total + 0.5 * ((lengths - usual) ** 2).sum() + 0.5 * (gain**2).sum() / 9 + 0.5 * (mean**2).sum()
            total.backward()
            return total.item(), p.grad.numpy()

        start = np.concatenate([np.full(d, usual), np.zeros(s), 1.4 * np.eye(s).ravel(), np.zeros(s)])
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 400})
        return np.asarray(found.x)

    def _kernel(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        gaps = (a[:, None] - b[None]) / self.lengths_D
        return np.exp(-0.5 * (gaps**2).sum(-1))

    def _solve(self, rows: np.ndarray) -> np.ndarray:
        kernel, latent = self._kernel(self._x[rows], self._x[rows]), (self._z[rows] - self._mean) @ self._turn.T
        eye = np.eye(len(rows))
        return np.stack([g * np.linalg.solve(g * kernel + eye, latent[:, k]) for k, g in enumerate(self._gain)], 1)

    def _predict(self, x: np.ndarray, rows: np.ndarray, solved: np.ndarray) -> np.ndarray:
        latent = self._kernel(x, self._x[rows]) @ solved
        return (latent @ self._back.T + self._mean) * self._scale + self._middle

    def truth(self, points: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """The curves of points without noise, one a row."""
        return self._predict(unit(self.axes, points), np.arange(len(self._x)), self._solved)

    def _noise_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """True last value of each run, and its squared residuals in units of the usual ones.

        A run that learns nothing ends where all of its kind end; one that learns ends here or there.
        """
        expected = self._predict(self._x, np.arange(len(self._x)), self._solved)[:, -1]
        squares = (self._y - self.left_out()) ** 2
        return expected, squares / squares.mean(0)

    def noise_scale(self, value: float) -> np.ndarray:
        """How many times the usual noise a run has at each validation whose true last value is this one.

        It is that of the measured runs near it.
        """
        near = np.exp(-0.5 * ((value - self._seen) / (0.5 * self._scale[-1])) ** 2) + 1e-12
        return np.sqrt(near @ self._sizes / near.sum())

    def noise(self, value: float, rng: np.random.Generator) -> np.ndarray:
        """What one run whose true last value is this one adds to its true curve."""
        return self.noise_scale(value) * (self._draw @ rng.standard_normal(len(self.steps)))

    def left_out(self) -> np.ndarray:
        """The curve of each run, predicted without the runs of its point, by the parameters of all."""
        found = np.empty_like(self._y)
        for same in _groups(self._x):
            rows = np.setdiff1d(np.arange(len(self._x)), same)
            found[same] = self._predict(self._x[same], rows, self._solve(rows))
        return found

    def explained(self) -> np.ndarray:
        """R² of the left-out predictions at each validation: 0 is no better than the mean, 1 is all."""
        return 1 - ((self._y - self.left_out()) ** 2).mean(0) / self._y.var(0)

    def describe(self) -> str:
        """What it explains, and what it does not, at the last validation."""
        error = 100 * float(np.sqrt(((self._y - self.left_out()) ** 2).mean(0))[-1])
        spread, usual = 100 * self._y.std(0)[-1], 100 * self.noise_SS[-1, -1] ** 0.5
        return (
            f"{len(self._x)} runs; left one out at the last step: R² {self.explained()[-1]:.2f}, error {error:.1f} "
            f"points of {spread:.1f} that runs differ by; noise {usual:.1f} on average and "
            f"{usual * self.noise_scale(float(self._seen.max()))[-1]:.1f} at the best"
        )


# --- command line -------------------------------------------------------------------------------------------------


def repeats_space(data: Measured, points: int = 4, seeds: int = 4) -> dict[str, Any]:
    """A search over some measured points, from the best to the median one, each with several seeds."""
    order = np.argsort(-data.y_NS[:, -1])[: max(points, len(data.curves) // 2)]
    chosen = order[np.linspace(0, len(order) - 1, points).round().astype(int)]
    first = [dict(data.curves[k].point) for k in chosen]
    return SPACE | {"budget": {"trials": points}, "repeats": {"seeds": seeds, "skip": False}, "first": first}


def check(data: Measured) -> None:
    """Print what the process explains."""
    made = Surrogate(data)
    print(made.describe())
    rows = {"step": data.steps, "R²": made.explained(), "spread": data.y_NS.std(0)}
    rows["noise"] = np.sqrt(np.diag(made.noise_SS))
    rows["left-out error"] = np.sqrt(((data.y_NS - made.left_out()) ** 2).mean(0))
    deviation, degrees = data.repeated_deviation()
    if degrees:
        rows[f"between seeds ({degrees})"] = deviation
        points = [data.curves[same[0]].point for same in _groups(data.x_ND) if len(same) > 1]
        scale = np.mean([made.noise_scale(v) ** 2 for v in made.truth(points)[:, -1]], 0) ** 0.5
        rows["noise there"] = scale * rows["noise"]
    for name, values in rows.items():
        print(f"{name:>20}", *(f"{v:>8.4g}" for v in values))
    for axis, length in sorted(zip(made.axes, made.lengths_D, strict=True), key=lambda a: a[1]):
        print(f"{axis.path:>28}  length {length:.2f}")


def main(words: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.surrogate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["space", "collect", "check"])
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="searches to collect")
    parser.add_argument("--repeats", action="store_true", help="with space: the search that shows the noise")
    parser.add_argument("--file", type=Path, default=DATA, help="default: bench/data/shapes.json")
    args = parser.parse_args(words)
    if args.what == "space":
        tree = repeats_space(Measured.load(args.file)) if args.repeats else SPACE
        print(yaml.safe_dump(tree, sort_keys=False), end="")
    elif args.what == "collect":
        collect(args.folders).save(args.file)
    else:
        check(Measured.load(args.file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
