"""What the uncertainty can tell on synthetic class vectors: by encoding, with and without centring.

Each class has a mean vector; all vectors share a common part that is five times as long, as LayerNorm'd features do.
In the second half of the batches, every other (image, class) pair is mixed half with background: u should tell
those from the clean ones. Prints u's 5 to 95 % range and the AUROC.

    python -m bench.uncertainty
"""

from __future__ import annotations

import argparse

import torch

from ugrl.eval.metrics import auroc
from ugrl.method.prototypes import Prototypes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--d-cls", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=21, help="with background")
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| encoding | center | u, 5 to 95 % | AUROC |\n| --- | --- | ---: | ---: |")
    for encoding in ("linear", "fourier"):
        for center in (True, False):
            g = torch.Generator().manual_seed(args.seed)
            common = 5 * torch.randn(args.dim, generator=g)
            means = torch.randn(args.classes, args.dim, generator=g)
            prototypes = Prototypes(
                num_classes=args.classes, dim=args.dim, d_cls=args.d_cls, encoding=encoding, center=center
            )
            scores, bad = [], []
            for step in range(args.batches):
                if step == args.batches // 4:
                    prototypes.freeze()
                present = torch.rand(8, args.classes, generator=g) < 0.15
                present[:, 0] = True
                mixed = (torch.rand(8, args.classes, generator=g) < 0.5) & (step >= args.batches // 2)
                mixed[:, 0] = False
                part = torch.where(mixed, 0.5, 1.0)[..., None]
                r = part * means + (1 - part) * means[0]
                r = common + r + torch.randn(r.shape, generator=g)
                u, known = prototypes.uncertainty(r, present)
                if step >= args.batches // 2:
                    use = known.clone()
                    use[:, 0] = False
                    scores.append(u[use])
                    bad.append(mixed[use])
                prototypes.update(r, present)
            u_n, bad_n = torch.cat(scores), torch.cat(bad)
            low, high = torch.quantile(u_n, torch.tensor([0.05, 0.95])).tolist()
            print(f"| {encoding} | {center} | {low:.3f} to {high:.3f} | {auroc(u_n, bad_n):.3f} |")


if __name__ == "__main__":
    main()
