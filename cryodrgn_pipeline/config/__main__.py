"""For developers: `python -m cryodrgn_pipeline.config` renews the files generated from the models."""

from __future__ import annotations

from pathlib import Path

from cryodrgn_pipeline.config.template import write_generated_files

if __name__ == "__main__":
    for path in write_generated_files(Path(__file__).resolve().parents[2]):
        print(f"wrote {path}")
