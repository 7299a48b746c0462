"""The names by which timm builds models, those that compressvit adds to them among them."""

from __future__ import annotations

from compressvit.errors import did_you_mean
from compressvit.model.cvt import CVTS, register_cvts
from compressvit.model.detectors import DETECTORS, register_detectors
from compressvit.model.segmenters import SEGMENTERS, register_segmenters
from compressvit.model.video import VIDEOS, register_videos

COMPOSED = (*DETECTORS, *SEGMENTERS, *VIDEOS)  # on a backbone that their argument `backbone` names
TORCHVISION = "torchvision_"  # how the names of torchvision's transformers begin


def is_model(architecture: str) -> bool:
    """Whether timm can build a model of that name; what compressvit adds is imported only if its name is asked for."""
    import timm

    if architecture in DETECTORS:
        register_detectors()
    elif architecture in SEGMENTERS:
        register_segmenters()
    elif architecture in VIDEOS:
        register_videos()
    elif architecture.startswith(TORCHVISION):
        import compressvit.model.of_torchvision  # noqa: F401 - registers them
    elif architecture in CVTS:
        register_cvts()
    return timm.is_model(architecture)


def nearest_model(architecture: str) -> str:
    """A clause that names models of a similar name; "" where none is similar."""
    import timm

    from compressvit.model.of_torchvision import NAMES

    if (own := TORCHVISION + architecture) in NAMES:
        return f"torchvision's is {own!r}"
    return did_you_mean(architecture, [*COMPOSED, *CVTS, *timm.list_models()], list_at_most=0)
