"""The tutorials of docs/tutorials/: all of their code runs as printed, in one folder each, and what they promise is there at their end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import process, tutorial

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "tutorials").glob("[!R]*.md"))
# Real ones for the tutorial about DINOv2: MODEL_OR_FILE with its options as the page has them, and a folder of .jpg files.
REAL = ("COMPRESSVIT_TEACHER", "COMPRESSVIT_PHOTOS")
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
        teacher, photos = (os.environ.get(name) for name in REAL)
        if not (teacher and photos):
            stand_in = process.python("-c", STANDS_IN)
            assert stand_in.code == 0, stand_in.err
        monkeypatch.setenv("TEACHER", teacher or "teacher")
        monkeypatch.setenv("PHOTOS", photos or "photos")
    done = process.python(tutorial.__file__, page)
    assert done.code == 0, done.out + done.err
    ran = len([language for _, language, _ in tutorial.blocks(page) if language != "text"])
    assert f"{ran} blocks" in done.out
    for promise in tutorial.promised(page):
        assert (tmp_path / promise).exists(), f"{page.name} promises {promise}"
