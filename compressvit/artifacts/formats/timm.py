"""A folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`, as `compressvit merge` writes it: for models that timm's
constructor builds, after adapters are folded into its layers."""

from __future__ import annotations

from pathlib import Path

import timm
from pydantic import ValidationError
from torch import nn

from compressvit.artifacts.export import PRECISIONS
from compressvit.artifacts.exported_model import Reopened
from compressvit.artifacts.formats.base import FORMATS, Format, Opened, Source, format_of_files
from compressvit.artifacts.merge import left_by_merge, refuse_growth, save_for_timm
from compressvit.data.input import Side
from compressvit.data.spec import Data
from compressvit.errors import UserError, option
from compressvit.model import surgery, weights
from compressvit.model.backbone import body_of, model_name
from compressvit.model.header import TENSORS
from compressvit.model.local_dir import CONFIG, read_local_dir
from compressvit.model.old import RESOLVED
from compressvit.model.stored import Images, expect_images, is_artifact, name_classes
from compressvit.spec import first_fault
from compressvit.transforms.applying import materialise
from compressvit.transforms.record import compression_of


@format_of_files("timm")
class Timm(Format):
    """A folder with config.json and model.safetensors, and the metadata in export.json."""

    title = "timm"
    inside = ("config.json", TENSORS)
    computes = False
    any_model = False
    reads, is_graph = True, False
    runtime = "timm"

    def refuse(self, source: Source) -> None:
        _plain(source)

    def write(self, source: Source, path: Path) -> None:
        path.mkdir()
        save_for_timm(surgery.deep_copy(_plain(source)).to(PRECISIONS[source.precision]), path)
        source.seal(path)

    def open(self, path: Path, source: Source) -> nn.Module:
        return Opened(timm.create_model(f"local-dir:{path}", pretrained=True).eval())

    def is_at(self, path: Path) -> bool:
        return (path / CONFIG).is_file() and not is_artifact(path) and not (path / RESOLVED).exists()

    def read(self, path: Path, *, trust: bool = False) -> Reopened:
        found = read_local_dir(path)
        assert found is not None, "it has a config.json"
        try:
            Images.model_validate(found.input)
        except ValidationError as error:
            raise UserError(f"{path / CONFIG} does not say how images are made: {first_fault(error)}") from error
        model = weights.build(found.architecture, found.args)
        expect_images(model, found.input)
        name_classes(model, found.label_names)
        notes = weights.load_file(model, path, "the model")
        return Reopened(Side.of(model.eval(), Data(name="images"), trained=True, own_crop=True), notes)

    def how(self, path: Path) -> str:
        return f"timm.create_model('local-dir:{path}', pretrained=True)"


def _plain(source: Source) -> nn.Module:
    """The model as timm builds it.

    Raises:
        UserError: it has what timm has not, or would be larger.
    """
    model = source.model
    others = [fmt.name for fmt in FORMATS.values() if fmt.any_model]
    ways = f"{option('to')} {', '.join(others[:-1])} and {others[-1]} take it as it is"
    if body_of(model) is not None:
        raise UserError(f"{option('to', 'timm')}: timm has no model such as {model_name(model)}; {ways}")
    plans = [plan for plan in compression_of(model).plans if not plan.loads_values]
    if not plans:
        return model
    try:
        for plan in plans:
            if not plan.foldable:
                plan.fold(surgery.deep_copy(model))  # raises a UserError with the reason
        merged = materialise(model).eval()
        if left := [plan.transform for plan in compression_of(merged).plans if not plan.loads_values]:
            raise UserError(left_by_merge(left))
        if not source.dense:
            refuse_growth(model, merged)
    except UserError as error:
        raise UserError(f"{option('to', 'timm')}: {error}; {ways}") from error
    return merged
