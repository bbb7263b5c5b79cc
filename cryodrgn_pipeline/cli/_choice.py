"""The options that choose particles of a run; `select` and `export` share them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cryodrgn_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from cryodrgn_pipeline.landscape.select import Selection

Cluster = Annotated[list[str] | None, typer.Option(help="Clusters to keep, such as 0,3.", show_default=False)]
Range = Annotated[
    list[str] | None,
    typer.Option(
        "--range", help="COLUMN:LOW:HIGH, inclusive; an end may be empty. Repeatable.", show_default=False
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        help="A condition over columns, such as 'loss < 1.5 and abs(z_0) > 1'. Repeatable.",
        show_default=False,
    ),
]
Outline = Annotated[
    list[str] | None,
    typer.Option(
        help="COLUMN_X,COLUMN_Y:x,y x,y x,y …: inside this polygon; the report's lasso writes it.",
        show_default=False,
    ),
]
NoJunk = Annotated[bool, typer.Option("--no-junk", help="Leave out particles flagged as junk.")]
Invert = Annotated[bool, typer.Option("--invert", help="Keep what the rest leaves out.")]


def selection(
    cluster: Sequence[str] | None,
    range_: Sequence[str] | None,
    where: Sequence[str] | None,
    outline: Sequence[str] | None,
    ids: Sequence[Path] | None,
    no_junk: bool,
    invert: bool,
) -> Selection:
    """The options' values as a `Selection`."""
    from cryodrgn_pipeline.landscape.select import Selection

    return Selection(
        clusters=tuple(label for text in cluster or () for label in integers("--cluster", text)),
        ranges=tuple(range_ or ()),
        conditions=tuple(where or ()),
        outlines=tuple(outline or ()),
        id_files=tuple(ids or ()),
        no_junk=no_junk,
        invert=invert,
    )


def integers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas, or a `ConfigError` that names the option."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"{option} {text!r}: whole numbers separated by commas expected, such as 0,3"
        ) from error
