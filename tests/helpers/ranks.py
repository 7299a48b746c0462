"""The two steps that give layers a rank, for tests that hold for both."""

from __future__ import annotations

from typing import Any

from compressvit import LORS, LowRank


def ranked(share: int | str | None, **options: Any) -> LowRank | LORS:
    """`low_rank` where one layer shares with none, else `lors`."""
    return LowRank(**options) if share == 1 else LORS(share=share, **options)
