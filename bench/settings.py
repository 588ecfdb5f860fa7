"""Settings of Table 3 on the generated data set, from scratch: what they reach over time, by seed.

Each run is ``ugrl-train --config shapes method.setting=S seed=N``; finished runs in ``--out`` are not repeated.

    python -m bench.settings --settings IV Base --seeds 0 1 2 --parallel 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

METRICS = ("tag_f1", "cam_miou", "seg_miou")


def train(out: Path, setting: str, seed: int, overrides: list[str]) -> list[dict[str, float]]:
    """Run or continue one training run; returns its validations."""
    words = [
        "--config",
        "shapes",
        "--out",
        str(out),
        "--resume",
        "--quiet",
        f"method.setting={setting}",
        f"seed={seed}",
    ]
    subprocess.run(
        [sys.executable, "-m", "cluster.cli", *words, *overrides],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    lines = [json.loads(s) for s in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {"step": v["step"], **{k.removeprefix("val/"): x for k, x in v.items() if k.startswith("val/")}}
        for v in lines
        if "val/seg_miou" in v
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=["IV", "Base"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/settings"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()

    # The data set is made once, before runs side by side would each make it.
    from cluster.cli import configs
    from ugrl.train.run import ensure_shards

    ensure_shards(configs.load("shapes", configs.parse_overrides(args.overrides)), None)
    jobs = [(setting, seed) for seed in args.seeds for setting in args.settings]
    with ThreadPoolExecutor(args.parallel) as pool:
        runs = list(pool.map(lambda j: train(args.out / f"{j[0]}-{j[1]}", j[0], j[1], args.overrides), jobs))
    done = dict(zip(jobs, runs, strict=True))

    print(
        "percent on val, mean over seeds " + ", ".join(map(str, args.seeds)) + " (each seed's value at the last step)\n"
    )
    print("| setting | step | " + " | ".join(METRICS) + " | u_auroc | p_auroc |")
    print("| --- | ---: |" + " ---: |" * (len(METRICS) + 2))
    for setting in args.settings:
        of = [done[setting, seed] for seed in args.seeds]
        for k, line in enumerate(of[0]):
            cells = []
            for name in (*METRICS, "u_auroc", "p_auroc"):
                values = [100 * run[k][name] for run in of if name in run[k]]
                text = f"{statistics.mean(values):.1f}" if values else "-"
                if k == len(of[0]) - 1 and len(values) > 1:
                    text += " (" + ", ".join(f"{v:.1f}" for v in values) + ")"
                cells.append(text)
            print(f"| {setting} | {line['step']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
