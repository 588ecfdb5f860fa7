"""The model card: ``README.md`` with the head that the Hugging Face hub reads, written from the run's facts."""

from __future__ import annotations

from ugrl import __version__
from ugrl.config import Config
from ugrl.export.facts import Facts
from ugrl.text import line, markdown

# Metrics of a validation that a reader asks for, as the hub and people call them.
_SCORES = {
    "seg_miou": ("mean_iou", "mean IoU of the segmentation"),
    "seg_background_miou": (None, "mean IoU of nothing but background"),
    "cam_miou": (None, "mean IoU of the CAM's pseudo-labels"),
    "tag_map": (None, "mean average precision of the image tags"),
    "tag_f1": (None, "F1 of the image tags"),
}
_USE = {
    "onnx": """```python
import numpy as np, onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("model.onnx")
pixels = np.asarray(Image.open("photo.jpg").convert("RGB"))[None]      # uint8 (1, H, W, 3), as it was read
logits, scores = session.run(["logits", "scores"], {"pixels": pixels})
mask = logits[0].argmax(0)                                             # (H, W), 0 is background
```""",
    "torch": """```python
import numpy as np, torch
from PIL import Image

program = torch.export.load("model.pt2").module()
pixels = torch.from_numpy(np.array(Image.open("photo.jpg").convert("RGB")))[None]     # uint8 (1, H, W, 3)
with torch.no_grad():
    logits, scores = program(pixels)
mask = logits[0].argmax(0)                                                            # (H, W), 0 is background
```""",
    "safetensors": """```sh
hf download OWNER/NAME --local-dir model
ugrl predict model photo.jpg --out masks
```""",
    "transformers": """```python
import torch
from PIL import Image
from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

folder = "."                                                           # or OWNER/NAME, once it is uploaded
image = Image.open("photo.jpg").convert("RGB")
inputs = SegformerImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
with torch.no_grad():
    found = SegformerForSemanticSegmentation.from_pretrained(folder)(**inputs)
size = (image.height, image.width)
mask = torch.nn.functional.interpolate(found.logits, size, mode="bilinear")[0].argmax(0)   # 0 is background
```""",
}
_LIMITS = """\
- The masks were learned from image tags alone: no pixel was labelled by hand in training. Borders are less exact than
  those of a model that was trained with masks, and what always occurs together (a train and its rails) may be taken
  for one thing.
- It knows the classes below, and background. Anything else is background, or one of them.
- It was trained on crops of {crop} px; objects that are much larger or smaller than in its data are found less well.
- It has seen no other data than those named here. Measure it on your own before you rely on it.
"""


def card(facts: Facts, to: str, check: str, size: str) -> str:
    """The text of ``README.md``.

    Args:
        facts: Of the run.
        to: The format, a key of :data:`ugrl.export.FORMATS`.
        check: How far the files are from the network, in words.
        size: What the images must be, in words.
    """
    cfg = facts.config
    parts = [
        f"# {markdown(cfg.name)}",
        f"Semantic segmentation with {len(facts.class_names)} classes and background, learned from image tags by UGRL "
        f"({markdown(cfg.model.backbone)}, {facts.parameters / 1e6:.1f} M parameters; setting {cfg.method.setting}, "
        f"step {facts.step} of {cfg.train.steps}).",
        "## Use",
        _USE[to],
        f"{size} {_outputs(to)}".strip(),
        f"Compared with the network on {check}.",
        "## Classes",
        "0 background, " + ", ".join(f"{k} {markdown(name)}" for k, name in enumerate(facts.class_names, 1)),
        "## Data",
        _data(facts),
        "## Training",
        _training(facts),
        "## Scores",
        _scores(facts),
        "## Limits",
        _LIMITS.format(crop=cfg.data.crop).rstrip(),
        "## Licence",
        _licence(facts),
    ]
    return head(facts) + "\n" + "\n\n".join(parts) + "\n"


def head(facts: Facts) -> str:
    """The YAML between the two lines of ``---``."""
    from huggingface_hub import EvalResult, ModelCardData

    cfg, licence = facts.config, facts.licence
    results = [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=facts.source or "unknown",
            dataset_name=f"{facts.source or 'unknown'}, split {cfg.data.val_split}",
            metric_type=kind,
            metric_name=text,
            metric_value=round(facts.metrics[key], 4),
        )
        for key, (kind, text) in _SCORES.items()
        if kind is not None and facts.judged and key in facts.metrics
    ]
    weights = cfg.model.weights
    data = ModelCardData(
        library_name="ugrl",
        pipeline_tag="image-segmentation",
        license=licence[0] if licence else None,
        license_name=licence[1] if licence else None,
        license_link=licence[2] if licence else None,
        base_model=weights if weights and "/" in weights else None,
        tags=["semantic-segmentation", "weakly-supervised", cfg.model.backbone.replace("/", "-")],
        model_name=line(cfg.name),
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _outputs(to: str) -> str:
    if to == "safetensors":
        return ""
    if to == "transformers":
        return (
            "`logits` lie on a grid of a quarter of the image. The classifier of image tags is not part of these files."
        )
    return (
        "`logits` are float32 (B, C, H, W), of the image's size; their softmax over C is a probability. `scores` are "
        "the probabilities (B, F) that the classes without background occur in the image."
    )


def _data(facts: Facts) -> str:
    name = f"Source: {markdown(facts.source)}." if facts.source else "Source: not known (the shards are not there)."
    cfg = facts.config
    used = f"Trained on the split `{cfg.data.train_split}`, validated on `{cfg.data.val_split}`."
    counts = [f"| {markdown(n)} | {rows:,} | {masks:,} |" for n, (rows, masks) in facts.rows.items()]
    table = "\n".join(["| split | images | of them with a mask |", "| --- | ---: | ---: |", *counts])
    told = f"Fingerprint of these splits: `{facts.data}`." if facts.data else ""
    return "\n\n".join(filter(None, [f"{name} {used}", table if counts else "", told]))


def _training(facts: Facts) -> str:
    cfg: Config = facts.config
    t = cfg.train
    rows = {
        "encoder began with": facts.began,
        "steps": f"{facts.step:,} of {t.steps:,}",
        "images a step": f"{t.global_batch}",
        "crop": f"{cfg.data.crop} px, scaled by {cfg.data.scale_min:g} … {cfg.data.scale_max:g}",
        "learning rate": f"{t.lr:g} (heads: × {t.head_lr_ratio:g})",
        "setting": f"{cfg.method.setting} (refinement of the CAM: {cfg.method.cam.refine})",
        "seed": f"{cfg.seed}",
        "version": f"ugrl {__version__}",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items())])


def _scores(facts: Facts) -> str:
    found = [f"| {text} | {facts.metrics[key]:.4f} |" for key, (_, text) in _SCORES.items() if key in facts.metrics]
    if not found:
        return "None: there was no validation before this step."
    e, split = facts.config.eval, facts.config.data.val_split
    how = f"scales {', '.join(f'{s:g}' for s in e.seg_scales)}{', with the mirror image' if e.mirror else ''}"
    prior = f"classes weighed by the classifier's p^{e.tag_prior:g}" if e.tag_prior else ""
    how += f", {prior}" if prior else ""
    text = f"On the split `{split}` at the last validation before this step ({how})."
    return (
        text
        + f" The exported files make one pass at scale 1{', without that weight' if prior else ''}."
        + "\n\n"
        + "\n".join(["| score | value |", "| --- | ---: |", *found])
    )


def _licence(facts: Facts) -> str:
    if facts.licence:
        name = facts.licence[1] or facts.licence[0]
        link = f" (<{facts.licence[2]}>)" if facts.licence[2] else ""
        return f"The weights that training began with are under {name}{link}; it may bind what is made of them."
    if facts.config.model.weights is None and "scratch" in facts.began:
        return "Trained from scratch: whoever publishes these weights chooses their licence (`license:` in the head)."
    return "The licence of the weights that training began with is not known here: find it (`license:` in the head)."
