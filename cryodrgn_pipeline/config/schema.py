"""The JSON schema that Snakemake reads: it holds every default, also for a `module:` import."""

from __future__ import annotations

from typing import Any

from cryodrgn_pipeline.config.models import OVERRIDES, Config


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of config.yaml, without references, defaults filled in section by section."""
    raw = Config.model_json_schema(by_alias=True)
    definitions = raw.pop("$defs")
    schema: dict[str, Any] = _inlined(raw, definitions, keep_defaults=True)
    schema["title"] = "cryodrgn-pipeline configuration"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _inlined(node: Any, definitions: dict[str, Any], *, keep_defaults: bool) -> Any:
    if isinstance(node, list):
        return [_inlined(item, definitions, keep_defaults=keep_defaults) for item in node]
    if not isinstance(node, dict):
        return node
    node = dict(node)
    if "$ref" in node:
        node = {**definitions[node.pop("$ref").rsplit("/", 1)[-1]], **node}
    keep_here = keep_defaults and not node.pop(OVERRIDES, False)
    default = node.pop("default", None) if "default" in node else ...
    out: dict[str, Any] = {}
    for key, value in node.items():
        if key == "title":
            continue
        if key in ("properties", "patternProperties"):  # their keys are names, not schema words
            out[key] = {
                name: _inlined(inner, definitions, keep_defaults=keep_here) for name, inner in value.items()
            }
        else:
            out[key] = _inlined(value, definitions, keep_defaults=keep_here)
    if "patternProperties" in out:
        out["additionalProperties"] = False
    if default is not ... and keep_defaults:
        out["default"] = _section_default(out, default)
    return out


def _section_default(node: dict[str, Any], default: Any) -> Any:
    """Leave a section empty where its own keys carry the defaults, so that a key is said in one place."""
    if not isinstance(default, dict):
        return default
    if "properties" in node:
        for name, value in default.items():
            if name in node["properties"] and "default" in node["properties"][name]:
                inner = node["properties"][name]
                inner["default"] = _section_default(inner, value)
        return {}
    return {name: {} if isinstance(value, dict) else value for name, value in default.items()}
