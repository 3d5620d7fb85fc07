"""Time and memory of find_symmetries on a model of about 1.3 billion parameters on meta: `python bench/discovery/meta.py`."""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch

from teleport_fast import find_symmetries

SIZES = {"hidden_size": 2048, "num_hidden_layers": 24}
CONFIGS = {
    "llama": {"intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
    "gpt_neox": {"intermediate_size": 8192, "num_attention_heads": 16, "vocab_size": 50304},
}


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=CONFIGS, default="llama")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    import transformers

    config = transformers.AutoConfig.for_model(arguments.family, **SIZES, **CONFIGS[arguments.family])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    block = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[0]
    before, wall, cpu = peak_gib(), time.perf_counter(), time.process_time()
    found = find_symmetries(model)
    report = {
        "family": arguments.family,
        "parameters": sum(p.numel() for p in model.parameters()),
        "joints": len(found),
        "dimensions": found.dim,
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_gib_added": round(peak_gib() - before, 2),
        "block_gib_in_float64": round(sum(p.numel() for p in block.parameters()) * 8 / 2**30, 2),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
