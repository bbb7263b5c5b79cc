"""One number of the report's first screen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One number of the first screen: its name, its value, a smaller line below, and a tone for colour."""

    name: str
    value: str
    below: str = ""
    tone: str = ""
