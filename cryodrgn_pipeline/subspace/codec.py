"""Results of the subspace as tensors and JSON, for a file without pickled objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cryodrgn_pipeline.subspace.images import LevelImages
from cryodrgn_pipeline.subspace.solve import Lattice

if TYPE_CHECKING:
    from cryodrgn_pipeline.stack import Stack

TAG = "$"


@dataclass(frozen=True, slots=True)
class Encoded:
    """A value as a `tree` of JSON, and the `tensors` that it names."""

    tree: Any
    tensors: dict[str, Tensor]


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same dataclasses, dicts, lists and tuples with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {each.name: mapped(getattr(value, each.name), change) for each in fields(value)}
        return type(value)(**parts)
    if isinstance(value, dict):
        return {key: mapped(part, change) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(part, change) for part in value)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in it, in the order of `mapped`."""
    found: list[Tensor] = []

    def note(one: Tensor) -> Tensor:
        found.append(one)
        return one

    mapped(value, note)
    return found


def encoded(value: Any) -> Encoded:
    """What `decoded` makes the value from: tensors by reference, all else copied."""
    names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}

    def tree_of(part: Any) -> Any:
        if isinstance(part, Tensor):
            name = names.setdefault(id(part), f"tensor_{len(names)}")
            tensors[name] = part
            return {TAG: "tensor", "name": name}
        if isinstance(part, LevelImages):
            rows = torch.from_numpy(part.rows)
            kept.append(rows)
            about = {"rows": tree_of(rows), "poses": tree_of(part.poses)}
            return {TAG: "images", "level_px": part.level_px, "white": part.white, **about}
        if isinstance(part, Lattice):
            return {TAG: "lattice", "box_size_px": part.box_size_px, "mask": tree_of(part.mask)}
        if is_dataclass(part) and not isinstance(part, type):
            items = {each.name: tree_of(getattr(part, each.name)) for each in fields(part)}
            return {TAG: type(part).__name__, "items": items}
        if isinstance(part, dict):
            return {TAG: "dict", "items": [[key, tree_of(one)] for key, one in part.items()]}
        if isinstance(part, (list, tuple)):
            return {TAG: type(part).__name__, "items": [tree_of(one) for one in part]}
        if part is None or isinstance(part, (bool, int, float, str)):
            return part
        raise ValueError(f"a journal cannot keep {type(part).__name__}")

    kept: list[Any] = []  # so that no two tensors have the same id
    return Encoded(tree_of(value), tensors)


def decoded(content: Encoded, kinds: Mapping[str, type[Any]], stack: Stack, device: str) -> Any:
    """The value again.

    Parameters
    ----------
    kinds
        The dataclasses that may be made, by name.
    stack, device
        What images of a level are images of, and where they and lattices lie. Tensors are on the CPU.
    """

    def value_of(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        tag = tree[TAG]
        if tag == "tensor":
            return content.tensors[tree["name"]]
        if tag == "images":
            rows = value_of(tree["rows"]).numpy()
            images = LevelImages(stack, rows, tree["level_px"], white=tree["white"], device=device)
            return images.posed(value_of(tree["poses"]))
        if tag == "lattice":
            lattice = Lattice(tree["box_size_px"], device=device)
            lattice.mask = value_of(tree["mask"])
            return lattice
        items = tree["items"]
        if tag == "dict":
            return {key: value_of(part) for key, part in items}
        if tag in ("list", "tuple"):
            return (list if tag == "list" else tuple)(value_of(part) for part in items)
        return kinds[tag](**{key: value_of(part) for key, part in items.items()})

    return value_of(content.tree)
