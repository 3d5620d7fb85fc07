"""Where a model comes from: a function MODULE:FUNCTION, or a transformers folder or config on this machine."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Parameters of a model that a config alone fills with random numbers; a larger one stays on meta, proven block by block.
LARGEST_FILLED = 300_000_000
NEEDED = "reading a transformers config needs transformers; pip install transformers"


@dataclass(frozen=True)
class Source:
    """A model in eval mode, what it is called with (None: to be guessed), and the folder its files came from."""

    model: nn.Module
    inputs: Any = None
    folder: Path | None = None


def load(where: str, config: Path | None = None, trust_remote_code: bool = False) -> Source:
    """The model that `where` names: a folder with config.json (and weights), a config file, or MODULE:FUNCTION.

    A folder's weights are read where it has safetensors files; a config alone gives random weights, or above 300 million
    parameters a model on meta, of which one block of each kind is proven. Nothing is downloaded.
    MODULE:FUNCTION imports and runs that function; a config runs none of its own code unless `trust_remote_code`.
    Errors: ValueError for a name that is neither, a config that names code of its own, weights as pickles, or an unknown
    architecture; ModuleNotFoundError where transformers is missing.
    """
    path = Path(where)
    if config is not None or path.is_dir() or path.suffix == ".json":
        file = config if config is not None else (path / "config.json" if path.is_dir() else path)
        return _from_config(file, path if path.is_dir() else None, trust_remote_code)
    return Source(*from_factory(where))


def from_factory(factory: str) -> tuple[nn.Module, Any]:
    """Calls `MODULE:FUNCTION`; its model, and its example inputs or None.

    Raises ValueError that says which part of the name does not work.
    """
    module_name, colon, function_name = factory.partition(":")
    if not colon and "/" in factory:
        raise ValueError(f"PATH must be a folder with config.json, got {factory!r}, which is none; check the path")
    if not colon or not module_name or not function_name:
        raise ValueError(
            f"factory must look like MODULE:FUNCTION, got {factory!r}; for example mymodel:build, or a folder with config.json"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise ValueError(f"factory names a module that does not import, got {factory!r}: {error}") from error
    except AttributeError:
        raise ValueError(f"factory names no function of {module_name}, got {factory!r}; check the name") from None
    built = function()
    model, inputs = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"factory must return a torch.nn.Module, got {type(model).__name__} from {factory!r}")
    return model, inputs


def _from_config(file: Path, folder: Path | None, trust_remote_code: bool) -> Source:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config must be a readable file, got {str(file)!r} ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config must hold JSON, got {str(file)!r}: {error}") from None
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise ValueError(f"config must be a transformers config with a model_type, got {str(file)!r}; save it with the model")
    if (code := _names_code(settings)) and not trust_remote_code:
        raise ValueError(
            f"config {str(file)!r} names code of its own ({code}), which is not run; "
            f"pass --trust-remote-code if you have read that code"
        )
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(NEEDED) from error
    # Eager attention: fused kernels may round differently from one call to the next, which a proof would see.
    common: dict[str, Any] = {"attn_implementation": "eager", "trust_remote_code": trust_remote_code}
    try:
        # nothing is downloaded, so there is no revision to pin
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        config = transformers.AutoConfig.from_pretrained(file, **local)  # nosec B615
        auto = _auto_class(transformers, config)
        if folder is not None and _weights(folder):
            model = auto.from_pretrained(folder, config=config, local_files_only=True, use_safetensors=True, **common)
        else:
            with torch.device("meta"):
                model = auto.from_config(config, **common)
            if sum(parameter.numel() for parameter in model.parameters()) <= LARGEST_FILLED:
                model = auto.from_config(config, **common)
    except (OSError, KeyError, ValueError, AttributeError, TypeError, ImportError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"transformers cannot build a model from {str(file)!r}: {first}") from error
    return Source(model.eval(), None, folder)


def _names_code(settings: Any, inside: str = "") -> str | None:
    """Where a config, or one inside it, names Python files of its own or kernels of the hub; None where it does not."""
    if isinstance(settings, list):
        return next((found for entry in settings if (found := _names_code(entry, inside))), None)
    if not isinstance(settings, dict):
        return None
    for key, value in settings.items():
        # a kernel of the hub is fetched and imported: "owner/name", or per backend in a dictionary
        fetched = str(key).removesuffix("_internal").endswith("_implementation") and "/" in str(value)
        if key == "auto_map" or fetched:
            return f"{inside}{key}"
        if found := _names_code(value, f"{inside}{key}."):
            return found
    return None


def _auto_class(transformers: Any, config: Any) -> Any:
    """The auto class whose table holds the architecture that the config names, else the bare model."""
    wanted = (getattr(config, "architectures", None) or [None])[0]
    names = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForImageClassification")
    for name in (*names, "AutoModelForSequenceClassification"):
        auto = getattr(transformers, name)
        if wanted is not None and any(model.__name__ == wanted for model in _models(auto, config)):
            return auto
    return transformers.AutoModel


def _models(auto: Any, config: Any) -> tuple[Any, ...]:
    found = auto._model_mapping.get(type(config), None)
    return tuple(found) if isinstance(found, (list, tuple)) else (found,) if found is not None else ()


def _weight_map(index: Path) -> list[Any]:
    try:
        return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"weights' index must be JSON with a weight_map, got {str(index)!r}: {error!r}; save the model again") from None


def _weights(folder: Path) -> bool:
    """Whether the folder has safetensors weights. Errors: ValueError for weights that are pickles alone, and for an index that
    names files elsewhere."""
    for index in folder.glob("*.safetensors.index.json"):
        for name in sorted({str(name) for name in _weight_map(index)}):
            if Path(name).name != name or name in ("", ".."):
                raise ValueError(
                    f"weights of {str(index)!r} must lie beside it, got {name!r}; a path that leaves the folder is not read"
                )
    if any(folder.glob("*.safetensors")):
        return True
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"weights must be safetensors, got {pickles[0]!r} in {str(folder)!r}; a pickle can run code, "
            f"convert it where you trust it with model.save_pretrained(..., safe_serialization=True)"
        )
    return False
