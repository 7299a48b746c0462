"""What a training loop counts over an epoch, and how it says so."""

from __future__ import annotations

from typing import Any

import torch


class Meters:
    """Means over an epoch and the values of the last batch."""

    def __init__(self, sums: dict[str, float] | None = None, count: int = 0) -> None:
        self.last: dict[str, float] = {}
        self._sums = dict(sums or {})
        self._count = count

    def state(self) -> dict[str, Any]:
        """What an interrupted epoch goes on from: the arguments of a new one."""
        return {"sums": self._sums, "count": self._count}

    def add(
        self,
        parts: dict[str, float],
        logits: torch.Tensor,
        teacher_logits: torch.Tensor | None,
        targets: torch.Tensor | None,
    ) -> None:
        """Note a batch. Accuracies count images that carry labels; a mixed image has the label it has more of."""
        values = dict(parts)
        labels = targets.argmax(dim=1) if targets is not None and targets.ndim == 2 else targets
        known = labels >= 0 if labels is not None else None
        if known is not None and known.any():
            for name, outputs in (("", logits), ("teacher_", teacher_logits)):
                if outputs is not None and outputs.shape[-1] > 1 and int(labels.max()) < outputs.shape[-1]:  # type: ignore[union-attr]
                    right = outputs[known].topk(min(5, outputs.shape[-1]), dim=1).indices == labels[known, None]  # type: ignore[index]
                    values[f"{name}top1"] = 100 * right[:, 0].float().mean().item()
                    values[f"{name}top5"] = 100 * right.any(dim=1).float().mean().item()
        self.last = values
        self._count += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Mean of every value over the batches so far."""
        return {name: total / max(1, self._count) for name, total in self._sums.items()}

    def text(self) -> str:
        """The epoch's mean loss and accuracies in a few words."""
        return words(
            self.means(), {"loss": "loss {:.4f}", "top1": "train {:.1f}%", "teacher_top1": "(teacher {:.1f}%)"}
        )

    def details(self) -> str:
        """Everything about the last step: the loss and its terms after weighting, accuracies, the gradient's norm."""
        names = {"top1": "top-1 {:.1f}%", "top5": "top-5 {:.1f}%"}
        names |= {f"teacher_{k}": f"teacher's {text}" for k, text in names.items()}
        names |= {"gradient_norm": "gradient {:.3g}", "lr": "lr {:.2g}"}
        terms = {k: f"{k} {{:.4g}}" for k in self.last if k not in names}
        return words(self.last, terms | names)


def words(values: dict[str, Any], names: dict[str, str]) -> str:
    return "  ".join(text.format(values[k]) for k, text in names.items() if values.get(k) is not None)


def result_text(result: dict[str, Any]) -> str:
    """What an evaluation found, in a few words."""
    return words(result, {"top1": "validation {:.2f}%", "agreement": "agreement {:.2f}%", "cosine": "cosine {:.4f}"})
