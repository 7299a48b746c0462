"""A teacher's answers as bytes and in files: what is read is what was asked, within the stated error."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from helpers.images import GRAY, side
from helpers.training import random_batches, tiny_vit

from compressvit.data.order import View
from compressvit.errors import UserError
from compressvit.tasks.base import find_task, task_of
from compressvit.training import losses
from compressvit.training.asking import Asked, Shown
from compressvit.training.cache import cache as caching
from compressvit.training.cache.cache import TeacherCache
from compressvit.training.cache.form import Bytes, Halves, Singles, TopLogits, form_of
from compressvit.training.cache.identity import of_teacher
from compressvit.training.cache.spec import Cache
from compressvit.training.cache.store import Index, Store, caches_in, clear, create, is_free, read_index, view_bytes
from compressvit.training.pairs import match_layers
from compressvit.training.phases.distill import Distill
from compressvit.training.spec import Training
from compressvit.training.step import Pass

CPU = torch.device("cpu")
ALL = {
    "prediction": {"weight": 1},
    "attention_relation": {"weight": 1},
    "hidden_relation": {"weight": 1},
    "feature": {"weight": 1},
}
ALL |= {"cka": {"weight": 1}}


def logits(images=64, classes=100, seed=0):
    return 4 * torch.randn(images, classes, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------------------- logits


def test_all_logits_are_kept_within_the_error_of_float16():
    teacher = logits() + 100
    kept = TopLogits(100, 100, 1.0)
    found = kept.decode(kept.encode(teacher))
    largest = teacher.max(1, keepdim=True).values
    assert ((found - teacher).abs() <= 2**-11 * (largest - teacher) + 1e-5).all()  # 1e-5: float32 at 100
    for name, ours, theirs in gradients(teacher, found, 1.0):
        assert (ours - theirs).abs().max() < 1e-4, name  # measured 3e-6 of a loss of 10, and 1e-6 of 0.016


def gradients(teacher, found, temperature):
    """Loss, and its gradient by the student's logits, against a teacher's logits and against what was kept of them."""
    student = logits(seed=1).requires_grad_()
    values = [losses.prediction(student, other, temperature) for other in (teacher, found)]
    yield "loss", *values
    yield "gradient", *(torch.autograd.grad(value, student)[0] for value in values)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_other_classes_keep_their_share_and_no_more_is_lost(temperature):
    teacher, kept = logits(), TopLogits(5, 100, temperature)
    found = kept.decode(kept.encode(teacher))
    ours, theirs = ((value / temperature).softmax(1) for value in (found, teacher))
    top = teacher.topk(5).indices
    rest, kept_rest = (value.scatter(1, top, 0).sum(1) for value in (theirs, ours))
    assert rest.median() > 0.01
    torch.testing.assert_close(kept_rest, rest, rtol=1e-2, atol=0)  # measured 4e-3, of float16
    torch.testing.assert_close(ours.gather(1, top), theirs.gather(1, top), rtol=1e-2, atol=0)
    (_, *_), (_, one, other) = gradients(teacher, found, temperature)
    assert ((one - other).abs().sum(1) * len(one) * temperature <= 2 * rest * 1.01).all()


def test_many_classes_have_indices_of_two_bytes():
    teacher = logits(2, 65_536)
    kept = TopLogits(3, 65_536, 1.0)
    assert kept.encode(teacher).shape == (2, kept.bytes) == (2, 18)
    assert torch.equal(kept.decode(kept.encode(teacher)).topk(3).indices, teacher.topk(3).indices)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("kept", "of"), [(Halves, lambda v, s: v.abs() * 2**-8), (Bytes, lambda v, s: s / 253.9)])
def test_tensors_are_kept_within_the_stated_error(kept, of, images):
    value = torch.randn(images * 4, 5, 24, generator=torch.Generator().manual_seed(0)) * 10
    part = kept((4, 5, 24))
    encoded = part.encode(value)
    assert (encoded.dtype, tuple(encoded.shape)) == (torch.uint8, (images, part.bytes))
    found = part.decode(encoded)
    assert found.shape == value.shape
    assert ((found - value).abs() <= of(value, value.abs().amax(-1, keepdim=True))).all()
    assert not torch.equal(found, value)
    assert part.decode(part.encode(torch.zeros_like(value))).abs().max() == 0


def test_tensors_in_fp32_are_kept_as_they_are():
    value = torch.randn(12, 5, 24)
    part = Singles((4, 5, 24))
    encoded = part.encode(value.transpose(1, 2).contiguous().transpose(1, 2))  # whatever its strides
    assert (encoded.dtype, tuple(encoded.shape)) == (torch.uint8, (3, part.bytes))
    assert torch.equal(part.decode(encoded), value)


# ------------------------------------------------------------------------------------------------------------------------- losses


def setting(folder, dtype="bf16", teacher=None, **options):
    """A student, its terms, the teacher that is asked, and the same behind a cache."""
    student, teacher = tiny_vit(), teacher or tiny_vit(seed=1).eval()
    spec = Distill(losses=ALL, **options)
    terms = spec.terms(student, match_layers(student, teacher, spec.layers)[0], task_of(student), teacher)
    cached = Cache(dtype=dtype)
    form = form_of(cached, side(teacher), terms, task_of(teacher), 1.0)
    index = Index(images=12, bytes=form.bytes, identity={})
    create(folder, index)
    cache = TeacherCache(cached, 2, form, Store(folder, index), mixes=False)
    return student, terms, lambda: Asked(side(teacher), GRAY, terms, CPU), cache


def loss_of(student, terms, answers, images, shown=None):
    whole = Pass(side(student), answers, terms, task_of(student), torch.autocast("cpu", enabled=False), Training())
    student.zero_grad()
    loss, parts, _ = whole(
        images, torch.zeros(len(images), dtype=torch.long), find_task("classification").labels(torch.zeros(1)), shown
    )
    loss.backward()
    whole.close()
    return {**parts, **{name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}}


def test_pairs_in_another_order_keep_the_same_bytes():
    student, teacher = tiny_vit(depth=4), tiny_vit(seed=1, depth=4).eval()

    def kept(*layers):
        spec = Distill(losses=ALL, layers=[list(pair) for pair in layers])
        terms = spec.terms(student, match_layers(student, teacher, spec.layers)[0], task_of(student), teacher)
        return form_of(Cache(), side(teacher), terms, task_of(teacher), 1.0)

    assert kept((1, 1), (3, 3)) == kept((3, 3), (1, 1)) != kept((1, 1), (2, 2))


@pytest.mark.parametrize("other", [{"num_heads": 1}, {"global_pool": "avg"}, {"depth": 3}], ids=str)
def test_a_teacher_is_known_by_settings_that_it_does_not_print(other):
    plain = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    plain |= {"class_token": True, "num_classes": 3, "fc_norm": False}
    one, same = (timm.create_model("vit_tiny_patch16_224", **plain) for _ in range(2))
    another = timm.create_model("vit_tiny_patch16_224", **{**plain, **other})
    same.load_state_dict(one.state_dict())
    another.load_state_dict(one.state_dict(), strict=False)
    assert of_teacher(same) == of_teacher(one) == of_teacher(one.train())
    assert of_teacher(another)["modules"] != of_teacher(one)["modules"]


@pytest.mark.parametrize(
    ("dtype", "most"), [("bf16", 0.01), ("int8", 0.02), ("fp32", 1e-4)]
)  # measured 0.0023, 0.0062 and 3.5e-5, of a gradient; the last one of the logits' float16
def test_reading_gives_the_loss_and_gradient_of_asking(dtype, most, tmp_path):
    student, terms, asked, cache = setting(tmp_path, dtype)
    images = random_batches(1, 6)[0][0]
    shown = Shown(View(0, 1), torch.tensor([4, 0, 11, 7, 2, 9]), 0)
    expected = loss_of(student, terms, asked(), images)
    filled = loss_of(student, terms, cache.before(asked()), images, shown)
    assert (cache.read, cache.asked) == (0, 6)
    read = loss_of(student, terms, cache.before(asked()), images, shown)
    assert (cache.read, cache.asked) == (6, 6)
    assert len(expected) > 30
    off = {}
    for name, value in expected.items():
        assert torch.equal(read[name], filled[name]), name
        off[name] = float((read[name] - value).norm() / value.norm())
    assert 0 < max(off.values()) < most, off


def test_only_what_is_missing_is_asked_and_a_damaged_answer_is_missing(tmp_path):
    _, _, asked, cache = setting(tmp_path)
    images, view = random_batches(1, 6)[0][0], View(0, 0)
    teacher = asked()
    behind = cache.before(teacher)
    behind(images[:4], Shown(view, torch.arange(4), 0))
    path, row = cache.store.path(0), view_bytes(1, cache.form.bytes)
    whole = bytearray(path.read_bytes())
    assert len(whole) == 12 * row
    whole[row + 5] ^= 1  # of image 1
    whole[2 * row : 3 * row] = whole[:row]  # of image 0 in the place of image 2
    path.write_bytes(whole)
    assert [(v.answers, v.damaged, v.cut) for v in cache.store.verify()] == [(2, [1, 2], False)]
    seen = []
    teacher._model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    outputs, _ = behind(images, Shown(view, torch.tensor([0, 1, 2, 3, 4, -1]), 1))
    assert [len(batch) for batch in seen] == [4]
    assert torch.equal(seen[0], images[[1, 2, 4, 5]])
    torch.testing.assert_close(outputs, teacher(images)[0], atol=1e-3, rtol=1e-3)
    seen.clear()
    behind(images, Shown(view, torch.tensor([0, 1, 2, 3, 4, -1]), 1))
    assert torch.equal(seen[0], images[[5]])  # the one without a place is asked every time
    path.write_bytes(path.read_bytes()[: 3 * row + 1])
    assert [(v.answers, v.damaged, v.cut) for v in cache.store.verify()] == [(3, [], True)]
    cache.store.close()
    seen.clear()
    behind(images[:5], Shown(view, torch.arange(5), 1))
    assert torch.equal(seen[0], images[[3, 4]])


def test_a_teacher_whose_answer_depends_on_the_batch_is_refused(tmp_path):
    class Centred(torch.nn.Module):
        num_classes = 4

        def __init__(self):
            super().__init__()
            self.whole = tiny_vit(seed=1)

        def forward(self, images):
            found = self.whole(images)
            return found - found.mean(0)

    _, _, _, cache = setting(tmp_path)
    form = form_of(cache.spec, side(Centred()), [], task_of(tiny_vit()), 1.0)
    index = Index(images=12, bytes=form.bytes, identity={})
    behind = TeacherCache(cache.spec, 1, form, Store(tmp_path, index), mixes=False).before(
        Asked(side(Centred().eval()), GRAY, [], CPU)
    )
    with pytest.raises(
        UserError, match="its outputs of the teacher for an image depends on the other images of the batch"
    ):
        behind(random_batches(1, 4)[0][0], Shown(View(0, 0), torch.arange(4), 0))


def test_windows_belong_to_their_images():
    """Swin's taps have a row for every window: those of an image are kept together."""
    small = {
        "img_size": 32,
        "patch_size": 4,
        "window_size": 4,
        "embed_dim": 8,
        "depths": (2, 1),
        "num_heads": (2, 2),
        "in_chans": 1,
    }
    teacher = timm.create_model("swin_tiny_patch4_window7_224", num_classes=4, **small).eval()
    spec = Distill(losses={"attention_relation": {"weight": 1}})
    terms = spec.terms(teacher, match_layers(teacher, teacher, spec.layers)[0], task_of(teacher), teacher)
    big = type(side(teacher))(teacher, GRAY.at((1, 32, 32)))
    form = form_of(Cache(), big, terms, task_of(teacher), 1.0)
    shapes = {part.shape for _, part in form.taps}
    assert (4, 16, 24) in shapes
    asked, images = Asked(big, big.input, terms, CPU), torch.randn(3, 1, 32, 32)
    whole = form.encode(*asked(images))
    for i in range(3):  # off by the rounding of a sum in another order, then of bf16
        outputs, taps = form.decode(whole[i : i + 1])
        alone, own = form.decode(form.encode(*asked(images[i : i + 1])))
        torch.testing.assert_close(outputs, alone, atol=1e-3, rtol=1e-3)
        for path, seen in own.items():
            torch.testing.assert_close(taps[path]["output"], seen["output"], atol=0.02, rtol=0.01)


# -------------------------------------------------------------------------------------------------------------------------- files


def test_files_are_plain_and_of_the_stated_size(tmp_path):
    index = Index(images=5, bytes=7, identity={"seed": 0})
    create(tmp_path / "a", index)
    create(tmp_path / "a", index)  # by another run, at the same moment
    store = Store(tmp_path / "a", index)
    answers = np.arange(14, dtype=np.uint8).reshape(2, 7)
    store.write(3, [4, -1], answers)
    found, there = store.read(3, [4, 0, -1])
    assert there.tolist() == [True, False, False]
    assert found[0].tolist() == list(range(7))
    store.close()
    assert store.path(3).stat().st_size == view_bytes(5, 7) == 55
    assert read_index(tmp_path / "a") == index
    (tmp_path / "a" / "notes.txt").write_text("mine")
    assert caches_in(tmp_path) == [tmp_path / "a"] == caches_in(tmp_path / "a")
    assert clear(tmp_path / "a") > 55
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["notes.txt"]


def test_what_a_killed_run_left_of_an_index_is_in_nobodys_way(tmp_path):
    assert is_free(tmp_path / "new")
    (tmp_path / ".cache.json.123.part").write_text("{")
    assert is_free(tmp_path)
    index = Index(images=5, bytes=7, identity={})
    create(tmp_path, index)
    assert not is_free(tmp_path)
    clear(tmp_path)
    assert not tmp_path.exists()
    tmp_path.write_text("a file")
    assert not is_free(tmp_path)


def test_a_folder_that_another_run_makes_a_cache_at_the_same_moment_is_taken(tmp_path, monkeypatch):
    """Found with four processes that made 1,500 folders each: seven were refused."""
    index = Index(images=3, bytes=5, identity={"of": "one"})

    def free(folder):
        create(folder, index)
        return is_free(folder)

    monkeypatch.setattr(caching, "is_free", free)
    caching.make(tmp_path / "one", index, "answers", "answers to")
    assert read_index(tmp_path / "one") == index
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a").touch()
    monkeypatch.undo()
    with pytest.raises(UserError, match="holds something other than answers; give an empty folder"):
        caching.make(tmp_path / "other", index, "answers", "answers to")


def test_answers_that_are_no_tensors_are_refused():
    class Named(torch.nn.Module):
        def forward(self, images):
            return {"classes": images}

    class Joined(torch.nn.Module):
        def forward(self, images):
            return images.sum(0)

    for teacher, what in ((Named(), "a dict"), (Joined(), r"a tensor \(1, 8, 8\) for 2 images")):
        with pytest.raises(
            UserError, match=f"its outputs of {type(teacher).__name__}, the teacher, is {what}; leave cache out"
        ):
            form_of(Cache(), side(teacher), [], find_task("classification"), 1.0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"images": 5}', r"is no index of a cache \(bytes: Field required\)"),
        ('{"images": 0, "bytes": 3, "identity": {}}', "images: Input should be greater than or equal to 1"),
        (
            '{"format": 2, "images": 5, "bytes": 3, "identity": {}}',
            "has format 2, and this version of compressvit reads 1",
        ),
        ("[", "cannot be read"),
    ],
)
def test_an_index_that_is_none_is_refused(content, words, tmp_path):
    (tmp_path / "cache.json").write_text(content)
    with pytest.raises(UserError, match=words):
        read_index(tmp_path)
