"""What is shipped: one wheel that holds the workflow, importable in an instant, installable anywhere."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import cryodrgn_pipeline

CHECKOUT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY_MODULES = [
    "torch",
    "pandas",
    "scipy",
    "sklearn",
    "pyarrow",
    "matplotlib",
    "plotly",
    "snakemake",
    "numba",
]
FOREIGN_FOLDER = re.compile(r"(?<![\w.])/(work|home|Users)/")


def normalised(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name[0]).lower()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=CHECKOUT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_workflow_and_nothing_that_only_a_checkout_needs(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for part in ("workflows", "rules"):
        for file in (CHECKOUT / part).rglob("*"):
            if file.is_file():
                assert f"cryodrgn_pipeline/_bundle/{file.relative_to(CHECKOUT).as_posix()}" in names
    assert "cryodrgn_pipeline/_bundle/config.yaml" in names
    strangers = {name.split("/")[0] for name in names} - {"cryodrgn_pipeline"}
    assert all(name.endswith(".dist-info") for name in strangers)
    assert not [name for name in names if name.endswith((".pyc", ".nbc", ".nbi"))]


def test_every_requirement_is_pinned_and_no_pin_names_a_place() -> None:
    lines = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    project = PYPROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    required = [requirement for group in groups for requirement in group]
    missing = {normalised(name) for name in required} - {normalised(pin) for pin in pins}
    assert not missing


def test_every_command_is_a_function_of_the_package() -> None:
    scripts = PYPROJECT["project"]["scripts"]
    assert set(scripts) == {"cryodrgn-pipeline", "cryodrgn-pipeline-relion"}
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_conda_environment_installs_this_version() -> None:
    environment = (CHECKOUT / "workflows" / "envs" / "cryodrgn-pipeline.yaml").read_text(encoding="utf-8")
    assert f"- cryodrgn-pipeline =={cryodrgn_pipeline.__version__}\n" in environment


@pytest.mark.parametrize(
    "statement",
    [
        "import cryodrgn_pipeline",
        "import cryodrgn_pipeline.cli",
        "import cryodrgn_pipeline.interop.relion_external",
    ],
)
def test_importing_loads_no_science_library(statement: str) -> None:
    script = f"import sys; {statement}; print([name for name in {HEAVY_MODULES!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_of_the_product_names_a_machine_it_was_made_on() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        path = CHECKOUT / name
        if path.suffix in (".py", ".smk", ".yaml", ".md", ".txt", ".toml", "") and path.is_file():
            found = FOREIGN_FOLDER.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{name}: {found}"


@pytest.mark.heavy
def test_the_wheel_runs_the_workflow_from_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "-c", CHECKOUT / "constraints.txt", wheel]
    subprocess.run(install, check=True, cwd=tmp_path)
    demo = [tmp_path / "venv" / "bin" / "cryodrgn-pipeline", "demo", "--small", "-o", tmp_path / "demo"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    kept = {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "LD_"))}
    done = subprocess.run(
        demo, cwd=tmp_path, env=kept | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo" / "results" / "demo" / "all" / "vae" / "report.html").is_file()
