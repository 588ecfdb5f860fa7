"""``ugrl export``: a run becomes files that other programs read, checked against the network before they are there."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ugrl.command import folder_for
from ugrl.errors import ConfigError
from ugrl.export import FORMATS
from ugrl.text import line

if TYPE_CHECKING:
    from ugrl.export.check import Runner
    from ugrl.export.facts import Facts
    from ugrl.train.restore import Restored

Choose = Callable[..., tuple[Path, str]]

EXAMPLES = """\
examples:
  ugrl export runs/voc --to onnx --out voc-onnx --best                 images of any size
  ugrl export runs/voc --to onnx --out voc-onnx --size 512 512         one size, one image at a time
  ugrl export runs/voc --to safetensors --out voc-hub                  hf upload OWNER/NAME voc-hub
  ugrl export runs/voc --to transformers --out voc-segformer           a MiT as SegformerForSemanticSegmentation
  ugrl export runs/voc --to labels --data shards --out voc-labels      pseudo-labels of split 'train', VOC's layout
"""
#: Modules that a format needs beside this package's own, and the distributions that bring them.
NEEDS = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "transformers": ("transformers",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ugrl export``."""
    parser.description = "Write a trained network for other programs, and compare the files with the network."
    parser.epilog = EXAMPLES + (parser.epilog or "")
    parser.add_argument("checkpoint", help="a run folder or one of its checkpoints/step_…, a path or a URI")
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    parser.add_argument("--to", choices=tuple(FORMATS), required=True, help=formats)
    parser.add_argument("--out", type=folder_for, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--size",
        type=_side,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the images, in px; default: any (onnx, torch)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="images to compare on (default: four generated)",
    )
    parser.add_argument(
        "--data",
        metavar="DIR|URI",
        help="the run's shards, for the model card (default: where they were); with --to labels, what is labelled",
    )
    parser.add_argument("--split", help="of --to labels (default: train)")
    parser.add_argument(
        "--device", metavar="NAME", help="of --to labels: cpu, cuda, … (default: cuda where there is one)"
    )
    parser.add_argument("--best", action="store_true", help="the best checkpoint of the run instead of the newest")


def _side(text: str) -> int:
    if not text.isdecimal() or not 16 <= int(text[:9]) <= 8192:
        raise argparse.ArgumentTypeError(f"{text!r} is no side of an image; expected 16 … 8192 px")
    return int(text)


def refuse_missing(to: str) -> None:
    """Refuse a format whose packages are not installed.

    Raises:
        ConfigError: Names them, and how to install them.
    """
    missing = [name for name in NEEDS.get(to, ()) if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--to {to} needs {', '.join(missing)}; pip install 'ugrl[{to}]' or pip install {' '.join(missing)}"
        )


def run(args: argparse.Namespace, choose: Choose) -> int:
    """Run ``ugrl export``.

    Args:
        args: Of the command.
        choose: Finds the checkpoint, and tells of the choice.

    Returns:
        The exit status, 0.

    Raises:
        UgrlError: Arguments that do not go together, a checkpoint or images that cannot be used, a network that does
            not fit the format, or files that do not say what the network says.
    """
    size = tuple(args.size) if args.size else None
    if size is not None and args.to not in ("onnx", "torch"):
        raise ConfigError(f"--size is for --to onnx and --to torch; files of {args.to} take images of any size")
    if args.to == "labels":
        return run_labels(args, choose)
    for option in ("split", "device"):
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option} is for --to labels; expected none of it with --to {args.to}")
    refuse_missing(args.to)

    from ugrl.export.folder import refuse_foreign

    refuse_foreign(args.out)
    import torch

    from ugrl.export.check import compare, refuse_worse, sample_images
    from ugrl.export.facts import gather
    from ugrl.export.folder import draft, publish
    from ugrl.export.graph import cell, smallest
    from ugrl.terminal import Terminal
    from ugrl.train.restore import restore

    path, chosen = choose(args.checkpoint, best=args.best)
    got = restore(path, device=torch.device("cpu"))
    facts = gather(path, got.net, args.data)
    captured = args.to in ("onnx", "torch")
    least = smallest(got.net, size) if captured else got.net.min_size
    if size is not None and min(size) < least:
        raise ConfigError(f"--size {size[0]} {size[1]}: {got.net.backbone} takes sides of {least} px and more")
    step = cell(got.net) if captured and size is None else 1
    images = sample_images(args.images, size, least, step)
    console = Terminal(stderr=True)
    console.print(f"{chosen}; {got.net.backbone}, {len(got.class_names)} classes and background", soft_wrap=True)
    with draft(args.out) as made:
        runner = write(args.to, got, made, size, facts)
        found = compare(got.net, runner, images, at_once=1 if size else 2)
        refuse_worse(found, f"--to {args.to}")
        _write_card(made, args.to, facts, found.text, _size_text(size, least, step))
        record = {
            "to": args.to,
            "step": got.step,
            "backbone": got.net.backbone,
            "classes": ["background", *got.class_names],
            "size": list(size) if size else None,
            "least": least,
            "multiple": step,
            "iou": found.iou,
            "largest_difference": found.logits,
        }
        written = publish(made, args.out, record)
    for name, count in written.items():
        print(f"{line(args.out / name, 1000)}  {count / 1e6:.2f} MB")
    print(f"compared with the network on {found.text}; {found.seconds:.2f} s for its passes")
    return 0


def run_labels(args: argparse.Namespace, choose: Choose) -> int:
    """``ugrl export --to labels``; as :func:`run`."""
    if args.data is None:
        raise ConfigError("--to labels without --data; expected the shards whose images are labelled")
    if args.images:
        raise ConfigError("--images are for formats of a network; --to labels takes the images of --data and --split")
    args.split = args.split or "train"
    from ugrl.export import labels

    labels.refuse_taken(args.out)
    return labels.run(args, *choose(args.checkpoint, best=args.best))


def write(to: str, got: Restored, folder: Path, size: tuple[int, int] | None, facts: Facts) -> Runner:
    """Write the files of a format; returns what runs them."""
    if to == "onnx":
        from ugrl.export import to_onnx

        return to_onnx.write(got, folder, size)
    if to == "torch":
        from ugrl.export import to_torch

        return to_torch.write(got, folder, size)
    if to == "transformers":
        from ugrl.export import to_transformers

        return to_transformers.write(got, folder)
    from ugrl.export import to_safetensors

    return to_safetensors.write(got, folder, facts)


def _size_text(size: tuple[int, int] | None, least: int, step: int) -> str:
    if size is not None:
        return f"One image at a time, of {size[0]} × {size[1]} px."
    multiples = f" that are multiples of {step} px" if step > 1 else ""
    return f"Images of any size with sides of {least} px and more{multiples}."


def _write_card(folder: Path, to: str, facts: Facts, check: str, size: str) -> None:
    from ugrl.export.card import card

    (folder / "README.md").write_text(card(facts, to, check, size), encoding="utf-8")
