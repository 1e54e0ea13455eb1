"""What a check of trust tried and found, one row of the table that `make trust` prints."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One kind of check."""

    what: str  # tried, in a few words
    tried: int  # how many
    unit: str  # of what: "cases", "calls", "lines", ...
    found: str  # "nothing", or what, in a sentence
    passed: bool
