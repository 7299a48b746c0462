"""The tutorials of docs/tutorials/: all of their code runs as printed, in one folder each, and what they promise is there at their end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import process, tutorial

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "tutorials").glob("[!R]*.md"))
# Real ones for the tutorial about DINOv2: MODEL_OR_FILE with its options as the page has them, and a folder of .jpg files.
REAL = tuple(filter(None, map(os.environ.get, ("COMPRESSVIT_TEACHER", "COMPRESSVIT_PHOTOS"))))
STANDS_IN = """
from pathlib import Path
import compressvit, timm, torch
from PIL import Image
from sklearn.datasets import load_digits

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
model = timm.create_model(
    "vit_tiny_patch16_224", num_classes=10, img_size=8, patch_size=4, embed_dim=64, depth=3, num_heads=4
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(2):
    for batch in torch.randperm(1000).split(50):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[batch]), torch.tensor(digits.target)[batch]).backward()
        optimizer.step()
model.reset_classifier(0)
compressvit.save(model, "teacher")
Path("photos").mkdir()
for number, pixels in enumerate(digits.images[1000:1400]):
    Image.fromarray((pixels * 15.9).astype("uint8")).save(f"photos/{number}.jpg")
"""


def test_the_tutorials_were_seen():
    assert {page.stem for page in PAGES} >= {"shrink", "classifier", "adapters", "relations", "detector", "method"}
    index = (ROOT / "docs" / "tutorials" / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"({page.name})" in index
        text = page.read_text(encoding="utf-8")
        assert text.split("\n\n")[1] == "At the end you have", page.name
        assert len(tutorial.promised(page)) > 1, page.name
        assert len(list(tutorial.blocks(page))) == text.count("\n```") / 2, page.name


@pytest.mark.wide
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_runs(page, tmp_path, monkeypatch):
    """Measured on one core: 12 to 26 s of its time."""
    text = page.read_text(encoding="utf-8")
    for needed, package in (("--to onnx", "onnxruntime"), ("name: coco", "pycocotools")):
        if needed in text:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    if page.stem == "shrink":
        stand_in = process.python("-c", STANDS_IN)
        assert stand_in.code == 0, stand_in.err
        monkeypatch.setenv("TEACHER", "teacher")
        monkeypatch.setenv("PHOTOS", "photos")
    done = process.python(tutorial.__file__, page)
    assert done.code == 0, done.out + done.err
    ran = len([language for _, language, _ in tutorial.blocks(page) if language != "text"])
    assert f"{ran} blocks" in done.out
    keeps_its_promises(page, tmp_path)


@pytest.mark.wide
@pytest.mark.timeout(0)
@pytest.mark.skipif(len(REAL) < 2, reason="COMPRESSVIT_TEACHER and COMPRESSVIT_PHOTOS are not both set")
def test_the_tutorial_on_dinov2_runs_on_real_weights(tmp_path):
    """Of DINOv2 ViT-S/14 and 200 photographs it takes six minutes of one core."""
    page, environment = ROOT / "docs" / "tutorials" / "shrink.md", dict(zip(("TEACHER", "PHOTOS"), REAL, strict=True))
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, tutorial.__file__, str(page)]
    subprocess.run(command, cwd=tmp_path, env=os.environ | environment, check=True)
    keeps_its_promises(page, tmp_path)


def keeps_its_promises(page: Path, folder: Path) -> None:
    for promise in tutorial.promised(page):
        assert (folder / promise).exists(), f"{page.name} promises {promise}"
