"""Files for other programs: each is run by the program that it is for, and says what the network says."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.backbone_kit import network
from tests.tiny import tiny_tree
from ugrl.cli import main
from ugrl.config import Config, build, override, public_dict
from ugrl.errors import UgrlError
from ugrl.export import check
from ugrl.export.facts import licence_of, without_places
from ugrl.export.graph import _whole_padding, cell
from ugrl.train import checkpoint
from ugrl.train.build import build_net, build_prototypes
from ugrl.train.restore import restore

NAMES = ("cat", "dog | <b>", "cow")


def saved(folder: Path, **values: Any) -> Path:
    """A checkpoint of a network whose masks have every class, and whose streams are small beside the norms' eps."""
    cfg = build(override(tiny_tree(), {"data.shards": "/home/somebody/secret", **values}))
    net = build_net(cfg, len(NAMES), pretrained=False)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if cfg.model.backbone == "tiny":
            for stage in net.encoder.stages:
                stage.embed.norm.weight.mul_(3e-3)
        if cfg.model.norm == "sync_batch":
            net.decoder.norm.running_var.uniform_(0.01, 0.1, generator=g)
            net.decoder.norm.running_mean.normal_(0, 0.1, generator=g)
            net.decoder.norm.weight.uniform_(0.5, 2, generator=g)
        net.decoder.classify.weight.normal_(0, 1, generator=g)
        net.decoder.classify.bias.normal_(0, 0.1, generator=g)
    parts = {"model": net.state_dict(), "prototypes": build_prototypes(cfg, len(NAMES), net.dim).state_dict()}
    checkpoint.save(
        folder / "checkpoints",
        7,
        config=public_dict(cfg),
        class_names=NAMES,
        metrics={"seg_miou": 0.25, "tag_map": float("nan"), "step": 7.0},
        parts=parts,
        data="0123456789abcdef",
    )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("export") / "run")


def export(run: Path, to: str, out: Path, *more: str) -> dict[str, Any]:
    """The record of an export."""
    assert main(["export", str(run), "--to", to, "--out", str(out), *more]) == 0
    record: dict[str, Any] = json.loads((out / "export.json").read_text())
    assert record["iou"] >= check.LEAST_IOU and record["classes"] == ["background", *NAMES]
    assert {p.name for p in out.iterdir()} == {*record["files"], "export.json"}
    return record


def head(out: Path) -> dict[str, Any]:
    """The YAML of a card."""
    tree: dict[str, Any] = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    return tree


def test_a_hub_folder_is_a_checkpoint_with_a_card(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hub"
    record = export(run, "safetensors", out)
    assert record["largest_difference"] == 0.0
    assert "mean IoU of the masks 1.00000" in capsys.readouterr().out
    before, after = (restore(p, device=torch.device("cpu")) for p in (run, out))
    assert after.class_names == NAMES and after.step == 7
    for part in ("net", "prototypes"):
        tensors = getattr(after, part).state_dict()
        assert all(torch.equal(t, tensors[n]) for n, t in getattr(before, part).state_dict().items())
    assert "somebody" not in "".join(p.read_text() for p in out.iterdir() if p.suffix != ".safetensors")

    tree, text = head(out), (out / "README.md").read_text()
    assert tree["library_name"] == "ugrl" and "license" not in tree
    assert tree["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.25
    assert "not known (the shards are not there)" in text and "nan" not in text and "<b>" not in text
    assert "step 7 of 6" in text  # of the tree above

    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    assert main(["predict", str(out), str(tmp_path / "a.png"), "--out", str(tmp_path / "m"), "--device", "cpu"]) == 0
    assert (tmp_path / "m" / "a.png").is_file()


def test_a_score_of_an_earlier_step_is_not_in_the_head_of_a_card(run: Path, tmp_path: Path) -> None:
    old, out = tmp_path / "run", tmp_path / "hub"
    shutil.copytree(run, old)
    file = old / "checkpoints" / "step_00000007" / "state.json"
    state = json.loads(file.read_text())
    state["metrics"]["step"] = 5.0
    file.write_text(json.dumps(state))
    export(old, "safetensors", out)
    assert "model-index" not in head(out)
    assert "at the last validation before this step" in (out / "README.md").read_text()


def test_an_export_takes_the_place_of_its_own_files_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hub"
    export(run, "safetensors", out)
    export(run, "safetensors", out)
    words = ["export", str(run), "--to", "safetensors", "--out", str(out)]
    for name, why in (("note.txt", "has not written"), ("README.md", "was changed after")):
        old = (out / name).read_text() if (out / name).exists() else None
        (out / name).write_text("mine")
        capsys.readouterr()
        assert main(words) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"holds {name}, which" in err and why in err
        assert (out / name).read_text() == "mine"
        (out / name).write_text(old) if old else (out / name).unlink()
    assert main(words) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["hub"]  # no draft is left


def test_the_counts_of_the_card_are_those_of_the_runs_shards(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of other shards than those that the run was trained on nothing is told."""
    run = saved(tmp_path / "run", **{"data.shards": str(shards)})
    out = tmp_path / "a"
    export(run, "safetensors", out)
    assert "not known" in (out / "README.md").read_text()
    words = ["export", str(run), "--to", "safetensors", "--out", str(tmp_path / "b"), "--data", str(shards)]
    capsys.readouterr()
    assert main(words) == 2 and "other images" in capsys.readouterr().err

    file = checkpoint.find(run) / "state.json"
    from ugrl.data.shards import Manifest

    now = Manifest.load(shards).fingerprint("train", "val")
    file.write_text(file.read_text().replace("0123456789abcdef", now))
    assert main(words) == 0
    assert "| train | 20 | 20 |" in (tmp_path / "b" / "README.md").read_text()


@pytest.fixture
def onnxruntime() -> Any:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="pip install 'ugrl[onnx]'")
    return pytest.importorskip("onnxruntime", reason="pip install 'ugrl[onnx]'")


def test_onnx_says_what_the_network_says_at_any_size(run: Path, onnxruntime: Any, tmp_path: Path) -> None:
    record = export(run, "onnx", tmp_path / "out")
    assert record["size"] is None and record["largest_difference"] < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    (pixels,), (logits, scores) = session.get_inputs(), session.get_outputs()
    assert (pixels.name, pixels.type, pixels.shape) == ("pixels", "tensor(uint8)", ["batch", "height", "width", 3])
    assert (logits.name, logits.shape) == ("logits", ["batch", 4, "height", "width"])
    assert (scores.name, scores.shape) == ("scores", ["batch", 3])
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["background", *NAMES]
    found = session.run(None, {"pixels": np.zeros((3, 33, 47, 3), np.uint8)})
    assert found[0].shape == (3, 4, 33, 47) and found[1].shape == (3, 3)


def test_onnx_of_one_size_takes_one_image_of_it(run: Path, onnxruntime: Any, tmp_path: Path) -> None:
    record = export(run, "onnx", tmp_path / "out", "--size", "49", "61")
    assert record["size"] == [49, 61] and record["largest_difference"] < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    assert [p.shape for p in session.get_inputs()] == [[1, 49, 61, 3]]
    assert [p.shape for p in session.get_outputs()] == [[1, 4, 49, 61], [1, 3]]


def test_a_program_of_one_size_needs_nothing_of_this_project(run: Path, tmp_path: Path) -> None:
    record = export(run, "torch", tmp_path / "out", "--size", "49", "61")
    assert record["size"] == [49, 61] and record["largest_difference"] < 1e-4
    extra = {"classes.json": ""}
    program = torch.export.load(tmp_path / "out" / "model.pt2", extra_files=extra)
    assert json.loads(extra["classes.json"]) == ["background", *NAMES]
    logits, scores = program.module()(torch.zeros((1, 49, 61, 3), dtype=torch.uint8))
    assert logits.shape == (1, 4, 49, 61) and bool(((scores > 0) & (scores < 1)).all())


def test_segformer_of_transformers_gives_the_same_logits(run: Path, tmp_path: Path) -> None:
    """The streams of this network are so small that norms with another eps would show."""
    transformers = pytest.importorskip("transformers", reason="pip install 'ugrl[transformers]'")
    record = export(run, "transformers", tmp_path / "out")
    assert record["largest_difference"] < 2e-4
    model = transformers.SegformerForSemanticSegmentation.from_pretrained(str(tmp_path / "out")).eval()
    assert list(model.config.strides) == [4, 2, 1, 1] and model.config.id2label[1] == "cat"
    net = restore(run, device=torch.device("cpu")).net
    x = torch.randn(1, 3, 57, 83, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = net.segment(x), model(pixel_values=x).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        for stage in model.segformer.stages if hasattr(model.segformer, "stages") else ():
            for module in stage.modules():
                if isinstance(module, torch.nn.LayerNorm):
                    module.eps = 1e-6
        assert not torch.allclose(model(pixel_values=x).logits, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"model.norm": "group"}, "model.norm is group, and SegFormer's decoder has a batch norm; expected --to onnx"),
        ({"model.backbone": "timm/test_resnet", "data.crop": 64}, "timm/test_resnet is no MiT"),
    ],
)
def test_what_is_no_segformer_is_refused(
    values: dict[str, Any], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="pip install 'ugrl[transformers]'")
    run = saved(tmp_path / "run", **values)
    assert main(["export", str(run), "--to", "transformers", "--out", str(tmp_path / "out")]) == 2
    err = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
    assert len(err) == 1 and why in err[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{tmp}/none --to torch --out {tmp}/x", "no checkpoint there; expected a run folder"),
        ("{run} --to torch --out {tmp}/full", "--out {tmp}/full: holds photo.jpg, which ugrl export has not written"),
        ("{run} --to torch --out {tmp}/full/photo.jpg", "photo.jpg: is a file"),
        ("{run} --to torch --out {tmp}/x --size 20 15", "'15' is no side of an image; expected 16 … 8192 px"),
        ("{run} --to safetensors --out {tmp}/x --size 32 32", "--size is for --to onnx and --to torch"),
        ("{run} --to torch --out {tmp}/x --images {tmp}/full/photo.jpg", "photo.jpg: not "),
        ("{run} --to torch --out {tmp}/x --data {tmp}/full", "manifest"),
        ("{run} --to onnx --out {tmp}/x", "--to onnx needs onnxruntime; pip install 'ugrl[onnx]' or pip install"),
        ("{run} --to tflite --out {tmp}/x", "invalid choice: 'tflite'"),
    ],
)
def test_bad_input_is_one_line(
    words: str,
    message: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, sys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").write_text("no image")
    try:
        status = main(["export", *words.format(run=run, tmp=tmp_path).split()])
    except SystemExit as ended:
        status = int(ended.code or 0)
    assert status == 2
    err = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
    assert len(err) == 1 and message.format(tmp=tmp_path) in err[0]
    assert not (tmp_path / "x").exists()


def test_files_that_say_something_else_are_refused(run: Path) -> None:
    net = restore(run, device=torch.device("cpu")).net
    images = check.sample_images([], None, 32)
    assert len({i.shape for i in images}) == 3 and all(i.shape[0] % 2 and i.shape[1] % 2 for i in images)

    def exact(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, scores = check.reference(net, batch)
        return logits.numpy(), scores.numpy()

    def other(batch: np.ndarray) -> tuple[np.ndarray, None]:
        return -exact(batch)[0], None

    def broken(batch: np.ndarray) -> tuple[np.ndarray, None]:
        logits = exact(batch)[0].copy()
        logits[0, :, 0, 0] = np.nan
        return logits, None

    found = check.compare(net, exact, images)
    assert (found.iou, found.logits, found.scores) == (1.0, 0.0, 0.0)
    check.refuse_worse(found, "it")
    for runner in (other, broken):
        with pytest.raises(UgrlError, match="was not written"):
            check.refuse_worse(check.compare(net, runner, images), "it")


def test_sides_are_multiples_where_layers_of_timm_ask_for_the_size() -> None:
    cells = {name: cell(network(f"timm/{name}", crop=64)) for name in ("test_vit", "resnet18")}
    assert cells == {"test_vit": 16, "resnet18": 1}
    assert cell(network("timm/tf_efficientnet_lite0", crop=64)) == 32
    images = check.sample_images([], None, 64, 32)
    assert all(i.shape[0] % 32 == 0 and i.shape[1] % 32 == 0 for i in images) and len({i.shape for i in images}) == 3


def test_padding_in_whole_numbers_is_that_of_timm() -> None:
    from timm.layers import padding

    net, before = network("timm/test_resnet", crop=64), padding.get_same_padding
    cases = [(x, k, s, d) for x in range(1, 70) for k in (1, 3, 5, 7) for s in (1, 2, 3) for d in (1, 2)]
    wanted = [before(*c) for c in cases]
    with _whole_padding(net):
        assert [padding.get_same_padding(*c) for c in cases] == wanted
    assert padding.get_same_padding is before


def test_a_licence_is_told_where_it_is_known(run: Path) -> None:
    net = restore(run, device=torch.device("cpu")).net
    assert licence_of(None, net) is None
    assert licence_of("some/mit", net) is None
    found = licence_of("nvidia/mit-b1", net)
    assert found is not None and found[0] == "other" and found[2]
    assert licence_of("package", net) == ("apache-2.0", None, None)
    net.encoder.info = replace(net.encoder.info, licence="dinov3-license")
    assert licence_of("timm", net) == ("other", "dinov3-license", None)


def test_a_published_configuration_names_no_place(tmp_path: Path) -> None:
    values = {"data.cache_dir": "/x", "train.mlflow": "http://x", "cluster.address": "x:1", "cluster.storage": "/x"}
    for weights, kept in (("nvidia/mit-b1", "nvidia/mit-b1"), (str(tmp_path), None), ("own/weights.pth", None)):
        cfg: Config = build(override({}, {"data.shards": "/x", "model.weights": weights, **values}))
        found = without_places(cfg)
        assert found.model.weights == kept
        assert (found.data.shards, found.data.cache_dir, found.train.mlflow) == (None, None, None)
        assert (found.cluster.address, found.cluster.storage) == (None, None)
