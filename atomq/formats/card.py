"""The model card (README.md) of a checkpoint: what it is and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from atomq.config import FLOAT_BITS, ActivationScheme, KVScheme, QuantScheme, Recipe, WeightScheme
from atomq.presets import recipe_name


def scheme_name(scheme: QuantScheme) -> str:
    """Such as "W4A4KV4"."""
    name = f"W{scheme.weights.n_bits}A{scheme.activations.n_bits}"
    return name if scheme.kv.n_bits == FLOAT_BITS else f"{name}KV{scheme.kv.n_bits}"


def model_card(
    source_name: str,
    recipe: Recipe,
    bits: dict[str, float],
    version: str,
    calibration: Mapping[str, Any] | None = None,
) -> str:
    """Markdown; depends on nothing but its arguments.

    Args:
        calibration: the facts of the calibration text ("data", "n_samples", "seq_len"); None without one.
    """
    scheme, solver = recipe.scheme, recipe.solver
    outliers = scheme.outliers
    text = "nothing"
    if calibration is not None:
        text = f"{calibration['data']}: {calibration['n_samples']} x {calibration['seq_len']} tokens"
    kept = f"{outliers.n_outliers} in {outliers.precision}" if outliers.n_outliers else "none"
    return f"""---
base_model: {json.dumps(source_name)}
library_name: transformers
pipeline_tag: text-generation
tags: [atomq, quantized]
---
# {source_name}, {scheme_name(scheme)} by atomq

| | |
| --- | --- |
| weights | {_coding(scheme.weights)}, {bits["weight"]:.3f} effective bits |
| activations | {_coding(scheme.activations)}, {bits["activation"]:.3f} effective bits |
| KV cache | {_cache(scheme.kv)}, {bits["kv"]:.3f} effective bits |
| outlier channels per input | {kept} |
| solver | {solver.method} |
| recipe | {recipe_name(recipe)} |
| calibrated on | {text} |

Made with atomq {version}. The whole recipe, the source's and the calibration data's hashes and a SHA-256 of
every file are in `manifest.json`. `reports/report.html` shows the error of every linear and what was measured
since; it is no part of what the manifest hashes.

## Load it

With atomq installed (its repository says how):

```
atomq generate THIS_FOLDER "Once upon a time"
atomq eval-ppl THIS_FOLDER
```

```python
import atomq.hf  # teaches transformers the format; without it transformers loads random weights
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

Other tools: `atomq export THIS_FOLDER DEST --format compressed-tensors` (or `gptq`, `hf`) writes their
formats where they can express this recipe, and says which recipe they can express where not.

## What it costs

```
atomq eval-ppl THIS_FOLDER --baseline "{source_name}"
```

prints the perplexity of both and the KL divergence between them, and adds it to the report.

The licence of the weights is that of the base model.
"""


# How each export is opened by the tools that it is for.
_OPENING = {
    "compressed-tensors": "vLLM, SGLang, or transformers with the package compressed-tensors",
    "gptq": "gptqmodel, vLLM or SGLang",
    "gptq_v2": "gptqmodel, vLLM or SGLang",
    "hf": "transformers, or any tool that reads a float model",
}


def export_card(source_name: str, scheme: QuantScheme, format_name: str, notes: list[str]) -> str:
    """Markdown for a checkpoint that was written in another tool's format."""
    remarks = "".join(f"- {note}\n" for note in notes)
    return f"""---
base_model: {json.dumps(source_name)}
tags: [atomq, quantized]
---
# {source_name}, {scheme_name(scheme)} by atomq, as {format_name}

Open this folder with {_OPENING[format_name]}. How it was quantized and a SHA-256 of every file are in
`manifest.json`.

{remarks}
The licence of the weights is that of the base model.
"""


def _coding(scheme: WeightScheme | ActivationScheme) -> str:
    """Such as "4 bits (int), groups of 128"."""
    if scheme.n_bits == FLOAT_BITS:
        return "floating point"
    size = "a whole row" if scheme.group_size is None else str(scheme.group_size)
    return f"{scheme.n_bits} bits ({scheme.number_format}), groups of {size}"


def _cache(kv: KVScheme) -> str:
    """Such as "4 bits, K after RoPE balanced, Hadamard"."""
    if kv.n_bits == FLOAT_BITS:
        return "floating point"
    taken_off = " balanced" if kv.key_balance else " less an offset" if kv.key_offset else ""
    rotation = ", Hadamard" if kv.rotation == "hadamard" else ""
    return f"{kv.n_bits} bits, K {kv.key_position.replace('_rope', ' RoPE')}{taken_off}{rotation}"
