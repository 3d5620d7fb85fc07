"""inspect and canonicalize read transformers folders and functions, write safetensors with a note, and run nobody's code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from teleport_fast import cli, find_symmetries
from teleport_fast.inspection.source import load
from teleport_fast.inspection.weights import load_, note_of, save

transformers = pytest.importorskip("transformers", reason="reading configs needs transformers: pip install transformers")
pytest.importorskip("safetensors", reason="weights need safetensors: pip install safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder: config, weights, and one file beside them."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=28,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


def test_inspect_reads_a_folder_and_a_config(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in ([str(folder)], ["--config", str(folder / "config.json")]):
        assert cli.main(["inspect", *arguments, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        kinds = {row["kind"] for row in report["joints"]}
        assert {"value-output", "query-key-rotary", "up-down"} <= kinds
    assert cli.main(["inspect", str(folder), "--picture", str(tmp_path / "joints.svg")]) == 0
    shown = capsys.readouterr().out
    assert "self_attn.value-output" in shown
    assert "continuous dimensions" in shown
    assert (tmp_path / "joints.svg").is_file()


def test_a_large_config_stays_on_meta_and_is_proven_block_by_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = load(str(folder / "config.json"))
    assert not any(parameter.is_meta for parameter in small.model.parameters())
    monkeypatch.setattr("teleport_fast.inspection.source.LARGEST_FILLED", 1000)
    large = load(str(folder / "config.json"))
    assert all(parameter.is_meta for parameter in large.model.parameters())
    theirs, ours = (find_symmetries(each.model) for each in (large, small))
    assert {joint.name for joint in theirs} == {joint.name for joint in ours}
    assert all(finding.deviation is not None for finding in theirs.findings if finding.status == "found")


def test_canonicalize_writes_a_folder_that_transformers_reads(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "balanced"
    assert cli.main(["canonicalize", str(folder), "--out", str(out), "--check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["check"]["ok"]
    assert report["check"]["deviation"] < report["check"]["tolerance"] < 1e-4
    assert report["canonicalize"]["squared_norm_after"] < report["canonicalize"]["squared_norm_before"]
    assert (out / "tokenizer.json").is_file()
    noted = note_of(out / "model.safetensors")
    assert noted is not None and noted["canonicalize"] == report["canonicalize"]
    ids = torch.arange(12).reshape(2, 6)
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, out))
    assert not torch.equal(before.model.layers[0].mlp.up_proj.weight, after.model.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(after(ids).logits, before(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_function_s_model_takes_and_gives_a_weights_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("own_model.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))\n"
    )
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    save(model, tmp_path / "start.safetensors", {"who": "test"})
    arguments = ["canonicalize", "own_model:build", "--weights", "start.safetensors", "--out", "end.safetensors", "--check"]
    assert cli.main(arguments) == 0
    assert "outputs deviate by" in capsys.readouterr().out
    moved = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    note = load_(moved, tmp_path / "end.safetensors")
    assert note is not None and note["check"]["ok"]
    x = torch.randn(5, 3)
    torch.testing.assert_close(moved(x), model(x))
    assert not torch.equal(moved[0].weight, model[0].weight)


class Hostile:
    """Unpickling it would write a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_code_in_a_config_or_a_pickle_is_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    settings = json.loads((folder / "config.json").read_text())
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "modeling_own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    own = {**settings, "auto_map": {"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "modeling_own.Config"}}
    (hostile / "config.json").write_text(json.dumps(own))
    with pytest.raises(ValueError, match=r"names code of its own \(auto_map\), which is not run"):
        load(str(hostile))
    (hostile / "config.json").write_text(json.dumps(settings))
    (hostile / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(ValueError, match=r"weights must be safetensors, got 'pytorch_model.bin'"):
        load(str(hostile))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists(), "the control: this pickle does run code"


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="factory must look like MODULE:FUNCTION, got 'nowhere'"):
        load("nowhere")
    with pytest.raises(ValueError, match=r"config must be a readable file, got .*config.json"):
        load(str(tmp_path))
    file = tmp_path / "config.json"
    for text, message in (("{", "must hold JSON"), ("[]", "with a model_type"), ('{"model_type": "none"}', "cannot build")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path))


def test_weights_are_as_readable_as_any_other_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    save(nn.Linear(3, 2), tmp_path / "w.safetensors", {})
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_bad_weights_are_named(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"weights must be a .safetensors file, got 'w.pt'"):
        save(model, tmp_path / "w.pt", {})
    with pytest.raises(ValueError, match="does not exist"):
        load_(model, tmp_path / "w.safetensors")
    save(model, tmp_path / "w.safetensors", {})
    with pytest.raises(ValueError, match="do not fit the model"):
        load_(nn.Linear(4, 2), tmp_path / "w.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
