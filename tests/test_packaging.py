"""The wheel: kernels and calibration texts inside, and nothing but `atomq` on top."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import atomq

ROOT = Path(__file__).resolve().parent.parent
DATA_FOLDERS = ("kernels_cuda", "calibration_data")

wheel_builder = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")


def build(root: Path, target: Path) -> zipfile.ZipFile:
    (path,) = wheel_builder.WheelBuilder(str(root)).build(directory=str(target), versions=["standard"])
    return zipfile.ZipFile(path)


def data_files(root: Path) -> set[str]:
    return {
        path.relative_to(root).as_posix()
        for folder in DATA_FOLDERS
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds what an installation would put into site-packages."""
    folder = tmp_path_factory.mktemp("site-packages")
    wheel.extractall(folder)
    return folder


def run_installed(installed: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *argv], cwd=installed, env=environment, capture_output=True, text=True, timeout=60
    )


def test_every_kernel_and_every_text_is_inside(wheel):
    files = data_files(ROOT)
    assert len(files) > 10
    assert {f"atomq/{name}" for name in files} <= set(wheel.namelist())
    for name in files:
        assert wheel.read(f"atomq/{name}") == (ROOT / name).read_bytes(), name


def test_every_module_is_inside(wheel):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "atomq").rglob("*.py")}
    assert modules <= set(wheel.namelist())
    assert "atomq/report/page.css" in wheel.namelist()


def test_the_only_name_on_top_is_atomq(wheel):
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert tops == {"atomq", f"atomq-{atomq.__version__}.dist-info"}
    assert not [name for name in wheel.namelist() if name.endswith((".pyc", ".so", ".cubin"))]


def test_the_wheel_is_pure_and_states_what_it_needs(wheel):
    info = f"atomq-{atomq.__version__}.dist-info"
    assert "Root-Is-Purelib: true" in wheel.read(f"{info}/WHEEL").decode()
    assert "Tag: py3-none-any" in wheel.read(f"{info}/WHEEL").decode()
    assert "atomq = atomq.__main__:main" in wheel.read(f"{info}/entry_points.txt").decode()
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "Requires-Python: <3.14,>=3.11" in metadata
    for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        assert f"Requires-Dist: {re.match('[a-z]+', name)[0]}" in metadata


def test_an_installation_finds_its_own_data_and_runs(installed):
    script = f"from atomq.resources import folder; print(*map(folder, {DATA_FOLDERS}))"
    result = run_installed(installed, "-c", script)
    assert result.stdout.split() == [str(installed / "atomq" / name) for name in DATA_FOLDERS], result.stderr
    result = run_installed(installed, "-m", "atomq", "--version")
    assert result.stdout == f"atomq {atomq.__version__}\n", result.stderr


def test_a_wheel_without_the_data_would_be_noticed(tmp_path):
    """The builder itself is happy when a folder is missing."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "atomq", source / "atomq", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "calibration_data", source / "calibration_data")
    names = set(build(source, tmp_path).namelist())
    assert "atomq/cli.py" in names
    missing = {name for name in data_files(ROOT) if f"atomq/{name}" not in names}
    assert missing
    assert {name.partition("/")[0] for name in missing} == {"kernels_cuda"}
