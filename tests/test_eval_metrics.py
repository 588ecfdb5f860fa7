from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.reference_metrics import ref_auroc, ref_average_precision
from ugrl.errors import UgrlError
from ugrl.eval.evaluate import collapse
from ugrl.eval.metrics import Confusion, TagMetrics, UncertaintyMetrics, auroc, average_precision


def test_confusion_by_hand():
    c = Confusion(4)
    c.add(torch.tensor([[0, 0, 1], [1, 3, 2]]), torch.tensor([[0, 1, 1], [1, 0, 255]], dtype=torch.uint8))
    # label 0: one right, one as 3; label 1: two right, one as 0; class 2 only under an ignored pixel.
    assert c.matrix_CC.tolist() == [[1, 0, 0, 1], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert c.matrix_CC.dtype == torch.int64
    assert c.iou_C[:2].tolist() == [1 / 3, 2 / 3]
    assert c.iou_C[2:].isnan().all()  # 3 is predicted but absent from the ground truth: no part of the mean
    assert c.miou == 0.5
    table = c.table(["background", "a", "b", "c"])
    assert list(table) == ["background", "a", "b", "c"] and table["a"] == 2 / 3 and math.isnan(table["c"])


def test_confusion_adds_up_and_is_reduced_once():
    c, whole = Confusion(3), Confusion(3)
    g = torch.Generator().manual_seed(0)
    pred, label = (torch.randint(0, 3, (4, 5, 6), generator=g) for _ in range(2))
    for k in range(4):
        c.add(pred[k], label[k])
    whole.add(pred, label)
    assert torch.equal(c.matrix_CC, whole.matrix_CC) and int(c.matrix_CC.sum()) == 120
    c.reduce()
    c.reduce()
    assert torch.equal(c.matrix_CC, whole.matrix_CC)
    with pytest.raises(UgrlError, match="after reduce"):
        c.add(pred, label)


def test_confusion_of_nothing_has_no_mean():
    c = Confusion(3)
    c.add(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255))
    assert math.isnan(c.miou) and int(c.matrix_CC.sum()) == 0


def test_confusion_refuses_what_it_cannot_count():
    c = Confusion(3)
    with pytest.raises(UgrlError, match="pixel 1 has prediction 255 and label 0, expected 0 to 2"):
        c.add(torch.tensor([0, 255]), torch.tensor([0, 0]))
    with pytest.raises(UgrlError, match="prediction -1"):
        c.add(torch.tensor([-1]), torch.tensor([0]))
    with pytest.raises(UgrlError, match="label 3"):
        c.add(torch.tensor([0]), torch.tensor([3]))
    with pytest.raises(UgrlError, match="prediction .2,., label .3,."):
        c.add(torch.zeros(2), torch.zeros(3))
    with pytest.raises(UgrlError, match="2 class names, expected 3"):
        c.table(["a", "b"])
    assert int(c.matrix_CC.sum()) == 0
    c.add(torch.tensor([255]), torch.tensor([255]))
    assert int(c.matrix_CC.sum()) == 0


def test_average_precision_by_hand():
    score = torch.tensor([0.1, 0.4, 0.35, 0.8])
    # Thresholds 0.8 (P 1, R 1/2), 0.4 (1/2, 1/2), 0.35 (2/3, 1): 1/2 + 1/2 * 2/3.
    assert average_precision(score, torch.tensor([0, 0, 1, 1]).bool()) == pytest.approx(5 / 6, abs=1e-12)
    # All equal: one threshold, precision is the share of positives.
    assert average_precision(torch.ones(4), torch.tensor([1, 0, 0, 0]).bool()) == 0.25
    assert math.isnan(average_precision(score, torch.zeros(4).bool()))
    assert average_precision(score, torch.ones(4).bool()) == 1


def test_auroc_by_hand():
    score = torch.tensor([0.1, 0.4, 0.4, 0.8])
    # Pairs: (0.4, 0.1) right, (0.4, 0.4) half, (0.8, 0.1) and (0.8, 0.4) right.
    assert auroc(score, torch.tensor([0, 0, 1, 1]).bool()) == 3.5 / 4
    assert auroc(torch.ones(4), torch.tensor([0, 1, 1, 1]).bool()) == 0.5
    assert math.isnan(auroc(score, torch.ones(4).bool())) and math.isnan(auroc(score, torch.zeros(4).bool()))


def test_rank_metrics_equal_loops_with_ties():
    g = torch.Generator().manual_seed(3)
    for levels in (3, 1000):
        score = torch.randint(0, levels, (60,), generator=g).double() / levels
        positive = torch.rand(60, generator=g) < 0.3
        args = score.tolist(), positive.tolist()
        assert average_precision(score, positive) == pytest.approx(ref_average_precision(*args), abs=1e-12)
        assert auroc(score, positive) == pytest.approx(ref_auroc(*args), abs=1e-12)


def test_tag_metrics_by_hand():
    m = TagMetrics(3)
    m.add(torch.tensor([[0.9, 0.2, 0.6], [0.6, 0.7, 0.1]]), torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]))
    m.add(torch.tensor([[0.5, 0.8, 0.3]]), torch.tensor([[1.0, 0.0, 0.0]]))
    m.reduce()
    out = m.compute()
    # Class 0: scores 0.9+, 0.6-, 0.5+; tp 1 (0.5 is not above 0.5), guesses 2, positives 2.
    # Class 1: 0.8-, 0.7+, 0.2+; tp 1, guesses 2, positives 2. Class 2 has no positive: one false guess.
    assert out["tag_map"] == pytest.approx((5 / 6 + (1 / 2 * 1 / 2 + 1 / 2 * 2 / 3)) / 2, abs=1e-12)
    assert out["tag_f1"] == 0.5
    assert out["tag_f1_micro"] == pytest.approx(2 * 2 / (5 + 4), abs=1e-12)
    # Images: 1 of 2 guesses and 2 tags; 1 of 2 and 1; 0 of 1 and 1.
    assert out["tag_f1_image"] == pytest.approx((2 / 4 + 2 / 3 + 0 / 2) / 3, abs=1e-12)


def test_tag_metrics_of_nothing_and_of_wrong_shapes():
    assert all(math.isnan(v) for v in TagMetrics(3).compute().values())
    m = TagMetrics(3)
    m.add(torch.rand(2, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 3))
    m.reduce()
    assert all(math.isnan(v) for v in m.compute().values())
    with pytest.raises(UgrlError, match="after reduce"):
        m.add(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(UgrlError, match=r"expected two \(B, 3\)"):
        TagMetrics(3).add(torch.zeros(2, 4), torch.zeros(2, 4))


def test_uncertainty_metrics_by_hand():
    m = UncertaintyMetrics()
    iou = torch.tensor([0.1, 0.2, 0.8, 0.9, 0.5])
    u = torch.tensor([0.7, 0.2, 0.3, 0.1, math.nan])
    prob = torch.tensor([0.6, 0.5, 0.9, 0.55, 0.0])
    m.add(u, iou, prob)
    out = m.compute()
    # The pair without u is out; the median is 0.5, below it 0.1 and 0.2.
    assert out == {"u_auroc": 0.75, "p_auroc": 0.75, "u_pairs": 4.0}
    m.add(torch.tensor([0.0]), torch.tensor([0.95]), torch.tensor([0.2]))
    # Median 0.8; u: 0.7 and 0.2 against 0.3, 0.1, 0: 5 of 6; 1-p: 0.4, 0.5 against 0.1, 0.45, 0.8: 3 of 6.
    out = m.compute()
    assert out["u_auroc"] == pytest.approx(5 / 6) and out["p_auroc"] == pytest.approx(3 / 6)


def test_uncertainty_metrics_without_a_choice():
    m = UncertaintyMetrics()
    assert m.compute()["u_pairs"] == 0 and math.isnan(m.compute()["u_auroc"])
    m.add(torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.5]), torch.tensor([0.1, 0.2]))
    assert math.isnan(m.compute()["u_auroc"])  # no IoU below the median
    with pytest.raises(UgrlError, match=r"expected three \(P,\)"):
        m.add(torch.zeros(2), torch.zeros(3), torch.zeros(2))


def collectors(start: int, end: int):
    """Collectors that saw the images start…end of a fixed set."""
    g = torch.Generator().manual_seed(9)
    pred, label = (torch.randint(0, 4, (7, 5, 5), generator=g) for _ in range(2))
    score, tags = torch.rand(7, 3, generator=g), (torch.rand(7, 3, generator=g) < 0.5).float()
    u, iou, prob = (torch.rand(7, generator=g) for _ in range(3))
    c, t, m = Confusion(4), TagMetrics(3), UncertaintyMetrics()
    if end > start:
        c.add(pred[start:end], label[start:end])
        t.add(score[start:end], tags[start:end])
        m.add(u[start:end], iou[start:end], prob[start:end])
    for x in (c, t, m):
        x.reduce()
    return {"miou": c.miou, **t.compute(), **m.compute()}


def _rank(rank: int, path: str, queue) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    uneven = collectors(*((0, 5), (5, 7))[rank])
    idle = collectors(*((0, 7), (7, 7))[rank])
    nothing = collectors(0, 0)
    queue.put((uneven, idle, nothing))
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_read_what_one_rank_reads(tmp_path):
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_rank, args=(r, str(tmp_path / "store"), queue)) for r in range(2)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(90)
    assert [w.exitcode for w in workers] == [0, 0]
    want = collectors(0, 7)
    assert want["u_pairs"] == 7
    for _ in workers:
        uneven, idle, nothing = queue.get()
        assert uneven == pytest.approx(want) and idle == pytest.approx(want)
        assert math.isnan(nothing["miou"]) and nothing["u_pairs"] == 0


def test_what_no_skill_scores():
    c = Confusion(4)
    c.add(torch.zeros(10, dtype=torch.int64), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2, 255]))
    # Six of nine counted pixels are background; of the three classes in the ground truth two score nothing.
    assert c.background_miou == pytest.approx((6 / 9) / 3) == c.miou
    assert c.only == 0
    c.add(torch.tensor([3]), torch.tensor([255]))
    assert c.only == 0  # an ignored pixel is not predicted
    c.add(torch.tensor([1]), torch.tensor([1]))
    assert c.only is None and c.background_miou == pytest.approx((6 / 10) / 3) and c.miou > c.background_miou
    assert Confusion(2).only is None and math.isnan(Confusion(2).background_miou)

    m = TagMetrics(3)
    tags = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    m.add(torch.full((4, 3), 0.3), tags)
    out = m.compute()
    assert out["tag_prevalence"] == (1 / 4 + 3 / 4) / 2 == out["tag_map"]  # equal scores rank by chance
    tables = m.tables(["a", "b", "c"])
    assert tables["tag_prevalence"] == {"a": 0.25, "b": 0.75, "c": 0.0}
    assert tables["tag_ap"]["b"] == 0.75 and math.isnan(tables["tag_ap"]["c"])


@pytest.mark.parametrize(
    ("metrics", "only", "words"),
    [
        ({"seg_miou": 0.3, "seg_background_miou": 0.12}, "background", "predicts background everywhere"),
        ({"seg_miou": 0.02, "seg_background_miou": 0.12}, "dog", "predicts dog everywhere"),
        ({"seg_miou": 0.1203, "seg_background_miou": 0.12}, None, "that of an empty mask (12.0 %)"),
        ({"tag_map": 0.3, "tag_prevalence": 0.3}, None, "ranking by chance (30.0 %)"),
        ({"seg_miou": 0.13, "seg_background_miou": 0.12, "tag_map": 0.3, "tag_prevalence": 0.3}, None, ""),
        ({"seg_miou": 0.08, "seg_background_miou": 0.12}, None, ""),  # bad, but not for want of an answer
        ({"tag_map": 0.4, "tag_prevalence": 0.3}, None, ""),
    ],
)
def test_a_collapsed_predictor_is_called_so(metrics: dict[str, float], only: str | None, words: str) -> None:
    verdict = collapse(metrics, only)
    assert words in verdict and bool(verdict) == bool(words)
