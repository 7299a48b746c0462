"""Grouping layers to share a weight so that the error of sharing is smallest."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compressvit.fitting.lowrank import TINY
from compressvit.fitting.reference import Reference
from compressvit.transforms.low_rank.budget import Group


def group_by_similarity(paths: Sequence[str], count: int, reference: Reference, kind: str, ridge: float) -> list[Group]:
    """Cluster layers of one shape, from anywhere in the model, into `count` groups whose layers lose least by sharing a weight.

    Average-linkage clustering. The distance of two layers is the difference of their weights in the mean of their metrics, relative to
    the weights: twice the error if both take the mean weight. Groups may have any size; a layer that resembles no other forms a group
    by itself. Layers keep their order within a group, and groups are ordered by their first layer.

    Args:
        paths: linear layers of one shape.
        count: from 1 to the number of layers.
        reference: the values of the layers and the moments of their inputs.
        kind: 'weights' or 'inputs'.
        ridge: of the metric.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    if count >= len(paths):
        return [(path,) for path in paths]
    metrics = reference.metrics(paths, kind, ridge, 0.0)
    weights = [reference.weight(path) for path in paths]
    own = [metrics[path].squared_norm(weight) for path, weight in zip(paths, weights, strict=True)]
    distances = torch.zeros(len(paths), len(paths), dtype=torch.float64)
    for i in range(len(paths)):
        for j in range(i):
            lost = sum(metrics[paths[k]].squared_norm(weights[i] - weights[j]) for k in (i, j))
            distances[i, j] = distances[j, i] = (lost / max(own[i] + own[j], TINY)) ** 0.5
    tree = linkage(squareform(distances.numpy(), checks=False), method="average")
    labels = cut_tree(tree, n_clusters=count)[:, 0]  # exactly `count` groups, even with equal distances
    groups: dict[int, list[str]] = {}
    for path, label in zip(paths, labels, strict=True):
        groups.setdefault(int(label), []).append(path)
    return [tuple(group) for group in groups.values()]
