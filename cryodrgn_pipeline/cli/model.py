"""The verbs of this part of the command line: train, volumes."""

from __future__ import annotations
