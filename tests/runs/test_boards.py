"""Boards beside TensorBoard: W&B is given what TensorBoard is, goes on in the same run, and is imported only where it is asked for."""

from __future__ import annotations

import fnmatch
import importlib.machinery
import json
import os
import sys
import types

import pytest
from helpers.runs import TINY, done, refused, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import compressvit
from compressvit.errors import UserError
from compressvit.runs.boards.base import BOARDS, begin, find_boards, opened
from compressvit.runs.boards.wandb import WandB
from compressvit.runs.owned import foreign


class StandIn(types.ModuleType):
    """A module in the place of wandb, which keeps what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.begun: list[dict] = []
        self.logged: list[dict] = []
        self.metrics: dict[str, str | None] = {}
        self.summary: dict[str, float] = {}
        self.ended: list[int] = []
        self.fault: Exception | None = None

    def init(self, **settings):
        if self.fault is not None:
            raise self.fault
        self.begun.append(settings)
        return self

    def Settings(self, **settings):  # noqa: N802
        return settings

    def Image(self, file, caption):  # noqa: N802
        return ("image", file, caption)

    def define_metric(self, name, step_metric=None, hidden=None):
        self.metrics[name] = step_metric

    def log(self, values):
        if self.fault is not None:
            raise self.fault
        self.logged.append(values)

    def finish(self, exit_code):
        self.ended.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A recipe with a diagnostic that is drawn."""
    file = tmp_path_factory.mktemp("boards") / "short.yaml"
    file.write_text(TINY + "diagnostics: [spectra]\n")
    return file


def test_wandb_is_shown_what_tensorboard_is(short, wandb, tmp_path):
    done("apply", short, "--output", tmp_path / "run", "--no-report", "--log-to", "wandb")
    (begun,) = wandb.begun
    assert (begun["project"], begun["name"], begun["resume"]) == ("compressvit", "run", "allow")
    assert (begun["config"]["distill.epochs"], begun["config"]["multiplex.share"], begun["config"]["seed"]) == (1, 2, 0)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    expected = {tag: len(board.Scalars(tag)) for tag in board.Tags()["scalars"]}
    found: dict[str, int] = {}
    for row in wandb.logged:
        for name in row:
            found[name] = found.get(name, 0) + 1
    steps = {name for name in found if name.endswith("/step")}
    pictures = {name for row in wandb.logged for name, value in row.items() if isinstance(value, tuple)}
    assert pictures == {f"diagnostics/{tag.partition('/')[2]}" for tag in board.Tags()["images"]} != set()
    curves = {name: count for name, count in found.items() if name not in steps | pictures}
    assert curves == {tag: count for tag, count in expected.items() if not tag.startswith("final/")}
    assert wandb.summary == {
        tag: pytest.approx(board.Scalars(tag)[0].value) for tag in expected if tag.startswith("final/")
    }
    # every curve is drawn over its own phase's steps
    phases = {name for name in wandb.metrics if name.endswith("/*")}
    assert all(any(fnmatch.fnmatch(name, phase) for phase in phases) for name in curves)
    (event,) = board.Scalars("distill/epoch/loss")
    (row,) = [row for row in wandb.logged if "distill/epoch/loss" in row]
    assert row["distill/step"] == event.step
    assert row["distill/epoch/loss"] == pytest.approx(event.value)
    assert wandb.ended == [0]
    assert foreign(tmp_path / "run") is None


@pytest.mark.wide
def test_a_resumed_run_goes_on_in_the_same_run_of_wandb(short, wandb, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    right = StandIn.define_metric

    def stop(self, name, **settings):
        if name.startswith("distill"):
            raise KeyboardInterrupt
        right(self, name, **settings)

    monkeypatch.setattr(StandIn, "define_metric", stop)
    assert run("apply", short, "--output", folder, "--no-report", "--log-to", "wandb")[0] == 130
    monkeypatch.setattr(StandIn, "define_metric", right)
    done("apply", folder, "--resume", "--no-report", "--log-to", "wandb")
    first, second = (begun["id"] for begun in wandb.begun)
    assert first == second == json.loads((folder / "wandb.json").read_text())["id"]
    assert wandb.ended == [1, 0]  # stopped, and finished
    done("apply", short, "--output", folder, "--overwrite", "--no-report", "--log-to", "wandb")
    assert wandb.begun[-1]["id"] != first


def test_what_fails_at_wandb_does_not_end_the_run(wandb, tmp_path, caplog):
    shown = WandB(tmp_path, None, new=True)
    shown.scalars("distill/train", {"loss": 1.0}, 1)
    wandb.fault = ConnectionError("no server")
    for step in (2, 3):
        shown.scalars("distill/train", {"loss": 1.0}, step)
    shown.close()
    assert [record.message for record in caplog.records] == [
        "W&B shows no more of this run: ConnectionError: no server"
    ]
    assert wandb.logged == [{"distill/train/loss": 1.0, "distill/step": 1}]


def test_a_run_in_one_folder_is_one_of_wandb(wandb, tmp_path):
    def show(*, new=False):
        with opened([WandB], tmp_path, None, new=new) as boards:
            begin(boards)

    for _ in range(2):
        show()
    (tmp_path / "wandb.json").write_text("{")
    show()
    show(new=True)
    first, second, third, fourth = (begun["id"] for begun in wandb.begun)
    assert first == second
    assert len({first, third, fourth}) == 3
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] == fourth
    assert wandb.ended == [1, 1, 1, 1]  # no results


def test_a_run_of_wandb_that_cannot_begin_is_refused(short, wandb, tmp_path):
    wandb.fault = RuntimeError("api_key not configured\nmore")
    words = ("apply", short, "--output", tmp_path / "run", "--log-to", "wandb")
    for _ in range(2):  # nothing has begun, so that the same command is the way on
        assert refused(*words) == (
            "W&B could not begin a run: api_key not configured. Log in with `wandb login`, or set WANDB_MODE=offline to send it later"
        )
        assert not (tmp_path / "run").exists()


def test_a_run_is_not_replaced_by_one_of_wandb_that_cannot_begin(short, wandb, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resolved.yaml").write_text("of the run before")
    wandb.fault = RuntimeError("no server")
    words = ("apply", short, "--output", tmp_path / "run", "--overwrite", "--log-to", "wandb")
    assert "W&B could not begin a run" in refused(*words)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["resolved.yaml"]


def test_wandb_is_imported_only_where_it_is_asked_for(short, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it would fail
    assert set(BOARDS) >= {"tensorboard", "wandb"}
    assert [kind.name for kind in find_boards(["tensorboard"])] == ["tensorboard"]


@pytest.mark.parametrize("verb", ["apply", "sweep", "shrink"])
def test_a_package_that_is_missing_is_told_with_the_command(short, tmp_path, monkeypatch, verb):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else name)
    words = {"apply": (short,), "sweep": (short, "seed=0,1"), "shrink": ("vit_tiny_patch16_224", tmp_path)}[verb]
    output = tmp_path / "run"
    message = refused(verb, *words, "--output", output, "--log-to", "wandb")
    assert message == "W&B needs wandb: pip install 'compressvit[wandb]'"
    assert not output.exists()
    assert "--log-to wendb: there is no such board; did you mean 'wandb'?" in refused(
        verb, *words, "--output", output, "--log-to", "wendb"
    )


def test_from_python_it_is_a_list(short, tmp_path):
    with pytest.raises(UserError, match=r"log_to='x': there is no such board"):
        compressvit.apply(short, tmp_path / "run", log_to=["x"])


@pytest.mark.wide
def test_the_package_itself_keeps_an_offline_run(short, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    done("apply", short, "--output", tmp_path / "run", "--no-report", "--log-to", "wandb")
    (kept,) = (tmp_path / "wandb").glob("offline-run-*")
    identity = json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    assert kept.name.endswith(identity)
    content = next(kept.glob("*.wandb")).read_bytes()
    for name in (b"distill/train/loss", b"final/top1", b"multiplex.share"):
        assert name in content
    assert not [path for path in os.listdir(tmp_path / "run") if path == "wandb"]
