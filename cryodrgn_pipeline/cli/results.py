"""The verbs of this part of the command line: analyze, select, report."""

from __future__ import annotations
