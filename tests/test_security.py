"""No data that the package reads can run code or name a file elsewhere; no source of ours has the means to."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from teleport_fast.inspection.source import _weights, load
from teleport_fast.inspection.weights import copy_beside

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(file for folder in ("teleport_fast", "bench", "kernels") for file in (ROOT / folder).rglob("*.py"))
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
IMPORTS = PICKLES | {"socket", "urllib", "requests", "http", "ftplib", "tarfile", "zipfile"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "tempfile.mktemp"}


def name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in IMPORTS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in IMPORTS:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name, given = name_of(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
            true = {key for key, value in given.items() if isinstance(value, ast.Constant) and value.value is True}
            if name in CALLS or "shell" in true or "allow_pickle" in true:
                yield f"{name}(...) in line {node.lineno}"
            if name == "torch.load" and "weights_only" not in true:
                yield f"torch.load in line {node.lineno} may unpickle anything; pass weights_only=True"


def test_no_source_unpickles_evaluates_calls_a_shell_or_opens_a_connection() -> None:
    assert len(SOURCES) > 200
    found = [f"{file.relative_to(ROOT)}: {offence}" for file in SOURCES for offence in offences(file.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "from urllib.request import urlopen",
        "x = eval('1')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import torch\ntorch.load('a')",
        "import torch\ntorch.load('a', weights_only=False)",
        "import numpy\nnumpy.load('a', allow_pickle=True)",
        "import os\nos.system('ls')",
    ],
)
def test_the_reading_finds_what_is_planted(planted: str) -> None:
    assert len([*offences(planted)]) == 1


LLAMA: dict[str, Any] = {"model_type": "llama", "hidden_size": 8}


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({**LLAMA, "auto_map": {"AutoConfig": "own.Config"}}, "auto_map"),
        ({**LLAMA, "auto_map": {"AutoModel": "owner/repository--own.Model"}}, "auto_map"),
        ({"model_type": "llava", "text_config": {**LLAMA, "auto_map": {"AutoModel": "own.Model"}}}, "text_config.auto_map"),
        ({"model_type": "x", "parts": [{"auto_map": {}}]}, "parts.auto_map"),
        ({**LLAMA, "attn_implementation": "owner/kernel"}, "attn_implementation"),
        ({**LLAMA, "_attn_implementation": "owner/kernel@main:function"}, "_attn_implementation"),
        ({**LLAMA, "_attn_implementation_internal": "owner/kernel"}, "_attn_implementation_internal"),
        ({**LLAMA, "experts_implementation": {"": "owner/kernel"}}, "experts_implementation"),
    ],
)
def test_a_config_that_names_code_is_refused_before_anything_reads_it(config: Any, where: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for argument in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ValueError, match=rf"names code of its own \({where}\), which is not run; pass --trust-remote-code if"):
            load(str(argument))
    assert not (tmp_path / "ran").exists()


def test_a_config_that_is_nested_without_end_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="config must hold JSON, got"):
        load(str(tmp_path))


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_that_names_weights_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "model-1.safetensors").touch()
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": name}}))
    with pytest.raises(ValueError, match=r"must lie beside it, got .*; a path that leaves the folder is not read"):
        _weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert _weights(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="weights' index must be JSON with a weight_map, got"):
        _weights(tmp_path)


def test_a_link_that_leaves_the_folder_is_not_copied(tmp_path: Path) -> None:
    secret, source, target = tmp_path / "secret.json", tmp_path / "model", tmp_path / "out"
    secret.write_text("{}")
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "same.json").symlink_to("config.json")
    assert copy_beside(source, target) == ["config.json", "same.json"]
    (source / "tokenizer.json").symlink_to(secret)
    with pytest.raises(ValueError, match=r"is a link to .*, outside of the folder, and is not copied; remove it"):
        copy_beside(source, target)
    assert not (target / "tokenizer.json").exists()
    cached = tmp_path / "models--a" / "snapshots" / "1"
    cached.mkdir(parents=True)
    (tmp_path / "models--a" / "blob").write_text("{}")
    (cached / "config.json").symlink_to("../../blob")
    assert copy_beside(cached, target) == ["config.json"]
