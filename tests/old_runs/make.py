"""Make the runs of this folder again, into another folder, with the compressvit that Python finds.

Every recipe is that of the folder's own run. See README.md beside this file for the command.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

import compressvit

HERE = Path(__file__).parent
FINISHED = ("quickstart", "lors", "lors_shared", "adapted_pruned", "repadapter")
STOPPED = {"stopped": ("1_distill", 14), "stopped_pruning": ("1_prune_cycle1", 25)}  # the phase, and steps to wait for
MERGED = ("lors", "repadapter")
IMAGES = 16


def main(into: Path) -> None:
    into.mkdir(parents=True)
    for name in FINISHED:
        _apply(into, name, name)
    for name, (phase, steps) in STOPPED.items():
        _apply(into, name, f"uninterrupted/{name}")
        _stop(into, name, phase, steps)
    save_file(_outputs(into), into / "expected_outputs.safetensors")
    for name in (*FINISHED, *STOPPED):
        _slim(into / name)
    for name in STOPPED:
        _keep_results(into / "uninterrupted" / name)


def _command(into: Path, name: str, output: str) -> list[str]:
    """Paths in it are relative, because a run folder tells the command that made it."""
    shutil.copy(HERE / name / "recipe.yaml", into / f"{name}.yaml")
    return [sys.executable, "-m", "compressvit", "apply", f"{name}.yaml", "--output", output, "--device", "cpu"]


def _apply(into: Path, name: str, output: str) -> None:
    subprocess.run(_command(into, name, output), cwd=into, check=True)
    (into / f"{name}.yaml").unlink()


def _stop(into: Path, name: str, phase: str, steps: int) -> None:
    """Run a recipe and stop it between two steps, in the middle of an epoch."""
    process = subprocess.Popen(_command(into, name, name), cwd=into)
    metrics = into / name / "metrics.jsonl"
    mark = f'"phase": "{phase}", "kind": "train", "step": {steps},'
    while process.poll() is None and not (metrics.is_file() and mark in metrics.read_text()):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, f"{name} was not stopped"
    (into / f"{name}.yaml").unlink()
    saved = torch.load(into / name / "checkpoints" / f"{phase}.pt", weights_only=True)
    print(name, "stopped at", {key: saved[key] for key in ("epoch", "batch_index", "steps", "done")})
    assert not saved["done"]
    assert saved["batch_index"], f"{name} stopped between two epochs: make it again"


@torch.inference_mode()
def _outputs(into: Path) -> dict[str, torch.Tensor]:
    """What every model computes on some digits."""
    images = torch.tensor(load_digits().images[:IMAGES], dtype=torch.float32)[:, None] / 8 - 1
    found = {"images": images}
    for name in FINISHED:
        for model in ("student", "teacher"):
            found[f"{name}/{model}"] = compressvit.load(into / name / model)(images)
    for name in MERGED:
        found[f"{name}/merged"] = compressvit.merge(compressvit.load(into / name / "student"))(images)
    for name in STOPPED:
        found[f"{name}/teacher"] = compressvit.load(into / name / "teacher")(images)
        found[f"{name}/student"] = compressvit.load(into / "uninterrupted" / name / "student")(images)
    return found


def _slim(run: Path) -> None:
    """Remove what is large and nothing reads, and what says on which machine the run was made."""
    shutil.rmtree(run / "tensorboard")
    for pattern in ("*.png", "report.html", *(f"diagnostics/*.{suffix}" for suffix in ("png", "svg", "csv"))):
        for file in run.glob(pattern):
            file.unlink()
    (run / "diagnostics" / "spectrum.json").unlink(missing_ok=True)  # every singular value of every weight
    if run.name != "quickstart":  # a run that has its teacher does not train it again
        (run / "checkpoints" / "teacher.pt").unlink()
    file = run / "environment.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "platform": content["platform"].split("-")[0]}, indent=2) + "\n")


def _keep_results(run: Path) -> None:
    """Of a run that is only compared with."""
    for path in run.iterdir():
        if path.is_dir() and path.name != "student":
            shutil.rmtree(path)
        elif path.is_file() and path.name not in ("results.json", "metrics.jsonl"):
            path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
