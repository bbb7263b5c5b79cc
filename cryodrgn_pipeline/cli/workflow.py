"""The verbs of this part of the command line: init, run, demo."""

from __future__ import annotations
