"""What a network makes of single photographs, as plain arrays: its passes are those of a validation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ugrl.config import Config
from ugrl.data.images import decode_labels
from ugrl.data.reader import ShardReader
from ugrl.eval.collectors import uncertain_pairs
from ugrl.eval.labels import label
from ugrl.eval.palette import denormalize
from ugrl.eval.passes import BatchPasses, shape_batches
from ugrl.grid import sample_nearest
from ugrl.method.prototypes import Prototypes
from ugrl.method.targets import TargetMaker
from ugrl.model.network import UGRLNet
from ugrl.text import line
from ugrl.types import IGNORE, Batch


@dataclass(frozen=True, slots=True)
class Seer:
    """A network that photographs are shown to, and what it is asked with.

    Attributes:
        net: In eval mode.
        cfg: Of its run.
        prototypes: For the uncertainties.
        targets: Makes pseudo-labels as the run's training does.
        step: Steps that it was trained for.
        device: Where it is.
        dtype: Of its weights.
    """

    net: UGRLNet
    cfg: Config
    prototypes: Prototypes
    targets: TargetMaker
    step: int
    device: torch.device
    dtype: torch.dtype = torch.float32

    @property
    def affinity_trained(self) -> bool:
        """Whether Â is in use."""
        return self.targets.schedule.affinity_trained(self.step)


@dataclass(frozen=True, slots=True)
class Look:
    """What a network makes of one photograph, without what small images are padded with.

    Attributes:
        index: Position in the split.
        id: Id of its row.
        image_HW3: uint8.
        tags: Classes 1…F, ascending.
        truth_HW: uint8 labels, or ``None`` where there is no mask.
        cams: Tag → CAM in [0, 1), float32 (H, W).
        pseudo_HW: uint8 pseudo-labels, 255 where undecided.
        predicted_HW: uint8 labels of the segmentation.
        u: Class (0 is background) → uncertainty in [0, 2], where it is known.
        probs_F: The classifier's probabilities.
        cam_iou: Tag → IoU of its CAM with the truth, where both u and truth are known.
        vectors: Class → class vector r, where there is one.
        embeddings: Class → mean unit embedding of the pixels that the pseudo-label gives it, where asked for.
    """

    index: int
    id: str
    image_HW3: np.ndarray
    tags: tuple[int, ...]
    truth_HW: np.ndarray | None
    cams: dict[int, np.ndarray]
    pseudo_HW: np.ndarray
    predicted_HW: np.ndarray
    u: dict[int, float]
    probs_F: np.ndarray
    cam_iou: dict[int, float]
    vectors: dict[int, np.ndarray]
    embeddings: dict[int, np.ndarray]

    @property
    def cam_HW(self) -> np.ndarray:
        """The largest of the CAMs; 0 without a tag."""
        return np.max(list(self.cams.values()), axis=0) if self.cams else np.zeros(self.pseudo_HW.shape, np.float32)

    @property
    def u_HW(self) -> np.ndarray:
        """Eq. 7: each pixel has the u of its pseudo-label; NaN where it has none, or u is not known."""
        table = np.full(256, np.nan, np.float32)
        for c, u in self.u.items():
            table[c] = u
        return table[self.pseudo_HW]


def looks(seer: Seer, reader: ShardReader, indices: Sequence[int], *, embed: bool = False) -> Iterator[list[Look]]:
    """Show photographs to a network, in batches of one size; their order is another than that of ``indices``.

    Args:
        seer: The network, and what it is asked with.
        reader: Of the split; its classes are the network's.
        indices: Positions in the split.
        embed: Whether the embeddings are wanted.

    Raises:
        DataError: A row cannot be read.
    """
    index = {id: i for i, id in enumerate(reader.ids)}
    masks = reader.manifest.split(reader.split).with_masks > 0
    for read in shape_batches(reader, list(indices), seer.cfg.data.threads, seer.net.min_size):
        at = [index[id] for id in read.ids]
        with_mask = [masks] * len(at)
        if masks and read.masks_BHW is None:  # some images have one
            read, with_mask = _partly(read, reader, at)
        yield _looks(seer, read, at, with_mask, embed)


def _partly(read: Batch, reader: ShardReader, at: Sequence[int]) -> tuple[Batch, list[bool]]:
    """A batch with the masks that there are, 255 elsewhere, and which images have one."""
    masks_BHW = torch.full((len(at), *read.images_B3HW.shape[-2:]), IGNORE, dtype=torch.uint8)
    found = []
    for k, i in enumerate(at):
        mask = reader[i].mask
        found.append(mask is not None)
        if mask is not None:
            labels = torch.from_numpy(np.array(decode_labels(mask, f"row {line(read.ids[k])}"), dtype=np.uint8))
            masks_BHW[k, : labels.shape[0], : labels.shape[1]] = labels
    return replace(read, masks_BHW=masks_BHW), found


@torch.no_grad()
def _looks(seer: Seer, read: Batch, at: Sequence[int], with_mask: Sequence[bool], embed: bool) -> list[Look]:
    cfg, targets, device, local = seer.cfg, seer.targets, seer.device, seer.affinity_trained
    batch = read.to(device, seer.dtype)
    amp = cfg.eval.amp == "auto" and device.type == "cuda" and seer.dtype == torch.float32  # as a validation does
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        affinity = local or targets.schedule.propagates(seer.step)
        plain = seer.net(batch.images_B3HW, decode=True, affinity=affinity, embed=embed)
        seen = BatchPasses(seer.net, cfg, batch, read.images_B3HW, plain)
        cam = seen.cam  # before the segmentation, which takes over some of its passes
        predicted_BHW = seen.seg_probs_BCHW.argmax(1)
        pseudo_BHW, _, r_BCD, present_BC, u_BC, known_BC = label(targets, seen, seer.step)
        probs_BF = seen.probs_BF
        iou_P = None if batch.masks_BHW is None else uncertain_pairs(seen, u_BC, known_BC)[1].tolist()
    emb_BDhw = plain.emb_BDhw if embed else None
    small_Bhw = None if emb_BDhw is None else sample_nearest(pseudo_BHW, (emb_BDhw.shape[-2], emb_BDhw.shape[-1]))
    made = []
    for k, (id, (_, h, _, w)) in enumerate(zip(batch.ids, batch.boxes_B4.tolist(), strict=True)):
        own = [(p, f + 1) for p, (b, f) in enumerate(batch.pairs_P2.tolist()) if b == k]
        made.append(
            Look(
                index=at[k],
                id=id,
                image_HW3=denormalize(read.images_B3HW[k, :, :h, :w].numpy()),
                tags=tuple(f for _, f in own),
                truth_HW=read.masks_BHW[k, :h, :w].numpy() if read.masks_BHW is not None and with_mask[k] else None,
                cams={f: cam.cam_PHW[p, :h, :w].float().cpu().numpy() for p, f in own},
                pseudo_HW=_labels(pseudo_BHW[k, :h, :w]),
                predicted_HW=_labels(predicted_BHW[k, :h, :w]),
                u={c: float(u_BC[k, c]) for c in known_BC[k].nonzero().flatten().tolist()},
                probs_F=probs_BF[k].cpu().numpy(),
                cam_iou={} if iou_P is None else {f: iou_P[p] for p, f in own if math.isfinite(iou_P[p])},
                vectors={c: r_BCD[k, c].float().cpu().numpy() for c in present_BC[k].nonzero().flatten().tolist()},
                embeddings={}
                if emb_BDhw is None or small_Bhw is None
                else _means(emb_BDhw[k].float(), small_Bhw[k], {0, *(f for _, f in own)}),
            )
        )
    return made


def _labels(labels_HW: Tensor) -> np.ndarray:
    return labels_HW.to(torch.uint8).cpu().numpy()


def _means(emb_Dhw: Tensor, labels_hw: Tensor, classes: set[int]) -> dict[int, np.ndarray]:
    found = {}
    for c in sorted(classes):
        here = labels_hw == c
        if bool(here.any()):
            found[c] = emb_Dhw[:, here].mean(1).cpu().numpy()
    return found
