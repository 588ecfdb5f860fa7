"""The method's cost over plain classification: its pieces are the step, and every encoder has a plain side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.backbones import CASES, HEAD, PARTS, TABLE, Case, Parts, facts, made, main, make_ours, make_plain, row
from bench.measure import Context


@pytest.mark.parametrize("backbone", ["tiny", "timm/test_resnet", "timm/test_vit"])
def test_the_pieces_of_a_step_are_the_step(backbone: str) -> None:
    """Every gradient, and no time lost."""
    case = Case(backbone, 64, 2)
    step_fn, batch = made(case)
    step_fn(batch, 1).loss.backward()
    parts = Parts(case)
    found = parts()
    assert set(found) == set(PARTS) and all(v >= 0 for v in found.values()) and found["classification"] > 0
    ours = dict(parts.step_fn.net.named_parameters())
    for name, p in step_fn.net.named_parameters():
        if p.grad is None:
            assert ours[name].grad is None or not ours[name].grad.any(), name
        else:
            torch.testing.assert_close(ours[name].grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "backbone", ["tiny", "timm/test_resnet", "timm/mobilenetv3_small_050", "timm/pvt_v2_b0", "timm/test_vit"]
)
def test_both_sides_take_a_step(backbone: str) -> None:
    case = Case(backbone, 64, 2)
    assert 0 < make_plain(case)() < 3 and make_ours(case)() > 0


def test_a_row_has_every_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ctx = Context(False, torch.device("cpu"), 1, tmp_path, lambda text: None)
    found = row("timm/test_vit", ctx, 2, Case("timm/test_vit", 64, 1))
    assert found.count("|") == HEAD.splitlines()[0].count("|") and "attention" in found
    main(["--parts", "--crop", "64", "--batch", "1", "--rounds", "1", "tiny"])
    out = capsys.readouterr().out
    assert all(f"| {part} |" in out for part in PARTS) and "whole step" in out
    assert {case.backbone for case in CASES.values()} == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_the_documentation_says_what_an_encoder_is(name: str) -> None:
    page = (Path(__file__).parent.parent / "docs" / "backbones.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [cells[:7] for cells in rows] == [facts(name)]
