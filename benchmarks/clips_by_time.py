"""Clips whose label needs time: what a frozen backbone with AdaptFormer makes of one frame, and of the clip.

    python benchmarks/clips_by_time.py CLIPS.npz OUT --backbone FILE

CLIPS.npz has `train_x`, `val_x`, uint8 (N, T, 3, H, W), and `train_y`, `val_y`, int (N,). They become folders of frames with lists, as
`data.name=videos` reads them, and two recipes are applied: an image model, which gets a random frame of every clip in training and the
middle one in evaluation, and the video model on the same weights, which gets all T. Everything else is the same. The time that this takes
is predicted first, from one step of each. Top-1 has Wilson's 95 % interval over the held-out clips.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from compressvit.cli import main as compressvit
from compressvit.model.weights import build
from compressvit.transforms.adaptformer import AdaptFormer
from compressvit.transforms.applying import compress

BACKBONE = "vit_small_patch14_dinov2.lvd142m"
EVALUATED = 0.4  # of the time of a training step, at most, that a held-out clip takes


def write_clips(source: Path, target: Path, limits: dict[str, int | None]) -> dict[str, Any]:
    """Folders of frames and lists of both splits; how many clips each has, of how many frames and classes."""
    found: dict[str, Any] = {}
    with np.load(source) as arrays:
        for split in ("train", "val"):
            clips, labels = arrays[f"{split}_x"], arrays[f"{split}_y"]
            clips, labels = clips[: limits[split]], labels[: limits[split]]
            lines = []
            for number, (clip, label) in enumerate(zip(clips, labels, strict=True)):
                folder = target / split / f"{number:05d}"
                folder.mkdir(parents=True)
                for i, frame in enumerate(clip):
                    Image.fromarray(frame.transpose(1, 2, 0)).save(folder / f"{i}.jpg", quality=95)
                lines.append(f"{split}/{folder.name} {label}\n")
            (target / f"{split}.csv").write_text("".join(lines))
            found |= {split: len(clips), "frames": clips.shape[1], "classes": int(labels.max()) + 1}
    return found


def first_blocks(source: Path, depth: int, target: Path) -> Path:
    """Write the weights of a ViT without the blocks after the first `depth`."""
    kept = {
        name: tensor
        for name, tensor in load_file(source).items()
        if not name.startswith("blocks.") or int(name.split(".")[1]) < depth
    }
    save_file(kept, target)
    return target


def recipes(arguments: argparse.Namespace, clips: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The recipe of each model."""
    size, inside = arguments.img_size, {} if arguments.depth is None else {"depth": arguments.depth}
    teachers = {
        "frame": {
            "model": BACKBONE,
            "weights": str(arguments.backbone),
            "args": {"img_size": size, "num_classes": 0, **inside},
        },
        "clip": {
            "model": "video",
            "weights": "random",
            "backbone": str(arguments.backbone),
            "num_classes": clips["classes"],
            "args": {"backbone": BACKBONE, "backbone_args": inside, "frames": clips["frames"], "img_size": size},
        },
    }
    finetune = {
        "epochs": arguments.epochs,
        "lr": arguments.lr,
        "weight_decay": 0.0,
        "warmup_epochs": 0.2,
        "evaluate_every": arguments.epochs,
    }
    return {
        name: {
            "seed": arguments.seed,
            "teacher": teacher,
            "student": {"head": "new"},
            "data": {
                "name": "videos",
                "root": str(arguments.output / "clips"),
                "batch_size": arguments.batch_size,
                "crop_pct": 1.0,
                "clip": {"stride": 1},
            },
            "steps": [
                {
                    "adaptformer": {
                        "width": 64,
                        "scale": arguments.scale,
                        "blocks": arguments.blocks and [arguments.blocks],
                    }
                },
                {"finetune": finetune},
            ],
        }
        for name, teacher in teachers.items()
    }


def seconds_of_step(recipe: dict[str, Any], classes: int) -> float:
    """Of one clip of a training step, on this machine now."""
    teacher, adapters = recipe["teacher"], AdaptFormer(**recipe["steps"][0]["adaptformer"])
    model = compress(build(teacher["model"], {**teacher["args"], "num_classes": classes}), [adapters]).train()
    channels = 3 * teacher["args"].get("frames", 1)
    images = torch.randn(4, channels, *[teacher["args"]["img_size"]] * 2)
    for _ in range(2):  # the first also prepares
        begun = time.perf_counter()
        model(images).square().mean().backward()
        taken = time.perf_counter() - begun
    return taken / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", metavar="CLIPS.npz", type=Path)
    parser.add_argument("output", metavar="OUT", type=Path, help="a folder that is not there yet")
    parser.add_argument("--backbone", metavar="FILE", type=Path, required=True, help=f"weights of {BACKBONE}")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--scale", type=float, default=1.0, help="s of AdaptFormer")
    parser.add_argument("--img-size", type=int, default=98)
    parser.add_argument("--limit", type=int, help="use so many clips to train on")
    parser.add_argument("--limit-val", type=int, help="use so many clips to evaluate on")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--depth", type=int, help="keep so many of the backbone's first blocks, which learn faster")
    parser.add_argument("--blocks", help="that have an adapter, as 6-11; those before them need no gradients")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.exit(2, f"{arguments.output} exists; give another folder\n")
    arguments.output.mkdir(parents=True)
    clips = write_clips(
        arguments.clips, arguments.output / "clips", {"train": arguments.limit, "val": arguments.limit_val}
    )
    if arguments.depth is not None:
        arguments.backbone = first_blocks(
            arguments.backbone, arguments.depth, arguments.output / "backbone.safetensors"
        )
    found = recipes(arguments, clips)
    passes = (
        clips["train"] * arguments.epochs + EVALUATED * 3 * clips["val"]
    )  # both models at the end, and the student before training
    minutes = {name: seconds_of_step(recipe, clips["classes"]) * passes / 60 for name, recipe in found.items()}
    print(
        f"predicted: {sum(minutes.values()):.0f} minutes ({', '.join(f'{n} {m:.0f}' for n, m in minutes.items())})",
        flush=True,
    )
    for name, recipe in found.items():
        file, run = arguments.output / f"{name}.yaml", arguments.output / name
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        begun = time.perf_counter()
        if compressvit(["apply", "--no-report", str(file), "--output", str(run)]):
            parser.exit(1)
        student = json.loads((run / "results.json").read_text())["student"]
        low, high = student["intervals"]["top1"]
        print(
            f"{name}: top-1 {student['top1']:.1f} % ({low:.1f} to {high:.1f}) of {clips['val']} held-out clips, chance "
            f"{100 / clips['classes']:.1f} %; {(time.perf_counter() - begun) / 60:.1f} minutes",
            flush=True,
        )


if __name__ == "__main__":
    main()
