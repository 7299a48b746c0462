"""How long CKA of all layers of two models takes beside the forward passes it needs, and how much memory it adds.

python benchmarks/cka_speed.py --model vit_base_patch16_224 --images 512
"""

from __future__ import annotations

import argparse
import resource
import time

import timm
import torch

from compressvit.data.input import Side
from compressvit.data.spec import Data
from compressvit.diagnostics.cka_layers import cka_matrix
from compressvit.diagnostics.features import subject


def main() -> None:
    """Print one line; the weights are random, which changes no time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = [timm.create_model(arguments.model).eval() for _ in range(2)]
    size = models[0].pretrained_cfg["input_size"]
    images = torch.randn(arguments.images, *size, generator=torch.Generator().manual_seed(0))
    batches = images.split(arguments.batch_size)
    with torch.inference_mode():
        models[0](batches[0])  # the first pass prepares things
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        for batch in batches:
            for model in models:
                model(batch)
        forward = time.perf_counter() - start
    between = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    result = cka_matrix(
        *(subject(Side.of(model, Data(name="images"))) for model in models),
        lambda: batches,
        torch.device("cpu"),
        images=arguments.images,
        batch_size=arguments.batch_size,
    )
    whole = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows, columns = result.values.shape
    print(
        f"{arguments.model}, {result.images} images in {result.batches} batches, {arguments.threads} threads: "
        f"{rows}×{columns} layers in {whole:.0f} s, {whole / forward:.2f} of the forward passes alone ({forward:.0f} s); "
        f"largest interval ±{result.half_width.max():.3f}; peak memory {before / 1024:.0f} MiB, "
        f"{between / 1024:.0f} after the passes, {after / 1024:.0f} with CKA"
    )


if __name__ == "__main__":
    main()
