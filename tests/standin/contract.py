"""The wire contract of cryoSPARC 5, read from the *installed* cryosparc-tools: nothing is typed by hand.

Functions and their parameters come from the package's `api.pyi`, request and response types from its
`cryosparc.models`. The URL paths are this file's own: the client reads them from the OpenAPI document.
"""

from __future__ import annotations

import ast
import datetime
import functools
import importlib
import importlib.resources
import inspect
import json
import typing
from dataclasses import dataclass, field
from typing import Any

import cryosparc.tools  # noqa: F401  (registers every model)
from cryosparc import registry
from cryosparc.dataset import Dataset
from cryosparc.stream import Stream, Streamable
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

MISSING = object()
READS = ("find", "get", "ls", "load_", "download", "health", "read_root", "me")
SCHEMAS = "#/components/schemas/{model}"


@dataclass
class Parameter:
    name: str
    type: Any
    default: Any = MISSING


@dataclass
class Function:
    """One function of the published interface, such as `jobs.create`."""

    name: str
    path_parameters: list[Parameter] = field(default_factory=list)
    body: Parameter | None = None
    query: list[Parameter] = field(default_factory=list)
    returns: Any = None

    @property
    def method(self) -> str:
        reads = self.name.split(".")[-1].startswith(READS)
        return "get" if reads and self.body is None and self.name != "login" else "post"

    @property
    def path(self) -> str:
        return "/" + self.name.replace(".", "/") + "".join(f"/{{{p.name}}}" for p in self.path_parameters)


@functools.cache
def published_functions() -> dict[str, Function]:
    """Every function of the installed package's `api.pyi`, by its name."""
    tree = ast.parse((importlib.resources.files("cryosparc") / "api.pyi").read_text())
    names = _names(tree)

    def evaluated(node: ast.expr) -> Any:
        return eval(compile(ast.Expression(node), "api.pyi", "eval"), names)

    functions = {}
    for api in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        if not api.name.endswith("API") and api.name != "APIClient":
            continue
        prefix = "" if api.name == "APIClient" else api.name[:-3].lower() + "."
        for node in api.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                functions[prefix + node.name] = _function(prefix + node.name, node, evaluated)
    return functions


def _function(name: str, node: ast.FunctionDef, evaluated: Any) -> Function:
    given = node.args
    positional = given.posonlyargs + given.args
    defaults = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    found = Function(name, returns=None if node.returns is None else evaluated(node.returns))

    def parameter(argument: ast.arg, default: ast.expr | None) -> Parameter:
        value = MISSING if default is None else ast.literal_eval(default)
        return Parameter(argument.arg, evaluated(argument.annotation), value)

    for place, (argument, default) in enumerate(zip(positional, defaults, strict=True)):
        if place == 0:
            continue  # self
        if place < len(given.posonlyargs):
            found.path_parameters.append(parameter(argument, default))
        else:
            found.body = parameter(argument, default)
    for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        found.query.append(parameter(argument, default))
    return found


def _names(tree: ast.Module) -> dict[str, Any]:
    names = dict(vars(typing)) | {"datetime": datetime, "Dataset": Dataset, "Stream": Stream}
    for registered in (
        registry.REGISTERED_LITERALS,
        registry.REGISTERED_ENUMS,
        registry.REGISTERED_TYPED_DICTS,
        registry.REGISTERED_MODEL_CLASSES,
    ):
        names.update(registered)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and (node.module or "").startswith("models"):
            module = importlib.import_module(f"cryosparc.{node.module}")
            names.update({alias.name: getattr(module, alias.name) for alias in node.names})
    return names


def is_stream(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, Streamable)


@functools.cache
def openapi(version: str) -> bytes:
    """The OpenAPI document from which the client builds its functions, as JSON."""
    models = registry.REGISTERED_MODEL_CLASSES.values()
    ours = [(model, "validation") for model in models if model.__module__.startswith("cryosparc.")]
    definitions = models_json_schema(ours, ref_template=SCHEMAS)[1].setdefault("$defs", {})
    described: dict[str, dict[str, Any]] = {}

    def schema(kind: Any) -> dict[str, Any]:
        key = repr(kind)
        if key not in described:
            described[key] = _schema(kind, definitions)
        return described[key]

    def content(kind: Any, title: str = "") -> dict[str, Any]:
        if is_stream(kind):
            binary = {"title": title or kind.__name__, "type": "string", "format": "binary"}
            return {kind.media_type: {"schema": binary}}
        described = schema(kind)
        titled = described if "$ref" in described or not title else {**described, "title": title}
        return {"application/json": {"schema": titled}}

    paths: dict[str, Any] = {}
    for function in published_functions().values():
        answer = {"description": "ok"}
        if function.returns is not None:
            answer["content"] = content(function.returns)
        entry: dict[str, Any] = {
            "summary": function.name,
            "parameters": [_described(p, "path", schema) for p in function.path_parameters],
            "responses": {"200": answer, "422": {"content": {"application/json": {"schema": {}}}}},
        }
        if function.name == "login":
            form = {"application/x-www-form-urlencoded": {"schema": {"type": "object"}}}
            entry["requestBody"] = {"required": True, "content": form}
        else:
            entry["parameters"] += [_described(p, "query", schema) for p in function.query]
        if function.body is not None:
            body = content(function.body.type, function.body.name)
            entry["requestBody"] = {"required": function.body.default is MISSING, "content": body}
        paths.setdefault(function.path, {})[function.method] = entry
    info = {"title": "cryoSPARC stand-in", "version": version}
    document = {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": definitions}}
    return json.dumps(document).encode()


def _described(parameter: Parameter, place: str, schema: Any) -> dict[str, Any]:
    required = place == "path" or parameter.default is MISSING
    return {"name": parameter.name, "in": place, "required": required, "schema": schema(parameter.type)}


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if kind in (Any, None, type(None)):
        return {}
    found = TypeAdapter(kind).json_schema(ref_template=SCHEMAS)
    definitions.update(found.pop("$defs", {}))
    if inspect.isclass(kind) and issubclass(kind, BaseModel):
        definitions.setdefault(kind.__name__, found)
        return {"$ref": SCHEMAS.format(model=kind.__name__)}
    return found
