"""A method of another package, `examples/ia3`: planned, trained, merged, reported and loaded without an edit here, and missed by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import process
from helpers.runs import TINY

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "ia3"
RECIPE = TINY.replace("multiplex: {share: 2}", "ia3").replace("distill: {epochs: 1}", "finetune: {epochs: 1}")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the distribution's files as pip would leave them."""
    folder = tmp_path_factory.mktemp("site-packages")
    (folder / "compressvit_ia3.py").write_text((EXAMPLE / "compressvit_ia3.py").read_text())
    project = (EXAMPLE / "pyproject.toml").read_text()
    group, entry = '[project.entry-points."compressvit.transforms"]', 'ia3 = "compressvit_ia3"'
    assert f"{group}\n{entry}" in project
    assert 'name = "compressvit-ia3"\nversion = "0.1.0"' in project
    info = folder / "compressvit_ia3-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: compressvit-ia3\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[compressvit.transforms]\nia3 = compressvit_ia3\n")
    return folder


def python(*words: object, path: Path | None = None, code: int = 0) -> str:
    """Output and errors of a Python of its own, with `path` beside compressvit on the path."""
    answer = process.python(*words, path=[path] if path else [])
    said = answer.out + answer.err
    assert answer.code == code, said
    assert "Traceback" not in said
    return said


COMMANDS = """
import contextlib, io, json, sys
from compressvit.cli import main
answers = []
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(words)
    answers.append((code, " ".join(said.getvalue().split())))
print(json.dumps(answers))
"""


def in_one_process(*commands: tuple[object, ...], path: Path | None = None) -> list[tuple[int, str]]:
    """Exit codes and output of several commands of compressvit; each process imports for a second."""
    return json.loads(python("-c", COMMANDS, json.dumps([list(map(str, words)) for words in commands]), path=path))


@pytest.fixture(scope="module")
def run(tmp_path_factory, installed) -> Path:
    """A run that trained the method, wrote an adapter file and was reported."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "recipe.yaml").write_text(RECIPE)
    words = ("apply", "--no-report", folder / "recipe.yaml", "--output", folder / "run")
    (code, said), reported = in_one_process(words, ("report", folder / "run"), path=installed)
    assert code == 0, said
    assert reported[0] == 0
    assert "report.html" in reported[1]
    return folder / "run"


def test_a_recipe_names_it_by_its_word(run, installed):
    recipe = run.parent / "recipe.yaml"
    said = python(
        "-c",
        "import sys\n"
        "from compressvit.cli import main\n"
        "from compressvit.recipe.schema import documentation, json_schema\n"
        "assert main(['plan', sys.argv[1]]) == 0\n"
        "assert 'ia3' in json_schema()['$defs']['Step']['properties']\n"
        "assert documentation('ia3') == []\n",
        recipe,
        path=installed,
    )
    assert "ia3" in said


def test_the_files_name_the_package(run):
    steps = json.loads((run / "student" / "compressvit.json").read_text())["transforms"]
    assert [(step["transform"], step["package"]) for step in steps] == [("ia3", "compressvit-ia3")]
    assert json.loads((run / "environment.json").read_text())["versions"]["compressvit-ia3"] == "0.1.0"


def test_it_is_reported(run):
    assert "scales of the hidden neurons" in (run / "report.html").read_text()


def test_it_is_loaded_and_merged(run, installed, tmp_path):
    merged = tmp_path / "merged"
    said = python(
        "-c",
        "import sys, timm, torch, compressvit\n"
        "from compressvit.cli import main\n"
        "run, merged = sys.argv[1:]\n"
        "assert main(['merge', run, '--output', merged]) == 0\n"
        "student = compressvit.load(f'{run}/student')\n"
        "images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))\n"
        "scales = [p for n, p in student.named_parameters() if n.endswith('ia3.scale')]\n"
        "assert len(scales) == 4 and all((p != 1).any() for p in scales), 'it was not trained'\n"
        "plain = timm.create_model(f'local-dir:{merged}', pretrained=True).eval()\n"
        "assert not any('ia3' in name for name in plain.state_dict())\n"
        "with torch.no_grad():\n"
        "    assert torch.allclose(student(images), plain(images), atol=1e-5)\n"
        "teacher = compressvit.load(f'{run}/teacher')\n"
        "compressvit.load_adapter(teacher, f'{run}/adapter.safetensors')\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(student(images), teacher(images))\n"
        "compressvit.remove_adapter(teacher)\n"
        "assert not any('ia3' in name for name in teacher.state_dict())\n",
        run,
        merged,
        path=installed,
    )
    assert str(merged) in said


MISSING = "the transform 'ia3' of the package compressvit-ia3, which is not installed here"


def test_without_the_package_it_is_named(run):
    verbs = [
        ("merge", run / "student"),
        ("evaluate", run / "student", "data.name=digits"),
        ("plan", run / "resolved.yaml"),
    ]
    *of_files, (code, said) = in_one_process(*verbs)
    for failed, message in of_files:
        assert failed == 2
        assert MISSING in message
        assert "`pip install compressvit-ia3`" in message
    assert code == 2
    assert "steps[0].ia3: unknown key, which neither compressvit nor an installed package offers" in said
    assert "multiplex" in said, "what is known"


def test_without_the_package_an_adapter_file_names_it(run):
    said = python(
        "-c",
        "import sys, compressvit\n"
        "teacher = compressvit.load(f'{sys.argv[1]}/teacher')\n"
        "try:\n    compressvit.load_adapter(teacher, f'{sys.argv[1]}/adapter.safetensors')\n"
        "except compressvit.UserError as error:\n    print(error)\n",
        run,
    )
    assert MISSING in said


def test_a_broken_package_is_named_where_its_word_is_used(run, installed, tmp_path):
    for item in installed.glob("*.dist-info"):
        (tmp_path / item.name).mkdir()
        for file in item.iterdir():
            (tmp_path / item.name / file.name).write_text(file.read_text())
    (tmp_path / "compressvit_ia3.py").write_text("raise RuntimeError('built for another torch')\n")
    fault = "the transform 'ia3' of the package compressvit-ia3 cannot be used: RuntimeError: built for another torch"
    verbs = [("merge", run / "student"), ("recipes", "list"), ("plan", run / "resolved.yaml")]
    merged, listed, planned = in_one_process(*verbs, path=tmp_path)
    assert merged[0] == 2
    assert fault in merged[1]
    assert listed[0] == 0
    assert planned[0] == 2
    assert f"steps[0].ia3: unknown key; {fault}" in planned[1]


@pytest.mark.wide_unless(lambda part: part == "on a ViT")
@pytest.mark.parametrize("part", ["on a ViT", "alone", "in pairs"])
def test_its_test_file_runs_every_law(installed, part):
    """As `check_transform` does, which runs the last two parts."""
    said = python(
        "-c",
        "import sys\n"
        "from compressvit_ia3 import IA3\n"
        "from compressvit.testing import checks\n"
        "one, both = list(checks.transform_checks(IA3)), list(checks.pair_checks(IA3))\n"
        "parts = {'on a ViT': ([c for c in one if '-vit-' in c.name], []), 'alone': (one, []), 'in pairs': ([], both)}\n"
        "one, both = parts[sys.argv[1]]\n"
        "checks.transform_checks, checks.pair_checks = lambda _: one, lambda _: both\n"
        "checks.check_transform(IA3)\n"
        "print(len([*one, *both]), 'checks')\n",
        part,
        path=installed,
    )
    assert int(said.split()[0]) > {"on a ViT": 10, "alone": 60, "in pairs": 20}[part]
