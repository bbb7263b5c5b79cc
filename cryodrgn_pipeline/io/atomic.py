"""Outputs appear whole or not at all: write under a temporary name, then rename."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cryodrgn_pipeline.errors import ConfigError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well it takes `path`'s place.

    When the block raises, the temporary file is removed and `path` is left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_directory(path: Path, ours: Collection[str] = ("*",)) -> Iterator[Path]:
    """Give a temporary folder beside `path`; when the block ends well it takes `path`'s place.

    An older folder at `path` is removed only after the new one is complete.

    Parameters
    ----------
    path
        Folder to write.
    ours
        Name patterns of what may lie in an older folder; one with anything else in it is refused with a
        `ConfigError`, so that a user's files are never removed.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: is a file where a folder is to be written; choose another -o")
    if path.is_dir():
        foreign = sorted(
            entry.name for entry in path.iterdir() if not any(fnmatch(entry.name, name) for name in ours)
        )
        if foreign:
            raise ConfigError(
                f"{path}: holds {len(foreign)} entries that are not this step's output, e.g. {foreign[0]!r}; "
                "writing there would remove them. Choose another -o, or move them away."
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        if path.exists():
            outgoing = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            path.rename(outgoing / path.name)
            temporary.rename(path)
            shutil.rmtree(outgoing, ignore_errors=True)
        else:
            temporary.rename(path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically; NaN is refused (it is not JSON)."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
