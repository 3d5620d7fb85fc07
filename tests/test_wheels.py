"""An sdist and a pure wheel are built from the tree and tried in a fresh environment; .ci/wheels.py does it with the extension, too."""

from __future__ import annotations

import importlib.util
import re
import shutil
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
needs_build = pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="needs the package build: pip install build")


@pytest.fixture(scope="module")
def wheels() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheels", ROOT / ".ci" / "wheels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(wheels: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, pure wheel) of a copy of the tree, since a build leaves files where it runs."""
    tree, out = tmp_path_factory.mktemp("tree") / "teleport_fast", tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for folder in ("csrc", "kernels", "teleport_fast"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignore)
    for name in wheels.FILES:
        shutil.copy(ROOT / name, tree / name)
    sdist = wheels.make_sdist(tree, out)
    return sdist, wheels.make_wheel(sdist, out, pure=True)


@needs_build
def test_the_sdist_holds_every_source_and_no_library(wheels: ModuleType, built: tuple[Path, Path]) -> None:
    sdist, _ = built
    assert wheels.sdist_lacks(sdist, ROOT) == set()
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    assert {"csrc/cpu/gram_difference.cpp", "csrc/cuda/table.cu", "kernels/gram.py", "teleport_fast/py.typed"} <= wheels.sources(ROOT)


@needs_build
def test_the_pure_wheel_holds_the_package_and_nothing_else(wheels: ModuleType, built: tuple[Path, Path], tmp_path: Path) -> None:
    sdist, wheel = built
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheels.wheel_faults(wheel, sdist, pure=True) == []
    # a wheel that lacks a file, or holds one that is not the package's, is caught
    wrong = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(wrong, "w") as target:
        for name in source.namelist():
            if name != "teleport_fast/py.typed":
                target.writestr(name, source.read(name))
        target.writestr("tests/test_wheels.py", "")
        target.writestr("teleport_fast/_ops.so", "")
    faults = wheels.wheel_faults(wrong, sdist, pure=True)
    assert len(faults) == 3 and faults[:2] == ["lacks teleport_fast/py.typed", "holds tests/test_wheels.py"]


@needs_build
def test_the_wheel_installs_in_a_fresh_environment_and_works(
    wheels: ModuleType, built: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    python = wheels.fresh_environment(tmp_path / "environment")
    wheels.install(built[1], python)
    # everything is tried before the last line, which says that what the wheel does not hold is missed
    with pytest.raises(SystemExit, match=r"(?s)backends: reference.*required backend cpp is missing"):
        wheels.smoke(python, "--require", "cpp")


def test_wheels_are_configured_for_the_pythons_that_the_package_names() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    least = re.search(r'dependencies = \["torch>=([\d.]+)"\]', text)
    assert least is not None
    for settings in (text.partition("[tool.cibuildwheel]")[2].partition("[tool.ruff]")[0], (ROOT / ".ci/cuda-wheels.toml").read_text()):
        assert re.findall(r'"cp(3)(\d+)-\*"', settings) == [tuple(version.split(".")) for version in pythons]
        assert f"pip install torch=={least[1]}.0 " in settings, "built against the least torch"
        assert "TELEPORT_FAST_REQUIRE_EXT" in settings and "--require cpp" in settings
        assert all(f"--exclude '{name}*'" in settings for name in ("libtorch", "libc10"))
