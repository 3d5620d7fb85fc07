"""The documentation holds together: links, the site's map, paths that pages name, and what a repository's host reads.

`make docs` builds the site and fails on any warning; here is what can be seen without mkdocs.
"""

from __future__ import annotations

import doctest
import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES = sorted(DOCS.rglob("*.md"))
NAMED = re.compile(r"`((?:teleport_fast|tests|csrc|kernels|bench|docs|requirements|\.ci|\.github)/[\w./-]+)`")


def loaded(name: str) -> ModuleType:
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    return loaded("hooks")


def yaml_of(path: Path) -> Any:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML, which transformers brings: pip install pyyaml")
    return yaml.safe_load(path.read_text())


def broken(hooks: ModuleType, path: Path) -> list[str]:
    found: list[str] = hooks.relinked(path.read_text(), path, path, hooks.shown_as())[1]
    return found


def missing(page: str) -> list[str]:
    """Paths in backticks that are not in the repository; a name in capitals stands for one to be chosen."""
    chosen = re.compile(r"(?:\b|_)(?:NAME|OP)\b")
    return [path for path in NAMED.findall(page) if not chosen.search(path) and not (ROOT / path).exists()]


def listed(entries: Any) -> list[str]:
    """The pages that a navigation names."""
    if isinstance(entries, str):
        return [entries]
    if isinstance(entries, dict):
        return [page for value in entries.values() for page in listed(value)]
    return [page for entry in entries for page in listed(entry)]


@pytest.mark.parametrize("path", [*TEXTS, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_and_every_named_path_is_there(hooks: ModuleType, path: Path) -> None:
    assert broken(hooks, path) == []
    assert path.name == "CHANGELOG.md" or missing(path.read_text()) == []


def test_a_wrong_link_and_a_wrong_path_are_seen(hooks: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("[a](page.md#x) [b](nowhere.md) ![c](no.png)\n```sh\n[d](not-a-link)\n```\n[e](https://example.org)")
    assert broken(hooks, tmp_path / "page.md") == ["nowhere.md", "no.png"]
    assert missing("`teleport_fast/no_such_file.py` `tests/ops/test_NAME.py` `tests/conftest.py`") == ["teleport_fast/no_such_file.py"]


def test_links_of_included_files_lead_to_the_pages_that_show_them(hooks: ModuleType) -> None:
    pages = hooks.shown_as()
    assert set(pages) == {ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"}
    text = "[k](docs/kernels.md#bars) [c](CONTRIBUTING.md) [e](docs/evidence) [l](LICENSE) ![p](docs/evidence/demo.png)"
    shown, wrong = hooks.relinked(text, ROOT / "README.md", DOCS / "index.md", pages)
    assert wrong == []
    assert shown == "[k](kernels.md#bars) [c](contributing.md) [e](evidence/README.md) l ![p](evidence/demo.png)"
    assert hooks.relinked("[x](kernels.md)", DOCS / "a.md", DOCS / "adr" / "a.md", {})[0] == "[x](../kernels.md)"


def test_every_page_has_its_place_in_the_sites_map_once() -> None:
    site = yaml_of(ROOT / "mkdocs.yml")
    pages = listed(site["nav"])
    assert len(pages) == len(set(pages))
    aside = tuple(site["not_in_nav"].split())
    expected = {str(page.relative_to(DOCS)) for page in PAGES}
    assert {page for page in expected if not f"/{page}".startswith(aside)} == set(pages)


def test_a_warning_fails_the_build_and_ci_runs_it() -> None:
    (build,) = re.findall(r"-m mkdocs build (.*)", (ROOT / "Makefile").read_text())
    # with --quiet, --strict lets every warning pass
    assert build == "--strict"
    assert re.search(r"^make .*\bdocs\b", (ROOT / ".ci" / "run").read_text(), re.M)


def test_what_the_site_is_built_with_is_pinned_and_as_in_development() -> None:
    pins = [
        dict(line.split("==") for line in (ROOT / "requirements" / name).read_text().splitlines() if re.match(r"[\w.-]+==[\w.]+$", line))
        for name in ("docs.txt", "dev.txt")
    ]
    assert {"mkdocs", "mkdocs-material", "mkdocstrings-python"} <= set(pins[0])
    assert all(pins[1][name] == version for name, version in pins[0].items() if name in pins[1])


def test_objects_of_the_api_pages_exist() -> None:
    """By name in the sources, so that a renamed function fails here and not only in `make docs`."""
    found = 0
    for page in (DOCS / "api").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M):
            path, _, last = name.rpartition(".")
            module, owner = ROOT / (name.replace(".", "/") + ".py"), ROOT / (path.replace(".", "/") + ".py")
            assert module.is_file() or re.search(rf"^(def|class) {last}\b", owner.read_text(), re.M), f"{page.name}: {name}"
            found += 1
    assert found > 30


def test_docstrings_become_paragraphs_and_blocks_of_code() -> None:
    pytest.importorskip("griffe", reason="needs what the site is built with: make docs")
    result = doctest.testmod(loaded("doctests"))
    assert result.attempted >= 2 and result.failed == 0


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_issue_forms_have_what_a_host_asks_for(path: Path) -> None:
    form = yaml_of(path)
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert set(form) == {"name", "description", "labels", "body"}
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids)) >= 2
    for field in form["body"]:
        assert field["type"] == "textarea" and field["attributes"]["label"] and isinstance(field["validations"]["required"], bool)


def test_pre_commit_runs_what_is_here() -> None:
    (repository,) = yaml_of(ROOT / ".pre-commit-config.yaml")["repos"]
    # a hook from elsewhere would be fetched at the first commit
    assert repository["repo"] == "local"
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert set(hooks) == {"ruff", "mypy", "docs", "tests"}
    for hook in hooks.values():
        assert hook["language"] == "system" and hook["entry"].startswith(".venv/bin/")
        re.compile(hook.get("files", ""))
        words = hook["entry"].split()
        assert shutil.which(words[0].rsplit("/")[-1]) or (ROOT / words[0]).exists() or not (ROOT / ".venv").exists()
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))


def test_the_configuration_is_one_that_pre_commit_accepts() -> None:
    clientlib = pytest.importorskip("pre_commit.clientlib", reason="needs pre-commit: pip install pre-commit")
    clientlib.load_config(str(ROOT / ".pre-commit-config.yaml"))


def test_the_citation_names_the_software_and_both_papers() -> None:
    citation = yaml_of(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(citation)
    assert [entry["identifiers"][0]["value"] for entry in citation["references"]] == ["arXiv:2205.10637", "arXiv:2305.13404"]


def test_the_readmes_first_screen_has_what_decides() -> None:
    readme = (ROOT / "README.md").read_text()
    first = readme[: readme.index("## What it does")]
    for part in ("```diff\n- ", "\n+ ", "![", "Measured by `python -m teleport_fast train", "make demo", "make test"):
        assert part in first
    assert len(readme.splitlines()) < 150
    for link in ("docs/support.md", "docs/limitations.md", "CITATION.cff"):
        assert f"]({link})" in readme
