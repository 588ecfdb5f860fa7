from __future__ import annotations

import http.server
import json
import re
import socket
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ugrl.errors import CheckpointError
from ugrl.model.encoder import SPECS, MiT
from ugrl.model.weights import convert, load_backbone_weights

# The names of one block in the authors' mit_b*.pth, written out.
SEGFORMER_BLOCK = """
block1.0.norm1.weight block1.0.norm1.bias
block1.0.attn.q.weight block1.0.attn.q.bias block1.0.attn.kv.weight block1.0.attn.kv.bias
block1.0.attn.proj.weight block1.0.attn.proj.bias block1.0.attn.sr.weight block1.0.attn.sr.bias
block1.0.attn.norm.weight block1.0.attn.norm.bias
block1.0.norm2.weight block1.0.norm2.bias
block1.0.mlp.fc1.weight block1.0.mlp.fc1.bias
block1.0.mlp.dwconv.dwconv.weight block1.0.mlp.dwconv.dwconv.bias
block1.0.mlp.fc2.weight block1.0.mlp.fc2.bias
""".split()
# The names of one block in the hub's files.
HUGGINGFACE_BLOCK = """
encoder.block.0.0.layer_norm_1.weight encoder.block.0.0.layer_norm_1.bias
encoder.block.0.0.attention.self.query.weight encoder.block.0.0.attention.self.query.bias
encoder.block.0.0.attention.self.key.weight encoder.block.0.0.attention.self.key.bias
encoder.block.0.0.attention.self.value.weight encoder.block.0.0.attention.self.value.bias
encoder.block.0.0.attention.self.sr.weight encoder.block.0.0.attention.self.sr.bias
encoder.block.0.0.attention.self.layer_norm.weight encoder.block.0.0.attention.self.layer_norm.bias
encoder.block.0.0.attention.output.dense.weight encoder.block.0.0.attention.output.dense.bias
encoder.block.0.0.layer_norm_2.weight encoder.block.0.0.layer_norm_2.bias
encoder.block.0.0.mlp.dense1.weight encoder.block.0.0.mlp.dense1.bias
encoder.block.0.0.mlp.dwconv.dwconv.weight encoder.block.0.0.mlp.dwconv.dwconv.bias
encoder.block.0.0.mlp.dense2.weight encoder.block.0.0.mlp.dense2.bias
""".split()


def make(name: str = "tiny", seed: int = 0) -> MiT:
    torch.manual_seed(seed)
    net = MiT(SPECS[name])
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p))
    return net


def to_segformer(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for name, tensor in state.items():
        stage, rest = re.fullmatch(r"stages\.(\d)\.(.+)", name).groups()
        i = int(stage) + 1
        rest = rest.replace("mlp.dwconv.", "mlp.dwconv.dwconv.")
        if rest.startswith("embed."):
            out[f"patch_embed{i}.{rest[6:]}"] = tensor
        elif rest.startswith("blocks."):
            out[f"block{i}.{rest[7:]}"] = tensor
        else:
            out[f"norm{i}.{rest[5:]}"] = tensor
    return out


def to_huggingface(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    parts = {
        "norm1": "layer_norm_1",
        "norm2": "layer_norm_2",
        "attn.q": "attention.self.query",
        "attn.sr": "attention.self.sr",
        "attn.norm": "attention.self.layer_norm",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "mlp.dense1",
        "mlp.fc2": "mlp.dense2",
        "mlp.dwconv": "mlp.dwconv.dwconv",
    }
    for name, tensor in state.items():
        base, leaf = name.rsplit(".", 1)
        stage, rest = re.fullmatch(r"stages\.(\d)\.(.+)", base).groups()
        if rest == "norm":
            out[f"encoder.layer_norm.{stage}.{leaf}"] = tensor
        elif rest.startswith("embed."):
            kind = {"proj": "proj", "norm": "layer_norm"}[rest[6:]]
            out[f"encoder.patch_embeddings.{stage}.{kind}.{leaf}"] = tensor
        else:
            block, part = re.fullmatch(r"blocks\.(\d+)\.(.+)", rest).groups()
            at = f"encoder.block.{stage}.{block}."
            if part == "attn.kv":
                k, v = tensor.chunk(2)
                out |= {f"{at}attention.self.key.{leaf}": k, f"{at}attention.self.value.{leaf}": v}
            else:
                out[f"{at}{parts[part]}.{leaf}"] = tensor
    return out


def equal(a: MiT, b: MiT) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


def test_names_of_a_block():
    state = make().state_dict()
    assert {k for k in to_segformer(state) if k.startswith("block1.0.")} == set(SEGFORMER_BLOCK)
    assert {k for k in to_huggingface(state) if k.startswith("encoder.block.0.0.")} == set(HUGGINGFACE_BLOCK)
    ours = {k for k in state if k.startswith("stages.0.blocks.0.")}
    for names in (SEGFORMER_BLOCK, HUGGINGFACE_BLOCK):
        assert set(convert({k: torch.zeros(2) for k in names}, "x")[0]) == ours
    rest = {k for k in to_segformer(state) if not k.startswith("block")}
    assert rest == {
        f"{base}.{leaf}"
        for i in (1, 2, 3, 4)
        for base in (f"patch_embed{i}.proj", f"patch_embed{i}.norm", f"norm{i}")
        for leaf in ("weight", "bias")
    }


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "backbone.", "module.encoder."])
def test_segformer_layout(tmp_path, wrap):
    donor = make()
    state = {**to_segformer(donor.state_dict()), "head.weight": torch.zeros(2, 2), "head.bias": torch.zeros(2)}
    if wrap in ("state_dict", "model"):
        torch.save({wrap: state, "epoch": 3}, tmp_path / "mit.pth")
    elif wrap == "plain":
        torch.save(state, tmp_path / "mit.pth")
    else:
        torch.save({wrap + k: v for k, v in state.items()}, tmp_path / "mit.pth")
    net = make(seed=1)
    report = load_backbone_weights(net, str(tmp_path / "mit.pth"))
    assert equal(net, donor)
    assert report.layout == "segformer" and len(report.ignored) == 2 and report.tensors == len(net.state_dict())


@pytest.mark.parametrize("prefix", ["", "segformer."])
def test_huggingface_layout_in_a_folder(tmp_path, prefix):
    donor = make()
    state = {prefix + k: v.contiguous() for k, v in to_huggingface(donor.state_dict()).items()}
    save_file({**state, "classifier.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    net = make(seed=1).double()
    report = load_backbone_weights(net, str(tmp_path))
    assert equal(net.float(), donor)
    assert (report.layout, report.ignored, report.path.name) == (
        "huggingface",
        ("classifier.weight",),
        "model.safetensors",
    )


def test_what_transformers_saves_and_holds(tmp_path):
    from transformers import SegformerConfig, SegformerForImageClassification

    spec = SPECS["mit_b0"]
    theirs = SegformerForImageClassification(SegformerConfig(num_labels=2))
    theirs.save_pretrained(tmp_path)
    saved, held = MiT(spec), MiT(spec)
    load_backbone_weights(saved, str(tmp_path))
    state, layout, ignored = convert(theirs.state_dict(), "memory")
    held.load_state_dict(state)
    assert equal(saved, held)
    assert layout in ("transformers 5", "huggingface") and set(ignored) == {"classifier.weight", "classifier.bias"}


def test_own_network_as_source(tmp_path):
    donor = make()
    state = {f"encoder.{k}": v for k, v in donor.state_dict().items()}
    save_file({**state, "decoder.fuse.weight": torch.zeros(1)}, tmp_path / "net.safetensors")
    net = make(seed=1)
    assert load_backbone_weights(net, str(tmp_path / "net.safetensors")).layout == "ugrl"
    assert equal(net, donor)


def test_wrong_size_is_guessed(tmp_path):
    torch.save(to_segformer(MiT(SPECS["mit_b0"]).state_dict()), tmp_path / "mit.pth")
    with pytest.raises(CheckpointError) as caught:
        load_backbone_weights(make(), str(tmp_path / "mit.pth"))
    message = str(caught.value)
    assert "looks like mit_b0" in message and "of another shape" in message and "\n" not in message
    assert "stages.0.blocks.1.norm1.weight" in message  # unexpected: tiny has one block there


def test_missing_and_unexpected_names(tmp_path):
    state = to_segformer(make().state_dict())
    path = str(tmp_path / "mit.pth")
    torch.save({k: v for k, v in state.items() if k != "block4.1.attn.kv.bias"}, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(stages.3.blocks.1.attn.kv.bias\)"):
        load_backbone_weights(make(), path)
    torch.save({**state, "block1.0.attn.gate.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(block1.0.attn.gate.weight\) beside the segformer"):
        load_backbone_weights(make(), path)


def test_half_a_key_value_pair():
    state = to_huggingface(make().state_dict())
    del state["encoder.block.0.0.attention.self.value.bias"]
    with pytest.raises(CheckpointError, match="has the key but not the value of stages.0.blocks.0.attn.kv.bias"):
        convert(state, "file")


def test_mixed_layouts():
    state = make().state_dict()
    mixed = {**to_segformer(state), "encoder.layer_norm.0.weight": torch.zeros(32)}
    with pytest.raises(CheckpointError, match="mixes layouts"):
        convert(mixed, "file")


def test_not_weights(tmp_path):
    (tmp_path / "bad.pth").write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match="bad.pth: cannot be read as weights"):
        load_backbone_weights(make(), str(tmp_path / "bad.pth"))
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no MiT weights in it .first name: 'fc.weight'"):
        load_backbone_weights(make(), str(tmp_path / "other.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list, expected a dictionary"):
        load_backbone_weights(make(), str(tmp_path / "list.pth"))


class Payload:
    def __reduce__(self):
        raise_in_reader = "tests.test_model_weights"
        return (__import__, (raise_in_reader,))


def test_pickles_run_no_code(tmp_path):
    torch.save({"state_dict": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        load_backbone_weights(make(), str(tmp_path / "evil.pth"))


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no/where.pth: no such file"):
        load_backbone_weights(make(), "no/where.pth")
    with pytest.raises(CheckpointError, match="/a/b/c: no such file"):
        load_backbone_weights(make(), "/a/b/c")
    with pytest.raises(CheckpointError, match="holds no weights, expected model.safetensors or pytorch_model.bin"):
        load_backbone_weights(make(), str(tmp_path))


@contextmanager
def hub(monkeypatch, tmp_path, files):
    """A hub of one's own on this machine; yields what it was asked. ``None`` for files hangs up on everyone."""
    from huggingface_hub import constants

    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            name = self.path.rsplit("/", 1)[-1]
            asked.append((self.command, name))
            if files is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            body = files.get(name)
            self.send_response(404 if body is None else 200)
            if body is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("ETag", '"0123456789abcdef"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body or b"")

        do_HEAD = do_GET = answer  # noqa: N815

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield asked
        finally:
            server.shutdown()


def test_an_unreachable_hub_is_asked_once_and_the_way_out_is_named(monkeypatch, tmp_path):
    with hub(monkeypatch, tmp_path, None) as asked, pytest.raises(CheckpointError) as caught:
        load_backbone_weights(make(), "nvidia/mit-b1")
    message = str(caught.value)
    assert "https://huggingface.co/nvidia/mit-b1/resolve/main/pytorch_model.bin" in message
    assert "model.weights=null" in message and "set model.weights to the path of that file" in message
    assert "\n" not in message
    assert len(asked) <= 2  # no series of retries with ever longer pauses


def test_hub_falls_back_to_the_older_file_and_keeps_it(monkeypatch, tmp_path):
    donor = make()
    torch.save(to_huggingface(donor.state_dict()), tmp_path / "pytorch_model.bin")
    with hub(monkeypatch, tmp_path, {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()}) as asked:
        net = make(seed=1)
        load_backbone_weights(net, "nvidia/mit-b1")
        assert equal(net, donor)
        assert ("GET", "pytorch_model.bin") in asked and ("GET", "model.safetensors") not in asked
        asked.clear()
        load_backbone_weights(make(seed=2), "nvidia/mit-b1")
        assert asked == []  # kept on this machine: no network is needed again


def test_strides_do_not_matter(tmp_path):
    torch.save(to_segformer(make().state_dict()), tmp_path / "mit.pth")
    load_backbone_weights(MiT(replace(SPECS["tiny"], strides=(4, 2, 2, 1))), str(tmp_path / "mit.pth"))


# -- weights that have seen masks ---------------------------------------------------------------------


def test_weights_with_a_segmentation_head_are_doubted(tmp_path):
    """As transformers saves it, and as the authors of SegFormer do."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    SegformerForSemanticSegmentation(SegformerConfig(num_labels=150)).save_pretrained(tmp_path)
    report = load_backbone_weights(MiT(SPECS["mit_b0"]), str(tmp_path))
    assert report.warning == (
        "carries a segmentation head (decode_head, 150 classes): trained on masks, so results are not those of tags "
        "alone"
    )
    head = {"decode_head.linear_pred.weight": torch.zeros(19, 8, 1, 1), "decode_head.linear_fuse.conv.weight": WIDE}
    torch.save({"state_dict": {**to_segformer(make().state_dict()), **head}}, tmp_path / "mit.pth")
    assert "(decode_head, 19 classes)" in load_backbone_weights(make(), str(tmp_path / "mit.pth")).warning


WIDE = torch.zeros(8, 8, 1, 1)


@pytest.mark.parametrize(
    ("head", "warning"),
    [
        ({"head.weight": torch.zeros(1000, 8), "head.bias": torch.zeros(1000)}, ""),
        ({"head.weight": torch.zeros(21841, 8)}, ""),
        ({}, ""),
        ({"head.weight": torch.zeros(20, 8)}, "carries a classifier of 20 classes, not ImageNet's"),
        ({"classifier.weight": torch.zeros(21, 8, 1, 1)}, "carries a segmentation head (a convolution, 21 classes)"),
        ({"auxiliary_head.conv_seg.weight": torch.zeros(60, 8, 1, 1)}, "(auxiliary_head, 60 classes)"),
    ],
)
def test_what_a_head_tells_of_its_training(tmp_path, head, warning):
    torch.save({**to_segformer(make().state_dict()), **head}, tmp_path / "mit.pth")
    found = load_backbone_weights(make(), str(tmp_path / "mit.pth")).warning
    assert warning in found and bool(found) == bool(warning)


def test_a_backbone_of_timm_is_doubted_by_its_head_and_not_by_its_own_convolutions(tmp_path):
    import timm

    from ugrl.model.families import make_backbone
    from ugrl.model.pretrained import load_weights

    name = "tf_efficientnet_lite0"  # which ends in a convolution of 1 x 1 that is no head
    for classes, doubted in ((1000, False), (21, True)):
        torch.save(timm.create_model(name, num_classes=classes).state_dict(), tmp_path / "net.pth")
        report = load_weights(make_backbone(f"timm/{name}"), str(tmp_path / "net.pth"))
        assert bool(report.warning) == doubted and "all" in report.text


def test_a_run_says_what_was_loaded_and_keeps_it(tmp_path, shards, capsys):
    from tests.tiny import tiny_tree
    from ugrl.config import build
    from ugrl.train.loop import Trainer

    head = {"decode_head.classifier.weight": torch.zeros(150, 8, 1, 1)}
    torch.save({**to_segformer(make().state_dict()), **head}, tmp_path / "mit.pth")
    tree = tiny_tree(steps=1, cls_warmup_iters=0, lr_warmup_iters=0)
    tree["model"]["weights"] = str(tmp_path / "mit.pth")
    Trainer(build(tree), shards=shards, out=tmp_path / "run", device="cpu").fit()
    shown = " ".join(capsys.readouterr().err.split())
    assert "weights mit.pth (segformer): all" in shown
    assert f"warning: model.weights {tmp_path / 'mit.pth'} carries a segmentation head" in shown
    told = json.loads((tmp_path / "run/weights.json").read_text())
    assert told["loaded"].startswith("mit.pth (segformer): all") and "150 classes" in told["warning"]
