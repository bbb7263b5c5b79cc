"""The verbs of this part of the command line: import, preprocess, phase-flip, consensus, export, simulate."""

from __future__ import annotations
