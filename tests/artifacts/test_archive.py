"""What an archive of `torch.export` may hold to be opened untrusted; `tests/runs/test_evaluate_exported.py` has attacks on a whole file."""

from __future__ import annotations

import io
import json
import zipfile

import pytest

from compressvit.artifacts.archive import fault_of_archive


def archive(records: dict[str, str | bytes], *, top: str = "model", compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in records.items():
            file.writestr(f"{top}/{name}", content)
    return buffer.getvalue()


def graph(**node: object) -> bytes:
    return archive({"models/model.json": json.dumps({"graph_module": {"graph": {"nodes": [node]}}})})


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s34', positive=True, integer=True)",
        "Mul(Integer(12), Symbol('s34', positive=True, integer=True))",
        "GreaterThan(Symbol('u15', integer=True), Integer(-2))",
        "And(true, StrictLessThan(Symbol('s0'), Float(0.5)))",
    ],
)
def test_arithmetic_with_symbols_is_opened(text):
    assert fault_of_archive(graph(inputs=[{"as_expr": {"expr_str": text}}])) is None


@pytest.mark.parametrize(
    "text",
    [
        "S('1')",
        "Poly('x')",
        "Symbol('s0').func",
        "Symbol('a b')",
        'Symbol("s0")',
        "exec(1)",
        "open(Integer(0))",
        "Integer(1)[0]",
        "lambda: 0",
        "__import__",
        5,
    ],
)
def test_an_expression_that_could_do_more_is_not(text):
    assert "its graph has the expression" in str(fault_of_archive(graph(inputs=[{"as_expr": {"expr_str": text}}])))


@pytest.mark.parametrize(
    "target",
    ["torch.ops.aten.add.Tensor", "torch.ops.torchvision.nms.default", "_operator.mul", "torch.ops.aten.linear"],
)
def test_operators_of_torch_are_opened(target):
    assert fault_of_archive(graph(target=target)) is None


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.from_file.default",  # reads a file, and can make one
        "torch.ops.other.add.Tensor",
        "torch.ops.aten.__class__",
        "torch.os.system",
        "torch.hub.load",
        "_operator.methodcaller",
        "math.exp",
        "#extension",
        ["torch.ops.aten.add.Tensor"],
    ],
)
def test_other_functions_are_not(target):
    assert "its graph calls" in str(fault_of_archive(graph(target=target)))


def test_what_no_export_writes_is_refused():
    assert fault_of_archive(archive({"version": "1"})) == "it holds version"
    assert fault_of_archive(archive({"data/aotinductor/model/a.so": "x"})) == "it holds data/aotinductor/model/a.so"
    assert fault_of_archive(archive({"byteorder": "little"})) is None
    assert "it holds byteorder" in str(
        fault_of_archive(archive({"byteorder": "x" * 99}, compression=zipfile.ZIP_DEFLATED))
    )
    assert "its graph has as_operator" in str(fault_of_archive(graph(inputs=[{"as_operator": "torch.os.system"}])))
    assert "have one name" in str(fault_of_archive(archive({"byteorder": "a", "BYTEORDER": "b"})))
    assert "no archive that can be looked into" in str(fault_of_archive(b"none"))
    assert "no archive that can be looked into" in str(fault_of_archive(archive({"models/model.json": "{"})))
    assert "no archive" in str(
        fault_of_archive(archive({"data/weights/model_weights_config.json": '{"config": {"a": {}}}'}))
    )
    assert "no archive" in str(fault_of_archive(archive({"data/weights/model_weights_config.json": "[]"})))
