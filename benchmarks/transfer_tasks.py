"""What is learned and tested in the protocols of transfer: few images a class, other domains, and the tasks of VTAB-1k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transfer_lists import Domain, Layout, Sample, at_most, draw, fold, repeated

from compressvit.errors import UserError

FEW_SHOT, LEAVE_ONE_OUT, ONE_SOURCE, VTAB = "few_shot", "leave_one_out", "one_source", "vtab"
PROTOCOLS = (FEW_SHOT, LEAVE_ONE_OUT, ONE_SOURCE, VTAB)
GROUPS = {  # of VTAB-1k's tasks, by the names that NOAH's and RepAdapter's folders have
    "natural": ("cifar", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397"),
    "specialised": ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"),
    "structured": (
        *("clevr_count", "clevr_dist", "dmlab", "kitti"),
        *("dsprites_loc", "dsprites_ori", "smallnorb_azi", "smallnorb_ele"),
    ),
}


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Attributes:
        family: tasks of one family and method have the same learning rate and options.
        shots: images of each class; None: all.
        tests: lists by domain; nothing is chosen on them.
    """

    protocol: str
    name: str
    family: str
    shots: int | None
    train: list[Sample]
    tests: dict[str, list[Sample]]
    classes: int


@dataclass(frozen=True)
class Limits:
    """Of what is learned and tested.

    Attributes:
        per_class: images of each class and domain to learn from, where nothing else says how many; None: all.
        tested: images of each domain that are tested, as many of each class; None: all.
    """

    per_class: int | None = None
    tested: int | None = None

    def of_tests(self, layout: Layout, tests: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
        """The tests of a task; the same images for every method and seed."""
        return {name: self._tested(layout, samples) for name, samples in tests.items()}

    def _tested(self, layout: Layout, samples: list[Sample]) -> list[Sample]:
        if self.tested is None:
            return samples
        return at_most(samples, max(1, self.tested // len({label for _, label in samples})), layout.root)


def tasks_of(
    layout: Layout, protocol: str, domains: Sequence[str], shots: Sequence[int], seed: int, limits: Limits
) -> list[Task]:
    """The tasks of a protocol.

    Args:
        domains: few_shot: to learn and test; leave_one_out: to hold out; one_source: to learn from; vtab: tasks.
        shots: few_shot: one task for each; one_source: the last one counts.
    """
    if (layout.classes is None) != (protocol == VTAB):
        raise UserError(
            f"{protocol}: {layout.root} has "
            + (
                "tasks as VTAB-1k, which is for the protocol vtab"
                if layout.classes is None
                else "domains and no tasks of VTAB-1k"
            )
        )
    if protocol in (LEAVE_ONE_OUT, ONE_SOURCE) and len(layout.domains) < 2:
        raise UserError(f"{protocol}: {layout.root} has one domain, {domains[0]}; it takes two")
    if protocol == VTAB:
        return [_vtab(layout, layout.domains[name], limits) for name in domains]
    if protocol == LEAVE_ONE_OUT:
        return [_leave_one_out(layout, name, domains, limits) for name in domains]
    assert layout.classes is not None
    found = []
    for name in domains:
        domain = layout.domains[name]
        for count in shots if protocol == FEW_SHOT else shots[-1:]:
            train = draw(domain.train, count, layout.root, seed, name)
            others = {other.name: other.unseen for other in layout.domains.values() if other.name != name}
            tests = limits.of_tests(layout, {name: domain.test} if protocol == FEW_SHOT else others)
            found.append(Task(protocol, f"{name}_{count}", name, count, train, tests, layout.classes))
    return found


def _leave_one_out(layout: Layout, held_out: str, all_held_out: Sequence[str], limits: Limits) -> Task:
    never = [name for name in layout.domains if name not in all_held_out]
    train = [
        sample
        for name, domain in layout.domains.items()
        if name != held_out
        for sample in at_most(domain.train, limits.per_class, layout.root)
    ]
    tests = limits.of_tests(layout, {held_out: layout.domains[held_out].unseen})
    assert layout.classes is not None
    return Task(LEAVE_ONE_OUT, held_out, "all" if never else held_out, None, train, tests, layout.classes)


def _vtab(layout: Layout, domain: Domain, limits: Limits) -> Task:
    classes = 1 + max(label for _, label in (*domain.train, *domain.test))
    tests = limits.of_tests(layout, {domain.name: domain.test})
    return Task(VTAB, domain.name, domain.name, None, domain.train, tests, classes)


def to_choose(
    layout: Layout, protocol: str, task: Task, domains: Sequence[str], shots: Sequence[int], limits: Limits
) -> tuple[list[Sample], list[Sample]]:
    """What to learn from and what to choose on, of a task's family: no image of a domain that any task of it tests as unseen.

    VTAB-1k: its lists of 800 and 200. Few shots and one source: a fifth of each class of the most images that are drawn, with seed 0.
    Leave one out: a fifth of the domains that are never held out, or where all are, of those that this task learns from.
    """
    root = layout.root
    if protocol == VTAB:
        choice = layout.domains[task.name].choice
        assert choice is not None
        return choice
    if protocol == LEAVE_ONE_OUT:
        wanted = [n for n in layout.domains if (n not in domains if task.family == "all" else n != task.name)]
        parts = [fold(at_most(layout.domains[n].train, limits.per_class, root), root) for n in wanted]
        fit, held = [one for part in parts for one in part[0]], [one for part in parts for one in part[1]]
    else:
        fit, held = fold(draw(layout.domains[task.family].train, max(shots), root, 0, task.family), root)
    if not held:
        raise UserError(
            f"{task.family}: with one image of each class there is none to choose on; give --fixed, or more --shots"
        )
    assert not repeated([fit, held])
    return fit, held
