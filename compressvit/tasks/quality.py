"""A figure that an evaluation measures of a model: its names and formats, for every table, message and chart."""

from __future__ import annotations

from dataclasses import dataclass

_Z = 1.959964  # of the normal distribution, 2.5 % lie above it


@dataclass(frozen=True)
class Curve:
    """The chart of a figure over the training.

    Attributes:
        name: of the chart's file, after the phase's.
        title, caption: above and below it.
    """

    name: str
    title: str
    caption: str


@dataclass(frozen=True)
class Quality:
    """One figure of an evaluation.

    Attributes:
        key: in `results.json` and `metrics.jsonl`.
        short: in the heading of a column.
        long: in the name of a row or an axis.
        in_text: in a sentence, before the value.
        unit: '%', or nothing for a share of 1.
        digits: after the point.
        detail: left out where there is room for a few words only.
        phrase: what a student had, with {} for the value and its unit; by default 'a IN_TEXT of {}'.
        curve: its chart over the training; None: it has none.
        lower_is_better: as of an error.
        of_images: whether it is the mean, in percent, of a value from 0 to 1 of every image, so that it has an interval.
    """

    key: str
    short: str
    long: str
    in_text: str
    unit: str
    digits: int
    detail: bool = False
    phrase: str | None = None
    curve: Curve | None = None
    lower_is_better: bool = False
    of_images: bool = False

    @property
    def heading(self) -> str:
        """`short` with the unit."""
        return f"{self.short} ({self.unit})" if self.unit else self.short

    @property
    def axis(self) -> str:
        """`long` with the unit."""
        return f"{self.long} ({self.unit})" if self.unit else self.long

    def number(self, value: float) -> str:
        """A value without its unit."""
        return f"{value:.{self.digits}f}"

    def text(self, value: float) -> str:
        """A value with its unit."""
        return f"{self.number(value)} {self.unit}".rstrip()

    def interval(self, value: float, images: int) -> tuple[float, float]:
        """The 95 % interval of a mean `of_images`, over images drawn like these: Wilson's, which holds near 0 and 100 %, and for images
        that are right by halves is wider than needed.

        Wilson, Probable inference, the law of succession, and statistical inference, JASA 22, 1927.
        """
        share, spread = value / 100, _Z**2 / images
        middle = (share + spread / 2) / (1 + spread)
        half = (max(0.0, share * (1 - share)) * spread + spread**2 / 4) ** 0.5 / (1 + spread)
        return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)

    def difference(self, lost: float, gained: float, images: int) -> tuple[float, float, float]:
        """By how many points a teacher is above its student, between the ends of its 95 % interval over images drawn like these, by which
        both were judged: an adjusted Wald interval, which holds where few of them differ.

        Bonett and Price, Adjusted Wald confidence interval for a difference of binomial proportions based on paired data, JEBS 37, 2012.

        Args:
            lost, gained: images that the teacher alone, and that the student alone has right.
        """
        before, after = (lost + 1) / (images + 2), (gained + 1) / (images + 2)
        middle = before - after
        half = _Z * ((before + after - middle**2) / (images + 2)) ** 0.5
        return 100 * max(-1.0, middle - half), 100 * (lost - gained) / images, 100 * min(1.0, middle + half)

    def reaches(self, value: float, wanted: float) -> bool:
        """Whether a value is as good as a target, or better."""
        return value <= wanted if self.lower_is_better else value >= wanted

    def roughly(self, value: float) -> str:
        """A value with its unit, to a digit less: of a batch."""
        return f"{value:.{max(0, self.digits - 1)}f}{self.unit}"

    def had(self, value: float) -> str:
        """A value as what a student had, e.g. 'a cosine of 0.9876'."""
        return (self.phrase or f"a {self.in_text} of {{}}").format(self.text(value))
