"""First weights of the heads as AFA's public code has them (``model.init: afa``).

Its classifier, its decoder's projections and its class logits keep what torch gives a new layer: uniform numbers
between ±1/√fan_in, biases included. On MiT-B1 that is a standard deviation of 0.026 for the classifier and 0.036 for
the class logits. Its g_cls is drawn from a normal distribution of He's kind with a=√5 and by its one output: a standard
deviation of 1/√3 whatever the backbone, on attention logits that nothing scales. The fusing convolution and the norms
are the same in both.
"""

from __future__ import annotations

import math

from torch import nn

from ugrl.model.affinity import AffinityHead
from ugrl.model.decoder import Decoder


def init_as_afa(classifier: nn.Conv2d, g_cls: AffinityHead, decoder: Decoder) -> None:
    """Draw the heads' weights from torch's current random state; g_seg, which AFA does not have, keeps its own."""
    for layer in (classifier, *decoder.project, decoder.classify, g_cls.out):
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        layer.reset_parameters()
    nn.init.kaiming_normal_(g_cls.out.weight, a=math.sqrt(5), mode="fan_out")
