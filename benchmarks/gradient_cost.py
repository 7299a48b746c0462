"""What `diagnostics: [gradients]` adds to a training step that is looked at, in pairs on one model that shares.

python benchmarks/gradient_cost.py --share 6 --pairs 20
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

from compressvit import Multiplex, compress
from compressvit.diagnostics.gradients import Gradients


def main() -> None:
    """Print the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 96, "depth": 12, "num_heads": 4}
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=10, **size)
    model = compress(teacher, [Multiplex(share=arguments.share, mlp_conv=3)]).train()
    images = torch.randn(arguments.batch_size, 1, 28, 28)
    targets = torch.randint(10, (arguments.batch_size,))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        watch = Gradients(every=2).watch(model, "benchmark", Path(folder))
        for step in range(2 * (arguments.pairs + 2)):
            model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            watch.before(step)
            F.cross_entropy(model(images), targets).backward()
            watch.after(step + 1, 0, 1.0)
            seconds[step % 2 == 1].append(
                time.perf_counter() - start
            )  # steps count from 1: every second one is looked at
        watch.close()
    with_it, without = (statistics.median(seconds[side][2:]) for side in (True, False))  # the first two prepare things
    print(f"a step that is looked at takes {with_it / without:.3f} of one that is not ({1000 * without:.0f} ms)")


if __name__ == "__main__":
    main()
