"""What the tests of `compressvit shrink` share."""

from __future__ import annotations

import io

from PIL import Image

CLASSES = tuple("abcd")


def plain(i):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (20 * i, 255 - 20 * i, 7 * i)).save(buffer, "PNG")
    return buffer.getvalue()


def file_of(headless):
    return (headless, "--model", "test_vit", "--img-size", 32)
