"""Builds the sdist, from it a wheel with the extension and one without a compiler, and tries each in a fresh environment.

    .venv/bin/python .ci/wheels.py [--out dist] [--pure-only] [--types]

Builds run without isolation, on the torch of the environment that runs this; the fresh ones borrow that torch by its path, so nothing
is fetched. About 4 CPU minutes, nearly all of them the C++ build (TELEPORT_FAST_REQUIRE_EXT is set for it). --types also checks
tests/fixtures/typed_script.py by mypy --strict against each installed wheel, 2 CPU minutes more.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / ".ci" / "smoke.py"
TYPED = ROOT / "tests" / "fixtures" / "typed_script.py"
# What an sdist must hold to be built from: folder and the endings of its files.
SOURCES = {"csrc": (".cpp", ".h", ".cu"), "kernels": (".py",), "teleport_fast": (".py", ".pyi", ".json", ".html", "py.typed")}
FILES = ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
NO_COMPILER = "no-compiler-here"


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> None:
    """Runs it with its output held back; raises with it where the command fails."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"wheels: {' '.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


def build(source: Path, out: Path, *what: str, **environment: str) -> None:
    """`python -m build` without isolation, of what is named: --sdist, --wheel."""
    run(sys.executable, "-P", "-m", "build", "--no-isolation", *what, "--outdir", out, source, cwd=source, **environment)


def make_sdist(source: Path, out: Path) -> Path:
    build(source, out, "--sdist")
    return newest(out, "*.tar.gz")


def make_wheel(sdist: Path, out: Path, pure: bool) -> Path:
    """From the sdist alone, unpacked where nothing else lies."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (unpacked,) = Path(folder).iterdir()
        compiler = {"CXX": NO_COMPILER, "TELEPORT_FAST_REQUIRE_EXT": ""} if pure else {"TELEPORT_FAST_REQUIRE_EXT": "1"}
        build(unpacked, out, "--wheel", **compiler)
    return newest(out, "*-none-any.whl" if pure else "*-linux_*.whl")


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)


def sources(root: Path) -> set[str]:
    """The files on disk that an sdist must hold, by their place in it; links are followed."""
    found = set(FILES)
    for folder, endings in SOURCES.items():
        for where, _, names in os.walk(root / folder, followlinks=True):
            found |= {(Path(where) / name).relative_to(root).as_posix() for name in names if name.endswith(endings)}
    return found


def contents(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def sdist_lacks(sdist: Path, root: Path) -> set[str]:
    return sources(root) - contents(sdist)


def wheel_faults(wheel: Path, sdist: Path, pure: bool) -> list[str]:
    """What the wheel lacks of the sdist's package, and what it holds beside it."""
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {name for name in contents(sdist) if name.startswith("teleport_fast/") and name.endswith(SOURCES["teleport_fast"])}
    libraries = {name for name in held if name.endswith(".so")}
    strange = {n for n in held if not n.startswith(("teleport_fast/", "teleport_fast-"))}
    faults = [f"lacks {name}" for name in sorted(wanted - held)] + [f"holds {name}" for name in sorted(strange)]
    if pure and libraries:
        faults.append(f"holds {sorted(libraries)} in a pure wheel")
    if not pure and "teleport_fast/_ops.so" not in libraries:
        faults.append("lacks teleport_fast/_ops.so")
    return faults


def fresh_environment(folder: Path) -> Path:
    """A new environment that sees this one's packages last, without its .pth files, so without an editable install."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(wheel: Path, python: Path) -> None:
    run(sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet", "--no-deps",
        "--no-index", "--ignore-installed", wheel)  # fmt: skip


def smoke(python: Path, *arguments: str) -> None:
    with tempfile.TemporaryDirectory() as nowhere:
        run(python, "-P", SMOKE, "--inside", python.parent.parent, *arguments, cwd=Path(nowhere))


def check_types(python: Path, folder: Path) -> None:
    copy = folder / TYPED.name
    shutil.copy(TYPED, copy)
    run(sys.executable, "-P", "-m", "mypy", "--strict", "--config-file", "", "--python-executable", python, "--cache-dir", folder / "cache",
        "--untyped-calls-exclude", "torch", copy, cwd=folder)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--pure-only", action="store_true", help="without the wheel that needs a compiler")
    parser.add_argument("--types", action="store_true")
    options = parser.parse_args()
    out = options.out.resolve()
    sdist = make_sdist(ROOT, out)
    if lacks := sdist_lacks(sdist, ROOT):
        print(f"wheels: {sdist.name} lacks {', '.join(sorted(lacks))}; see MANIFEST.in", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        for pure in (True,) if options.pure_only else (True, False):
            wheel = make_wheel(sdist, out, pure)
            if faults := wheel_faults(wheel, sdist, pure):
                print(f"wheels: {wheel.name} " + "; ".join(faults), file=sys.stderr)
                return 1
            python = fresh_environment(Path(folder) / ("pure" if pure else "native"))
            install(wheel, python)
            smoke(python, *(() if pure else ("--require", "cpp")))
            if options.types:
                check_types(python, Path(folder))
            print(f"ok {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
