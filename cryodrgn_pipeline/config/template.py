"""The commented config.yaml that `init` writes, generated from the models so that it cannot drift."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cryodrgn_pipeline.config.models import Config, Dataset, Run, Subset
from cryodrgn_pipeline.config.schema import json_schema

HEADER = """\
# Configuration of cryodrgn-pipeline: every key with its meaning. What is left out takes its default.
# Run it:  cryodrgn-pipeline run --configfile THIS_FILE --cores 8      (add -n to see what would be done)
# Relative paths start at the folder you run in. Numbers carry their unit in the key: _px, _a (Å), _mb, _min.
"""

EXAMPLE = """\
#   mine:                              # any name
#     particles: path/to/run_data.star # or a cryoSPARC .cs file
#     # cryosparc: {project: P3, job: J42}      # instead of particles: from a running cryoSPARC
#     # push: {workspace: W1}                   # ... and the results back into it
"""

PLAIN_SECTIONS = ("cryosparc", "push", "conventions")  # of a dataset, with keys of their own

MORE = """
# Other particle subsets and other settings for single runs, below a dataset:
#     subsets:
#       good:
#         ids: good_ids.txt            # one particle id per line
#       open:
#         from_run: vae                # chosen from what run vae found on all particles
#         clusters: [0, 3]
#     runs:
#       vae: {}                        # all particles, the settings below
#       fine:
#         subsets: [good, open]        # one training each
#         box_size_px: 256
#         train: {epochs: 50, decoder_width: 1024, encoder_width: 1024}
"""


def config_text(datasets: dict[str, dict[str, Any]] | None = None, sections: Config | None = None) -> str:
    """Return a commented config.yaml.

    Parameters
    ----------
    datasets
        For each dataset's name, the keys to write with their values; without any, a commented example.
    sections
        Settings to write instead of the defaults.
    """
    parts = [HEADER, "# " + _first_line(Dataset)]
    if datasets:
        parts.append("datasets:")
        for name, given in datasets.items():
            parts.append(f"  {_flow(name)}:")
            parts += [_indented(_dataset_lines(given), 4)]
    else:
        parts += ["datasets: {}", EXAMPLE.rstrip()]
    parts += [MORE]
    for name in Config.model_fields:
        if name != "datasets":
            parts += _section_lines(name, getattr(sections or Config(), name))
    return "\n".join(parts).rstrip() + "\n"


def _dataset_lines(given: dict[str, Any]) -> str:
    """Write the given keys of a dataset, and the others it knows as comments."""
    lines = []
    for name, field in Dataset.model_fields.items():
        key = field.alias or name
        if key in given:
            lines.append(_commented(f"{key}: {_flow(given[key])}", field.description or ""))
        elif isinstance(field.default, BaseModel) and key in PLAIN_SECTIONS:
            inner = ", ".join(f"{k}: {_flow(v)}" for k, v in field.default.model_dump().items())
            lines.append(f"# {key}: {{{inner}}}")
        elif not isinstance(field.default, BaseModel) and key not in ("subsets", "runs"):
            lines.append(_commented(f"# {key}: {_flow(field.default)}", field.description or ""))
    return "\n".join(lines)


def _section_lines(name: str, section: BaseModel) -> list[str]:
    lines = [f"# {_first_line(type(section))}", f"{name}:"]
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        shown = field.alias or key
        if isinstance(value, BaseModel):
            inner = ", ".join(f"{k}: {_flow(v)}" for k, v in value.model_dump().items())
            lines.append(f"  {shown}: {{{inner}}}")
        else:
            lines.append(_commented(f"  {shown}: {_flow(value)}", field.description or ""))
    return [*lines, ""]


def _commented(line: str, comment: str) -> str:
    return f"{line:<38} # {comment}" if comment else line


def _flow(value: Any) -> str:
    """Write one value in YAML's flow style, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


def _indented(text: str, spaces: int) -> str:
    return textwrap.indent(text, " " * spaces)


def config_table() -> str:
    """Return all keys as Markdown tables, for the documentation."""
    parts = []
    sections: list[tuple[str, type[BaseModel]]] = [
        ("datasets.NAME", Dataset),
        *((f"datasets.NAME.{name}", type(Dataset.model_fields[name].default)) for name in PLAIN_SECTIONS),
        ("datasets.NAME.subsets.NAME", Subset),
        ("datasets.NAME.runs.NAME", Run),
    ]
    sections += [(name, type(f.default)) for name, f in Config.model_fields.items() if name != "datasets"]
    for title, model in sections:
        parts += [
            f"### `{title}`",
            "",
            _first_line(model),
            "",
            "| key | default | meaning |",
            "|---|---|---|",
        ]
        parts += [_row(name, field) for name, field in model.model_fields.items()]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _row(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{_flow(_plain(field.default))}`"
    if isinstance(field.default, BaseModel) and (field.description or "").startswith("what differs"):
        default = "`{}`"
    meaning = (field.description or "").replace("|", r"\|")
    return f"| `{field.alias or name}` | {default} | {meaning} |"


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(by_alias=True)
    if isinstance(value, dict):
        return {key: {} if isinstance(inner, BaseModel) else inner for key, inner in value.items()}
    return value


def write_generated_files(checkout: Path) -> list[Path]:
    """Write the schema, the template and the table of keys into a checkout; returns the paths changed."""
    contents = {
        checkout / "workflows" / "schemas" / "config.schema.yaml": schema_text(),
        checkout / "config.yaml": config_text(),
        checkout / "docs" / "configuration.md": "# Configuration\n\n<!-- generated: `make config` -->\n\n"
        + config_table(),
    }
    changed = []
    for path, text in contents.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


def schema_text() -> str:
    """Return the JSON schema as YAML."""
    head = "# Generated from cryodrgn_pipeline/config/models.py by `make config`; do not edit.\n"
    return head + yaml.safe_dump(json_schema(), sort_keys=False, allow_unicode=True, width=110)
