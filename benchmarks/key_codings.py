"""What coding K costs by where it is coded, by context length and calibration: KL from the float model.

    python -m benchmarks.key_codings MODEL --calib-data A.txt --data B.txt --data C.txt --save RECORD.json

Only K and V are coded, in four bits under the Hadamard; weights and activations stay as they are, so the
figure is that of the cache alone.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import PreTrainedModel

from atomq import pipeline
from atomq.commands import console
from atomq.config import KVScheme
from atomq.key_statistics import balance_keys, mean_key
from atomq.models.blocks import blocks_of, capture_block_inputs
from atomq.models.families import ModelFamily, find_family
from atomq.models.loading import load_float_model, load_tokenizer
from atomq.models.quantized import attention_name, head_dim_of, install_kv_quantizer
from atomq.models.source import resolve_source
from benchmarks.accuracy import environment

CODINGS = {
    "before RoPE": KVScheme(4, rotation="hadamard"),
    "before RoPE, offset": KVScheme(4, rotation="hadamard", key_offset=True),
    "after RoPE": KVScheme(4, key_position="after_rope", rotation="hadamard"),
    "after RoPE, balanced": KVScheme(4, key_position="after_rope", rotation="hadamard", key_balance=True),
}


def main(
    model: str,
    calib_data: Annotated[str, typer.Option()],
    data: Annotated[list[str], typer.Option()],
    calibration: Annotated[list[str], typer.Option(help="WINDOWSxTOKENS")] = ["64x2048", "16x512"],  # noqa: B006
    context: Annotated[list[int], typer.Option(help="Tokens of a window.")] = [512, 2048, 8192],  # noqa: B006
    n_tokens: Annotated[int, typer.Option(help="Of each text.")] = 32768,
    save: Path | None = None,
    device: str = "auto",
    commit: str = "",
) -> None:
    place = pipeline.choose_device(device)
    source = resolve_source(model)
    tokenizer = load_tokenizer(source)
    float_model = load_float_model(source).to(place)
    family = find_family(float_model.config.model_type)

    def tokens_of(text: str, wanted: int) -> torch.Tensor:
        found: list[int] = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]
        return torch.tensor(found[:wanted], device=place)

    coded: dict[str, dict[str, nn.Module]] = {}
    for sizes in calibration:
        windows = tuple(map(int, sizes.split("x")))
        tokens = tokens_of(calib_data, windows[0] * windows[1]).view(windows)
        coded[sizes] = with_codings(float_model, family, tokens, place)
    rows: list[dict[str, Any]] = []
    record = {
        "what": "KL from the float model, K and V alone in 4 bits under the Hadamard",
        "model": Path(model).name,
        "calib_data": Path(calib_data).name,
        "n_tokens": n_tokens,
        "environment": environment(place, commit),
        "rows": rows,
    }
    for length in context:
        for text in data:
            tokens = tokens_of(text, n_tokens)
            for sizes, models in coded.items():
                divergences = divergences_of(float_model, models, tokens.view(-1, length))
                rows.append(
                    {"context": length, "data": Path(text).name, "calibration": sizes, "kl": divergences}
                )
                console.out.print(json.dumps(rows[-1]), highlight=False, soft_wrap=True)
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def with_codings(
    model: PreTrainedModel, family: ModelFamily, tokens: torch.Tensor, device: torch.device
) -> dict[str, nn.Module]:
    """Copies of `model` with a cache of each of CODINGS, calibrated on windows `tokens` [n, T]."""
    inputs = capture_block_inputs(model, family, tokens, device)
    head_dim = head_dim_of(model.config)
    copies = {name: copy.deepcopy(model) for name in CODINGS}
    for index, block in enumerate(blocks_of(model, family)):
        offset, scale = balance_keys(block, family, inputs, head_dim)
        mean = mean_key(block, family, inputs, head_dim)
        for name, kv in CODINGS.items():
            coded = blocks_of(copies[name], family)[index]
            install_kv_quantizer(coded, family, kv, head_dim)
            attention = coded.get_submodule(attention_name(family))
            if kv.has_key_offset:
                attention.register_buffer("key_offset", offset if kv.has_key_scale else mean)
            if kv.has_key_scale:
                attention.register_buffer("key_scale", scale)
        inputs.run(block)
    return dict(copies)


@torch.inference_mode()
def divergences_of(model: nn.Module, coded: dict[str, nn.Module], windows: torch.Tensor) -> dict[str, float]:
    """Mean over all tokens of KL(float || coded), nats, by coding."""
    sums = dict.fromkeys(coded, 0.0)
    for window in windows:
        expected = model(window[None], use_cache=False).logits[0].float().log_softmax(-1)
        for name, other in coded.items():
            found = other(window[None], use_cache=False).logits[0].float().log_softmax(-1)
            sums[name] += float((expected.exp() * (expected - found)).sum(-1).mean())
    return {name: total / len(windows) for name, total in sums.items()}


if __name__ == "__main__":
    typer.run(main)
