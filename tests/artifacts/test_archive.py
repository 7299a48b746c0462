"""What an archive of `torch.export` may hold to be opened untrusted; `tests/runs/test_evaluate_exported.py` has attacks on a whole file."""

from __future__ import annotations

import io
import json
import zipfile

import pytest
import torch
from helpers.archives import two_directories

from compressvit.artifacts.archive import NotInspected, inspected


def archive(records: dict[str, str | bytes], *, top: str = "model", compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in records.items():
            file.writestr(f"{top}/{name}", content)
    return buffer.getvalue()


def graph(**node: object) -> bytes:
    return archive({"models/model.json": json.dumps({"graph_module": {"graph": {"nodes": [node]}}})})


def fault_of(content: bytes) -> str | None:
    try:
        inspected(content)
    except NotInspected as fault:
        return str(fault)
    return None


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s34', positive=True, integer=True)",
        "Mul(Integer(12), Symbol('s34', positive=True, integer=True))",
        "GreaterThan(Symbol('u15', integer=True), Integer(-2))",
        "And(true, StrictLessThan(Symbol('s0'), Float(0.5)))",
        "Add(Pow(Symbol('s0', integer=True), Integer(2)), Mul(Integer(-1), PowByNatural(Symbol('s1'), Integer(3))))",
    ],
)
def test_arithmetic_with_symbols_is_opened(text):
    assert fault_of(graph(inputs=[{"as_expr": {"expr_str": text}}])) is None


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
        "Integer(1",
        "Integer(1))",
        # what would take time or memory without end
        "111111111111111111111111x",
        "Integer(1234567890123)",
        "Pow(Integer(9), Pow(Integer(9), Integer(99)))",
        "Pow(Pow(Integer(9), Integer(99)), Integer(99))",
        "Pow(Mul(Integer(1), Pow(Integer(9), Integer(99))), Integer(99))",
        "Pow(Integer(9), Mul(Integer(99), Integer(99)))",
        "Pow(Integer(9), 999999999999)",
        "PowByNatural(Integer(9), Integer(999999999))",
        "LShift(Integer(1), Integer(999999999999))",
        "Float(1, 999999999999)",
        "Permutation(Integer(999999999))",
    ],
)
def test_an_expression_that_could_do_more_is_not(text):
    assert "its graph has the expression" in str(fault_of(graph(inputs=[{"as_expr": {"expr_str": text}}])))


@pytest.mark.parametrize(
    "target",
    ["torch.ops.aten.add.Tensor", "torch.ops.torchvision.nms.default", "_operator.mul", "torch.ops.aten.linear"],
)
def test_operators_of_torch_are_opened(target):
    assert fault_of(graph(target=target)) is None


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
    assert "its graph calls" in str(fault_of(graph(target=target)))


def test_an_expression_takes_no_time_to_refuse():
    """A pattern that tries every way to divide the digits takes twice as long for each of them: here it would not end."""
    assert "its graph has the expression" in str(fault_of(graph(expr_str="1" * 60 + "x")))
    assert "its graph has the expression" in str(fault_of(graph(expr_str="Integer(1), " * 10_000)))


def test_what_the_checks_of_a_detector_say_is_opened():
    text = "Runtime assertion failed for expression Eq(4*(u15//2), s0 + 1) on node 'ge_18'"
    assert fault_of(graph(inputs=[{"as_string": text}, {"as_string": "...i,pri->...pr"}])) is None
    assert "its graph has the text" in str(fault_of(graph(inputs=[{"as_string": text + " or exit()"}])))


@pytest.mark.parametrize(
    "node",
    [
        {"parameter_name": 'w"), exec(1), ("'},  # torch writes it between quotes into a program
        {"inputs": [{"as_string": "' or exit() or '"}]},
        {"inputs": [{"as_strings": ["a", "a\nb"]}]},
        {"a'b": 1},
        {"in_spec": '[1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]'},
        {"in_spec": '[1, {"type": "builtins.dict", "context": "[\\"a\\"]", "children_spec": []}]'},
    ],
)
def test_a_text_that_could_end_another_is_not(node):
    assert "its graph has the " in str(fault_of(graph(**node)))


def test_the_new_archive_has_the_records_that_were_looked_at():
    """Of a file with two directories torch's reader takes the other one."""
    name = "data/sample_inputs/model.pt"
    hidden, seen = ({".data/version": b"3", name: sample} for sample in (b"a pickle", b""))
    content = two_directories(hidden, seen)
    assert torch._C.PyTorchFileReader(io.BytesIO(content)).get_record(name) == b"a pickle"
    again = inspected(content)
    assert torch._C.PyTorchFileReader(io.BytesIO(again)).get_record(name) == b""


def test_what_no_export_writes_is_refused():
    assert fault_of(archive({"version": "1"})) == "it holds version"
    assert fault_of(archive({"data/aotinductor/model/a.so": "x"})) == "it holds data/aotinductor/model/a.so"
    assert fault_of(archive({"byteorder": "little"})) is None
    assert "it holds byteorder" in str(fault_of(archive({"byteorder": "x" * 99}, compression=zipfile.ZIP_DEFLATED)))
    assert "its graph has as_operator" in str(fault_of(graph(inputs=[{"as_operator": "torch.os.system"}])))
    assert "have one name" in str(fault_of(archive({"byteorder": "a", "BYTEORDER": "b"})))
    assert "no archive that can be looked into" in str(fault_of(b"none"))
    assert "no archive that can be looked into" in str(fault_of(archive({"models/model.json": "{"})))
    assert "no archive" in str(fault_of(archive({"data/weights/model_weights_config.json": '{"config": {"a": {}}}'})))
    assert "no archive" in str(fault_of(archive({"data/weights/model_weights_config.json": "[]"})))
