"""`evaluate` of what `export` and `merge` wrote: the figures of the artifact, and no file that runs code unless it is trusted."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.archives import two_directories
from helpers.runs import done, refused, run

from compressvit.runs.owned import foreign


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """A finished run with its student in pt2. Not to be changed: copy it first."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("exported") / "run")
    done("export", folder, "--to", "pt2")
    return folder


def figures(*words: object) -> dict:
    return json.loads(done("evaluate", *words, "--json"))


def alike(found: dict, own: dict) -> bool:
    """Whether two results have the same figures; of the loss measured up to 4e-8 apart."""
    assert found["loss"] == pytest.approx(own["loss"], abs=1e-5)
    return all(found[key] == own[key] for key in ("images", "top1", "top5", "data", "intervals"))


@pytest.fixture
def file(exported, tmp_path):
    """The student in pt2 alone, with its checksum beside it."""
    for name in ("student.pt2", "student.pt2.sha256"):
        shutil.copy(exported / "exported" / name, tmp_path / name)
    return tmp_path / "student.pt2"


@pytest.mark.wide  # torch.export takes seconds the first time
def test_a_program_of_torch_has_the_figures_of_its_student(exported):
    file = exported / "exported" / "student.pt2"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert (file.parent / "student.pt2.sha256").read_text() == f"{digest}  student.pt2\n"  # as sha256sum writes it
    found, own = figures(file), figures(exported)
    assert alike(found, own)
    assert found["bytes"] == file.stat().st_size
    assert "parameters" not in found
    assert found["path"] == str(file)
    assert foreign(exported) is None
    assert run("evaluate", file, "--require", "top1>=101")[0] == 1
    assert "--require macs<=1: macs are not counted in a file of pt2" in refused(
        "evaluate", file, "--require", "macs<=1"
    )


@pytest.mark.wide
def test_a_program_of_torch_that_is_trusted_is_opened_without_a_checksum(file):
    data = ("data.name=digits", "data.limit_val=16")
    expected = figures(file, *data)
    file.with_name("student.pt2.sha256").unlink()
    assert figures(file, *data, "--trust")["loss"] == expected["loss"]


@pytest.mark.wide  # torch.export takes seconds the first time
def test_a_program_of_torch_is_opened_only_with_the_checksum_of_its_export(file):
    data = ("data.name=digits", "data.limit_val=16")
    assert "its data is not known; add data.name=digits" in refused("evaluate", file)
    sidecar = file.with_name("student.pt2.sha256")
    sidecar.unlink()
    assert "is not opened: reading a .pt2 can run code" in refused("evaluate", file, *data)
    sidecar.write_text(f"{hashlib.sha256(b'another').hexdigest()}  student.pt2\n")
    assert "its checksum is not that in student.pt2.sha256" in refused("evaluate", file, *data)
    sidecar.write_text("")
    assert "its checksum is not that in student.pt2.sha256" in refused("evaluate", file, *data)
    sidecar.unlink()
    sidecar.mkdir()
    assert "give --trust where you trust whoever made it" in refused("evaluate", file, *data)


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def pickled(file: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Attack(file), buffer)
    return buffer.getvalue()


def in_sample_inputs(records: dict[str, bytes], ran: Path) -> None:
    records["data/sample_inputs/model.pt"] = pickled(ran)


def in_weights(records: dict[str, bytes], ran: Path) -> None:
    config = json.loads(records["data/weights/model_weights_config.json"])
    first = next(iter(config["config"].values()))
    records[f"data/weights/{first['path_name']}"] = pickled(ran)
    first["use_pickle"] = True
    records["data/weights/model_weights_config.json"] = json.dumps(config).encode()


def in_an_object(records: dict[str, bytes], ran: Path) -> None:
    meta = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    records["data/constants/model_constants_config.json"] = json.dumps({"config": {"a": meta}}).encode()
    records["data/constants/opaque_obj_0"] = pickle.dumps(Attack(ran))


def in_an_expression(records: dict[str, bytes], ran: Path) -> None:
    graph = records["models/model.json"].decode()
    code = f"__import__('pathlib').Path('{ran}').touch() or Symbol('s0')"
    start = graph.index('"expr_str": "') + len('"expr_str": "')
    end = graph.index('"', start)
    records["models/model.json"] = graph.replace(graph[start:end], code).encode()


def in_a_call(records: dict[str, bytes], ran: Path) -> None:
    records["models/model.json"] = records["models/model.json"].replace(
        b"torch.ops.aten.softmax.int", b"torch.os.system"
    )


def in_a_name(records: dict[str, bytes], ran: Path) -> None:
    """torch writes the names of parameters between quotes into a program."""
    code = ", ".join(str(byte) for byte in f"__import__('pathlib').Path('{ran}').touch()".encode())
    for name in ("models/model.json", "data/weights/model_weights_config.json"):
        records[name] = records[name].replace(
            b'"head.weight"', json.dumps(f'training"), exec(bytes([{code}])), getattr(self, "head').encode()
        )


ATTACKS = {
    "sample_inputs": (in_sample_inputs, "it holds a pickle, data/sample_inputs/model.pt"),
    "weights": (in_weights, "model_weights_config.json says that values are pickled"),
    "object": (in_an_object, "model_constants_config.json says that values are pickled"),
    "expression": (in_an_expression, 'its graph has the expression "__import__'),
    "call": (in_a_call, "its graph calls 'torch.os.system'"),
    "name": (in_a_name, "its graph has the "),
}


@pytest.mark.wide
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_malicious_program_runs_nothing(file, tmp_path, attack):
    """Not even where its checksum lies beside it, which whoever made it can write too."""
    change, message = ATTACKS[attack]
    ran = tmp_path / "ran"
    with zipfile.ZipFile(file) as archive:
        top = archive.namelist()[0].partition("/")[0]
        records = {name.removeprefix(f"{top}/"): archive.read(name) for name in archive.namelist()}
    change(records, ran)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(f"{top}/{name}", content)
    words = ("evaluate", file, "data.name=digits", "data.limit_val=16")
    assert "its checksum is not that in student.pt2.sha256" in refused(*words)
    assert not ran.exists()
    file.with_name("student.pt2.sha256").write_text(hashlib.sha256(file.read_bytes()).hexdigest())
    assert message in refused(*words)
    assert not ran.exists()
    if attack in ("sample_inputs", "weights", "expression", "name"):  # the attack is one
        run(*words, "--trust")
        assert ran.exists()


@pytest.mark.wide
def test_a_program_with_two_directories_is_read_as_it_was_inspected(file, tmp_path):
    """torch's reader would take the other directory, with the attack."""
    ran = tmp_path / "ran"
    words = ("evaluate", file, "data.name=digits", "data.limit_val=16")
    with zipfile.ZipFile(file) as archive:
        seen = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    hidden = dict(seen)
    in_sample_inputs(hidden, ran)
    file.write_bytes(two_directories(hidden, seen))
    file.with_name("student.pt2.sha256").write_text(hashlib.sha256(file.read_bytes()).hexdigest())
    done(*words)
    assert not ran.exists()
    run(*words, "--trust")
    assert ran.exists()  # the attack is one


@pytest.mark.wide
def test_a_damaged_program_that_is_trusted_is_told(file):
    file.write_bytes(b"no program")
    assert "is not a program that torch reads" in refused("evaluate", file, "--trust", "data.name=digits")


def test_a_folder_of_timm_has_the_figures_of_its_artifact(finished, tmp_path):
    folder = tmp_path / "teacher"
    done("export", finished / "teacher", "--to", "timm", "--output", folder)
    data = ("data.name=digits", "data.limit_val=16")
    assert "its data is not known; add data.name=digits" in refused("evaluate", folder)
    found, own = figures(folder, *data), figures(finished / "teacher")
    assert alike(found, own)
    assert (found["parameters"], found["macs"]) == (own["parameters"], own["macs"])
    assert figures(folder, *data, "data.mean=[0.9]")["loss"] != found["loss"]
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["std"] = [0]
    (folder / "config.json").write_text(json.dumps(config))
    assert "does not say how images are made: std.0: " in refused("evaluate", folder, *data)
    (folder / "model.safetensors").write_bytes(b"none")
    config["pretrained_cfg"]["std"] = [1]
    (folder / "config.json").write_text(json.dumps(config))
    assert "is not a complete safetensors file" in refused("evaluate", folder, *data)


def test_a_merged_model_has_the_figures_of_its_run(trained, tmp_path):
    folder = shutil.copytree(trained[1], tmp_path / "run")
    done("merge", folder, "--dense")
    found, own = figures(folder / "merged"), figures(folder)
    assert alike(found, own)
    assert found["parameters"] > own["parameters"]


def test_a_file_of_safetensors_has_the_figures_of_its_student(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    done("export", folder, "--to", "safetensors")
    assert alike(figures(folder / "exported" / "student.safetensors"), figures(folder))
    assert "has no compressvit.json in its header" in refused("evaluate", folder / "student" / "model.safetensors")


@pytest.mark.wide
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_file_of_openvino_has_the_figures_of_its_student(finished, tmp_path, precision):
    pytest.importorskip("openvino")
    folder = shutil.copytree(finished, tmp_path / "run")
    done("export", folder, "--to", "openvino", "--precision", precision)
    file = next((folder / "exported").glob("*.xml"))
    found, own = figures(file), figures(folder)
    assert found["loss"] == pytest.approx(own["loss"], abs=1e-5 if precision == "fp32" else 1e-2)
    assert found["bytes"] == sum(path.stat().st_size for path in file.parent.iterdir())
    file.with_suffix(".bin").unlink()
    assert "student" in refused("evaluate", file)
    file.with_suffix(".bin").touch()
    file.write_text("<net>")
    assert "is not a model that OpenVINO reads" in refused("evaluate", file)
