"""Run every kernel on small shapes under NVIDIA's compute-sanitizer, and write what it finds.

python -m benchmarks.sanitize --save benchmarks/results/2026-11-27-h100-sanitizer.json

Results are not compared here; the GPU tests do that. memcheck runs without torch's caching allocator, so
that a byte past the end of a tensor is a byte past the end of an allocation.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from atomq.eval.attention_bench import CACHES, layouts
from atomq.kernels import activations
from atomq.kernels.activations import quantize_act
from atomq.kernels.gemm import Engine, w4a4_gemm, w4a16_gemm
from atomq.kernels.gemm_kv import w4a4_gemm_kv
from atomq.kernels.gemm_tiles import choose_tile
from atomq.kernels.gptq import gptq_block
from atomq.kernels.kv import dequantize_kv, quantize_kv
from atomq.kernels.kv_cache import append_kv, decode_attention, read_kv
from atomq.kernels.kv_pages import HeadParameters
from atomq.kernels.layout import ActivationFormat, Added, ChannelOrder, NormParameters
from atomq.kernels.repack import CanonicalWeight, PackedWeight, repack_weight
from atomq.kernels.rows import prepare_rows, quantize_rows, scale_sums
from atomq.numerics.grid import CodeGrid
from atomq.runtime.random_decoder import random_balance

TOOLS = ("memcheck", "racecheck")
_MAX_FINDINGS = 600  # lines; a report has up to twenty
_TOKENS = (1, 9, 33, 70, 90, 130, 180, 500)  # tiles of 8, 16, 64, 80, 96, 160, 192, 256 on large weights
_N_CHANNELS, _N_INPUTS, _N_OUTLIERS, _HEAD_DIM = 320, 1000, 70, 64
_CACHE_HEAD_DIM = 128


def run_kernels() -> Iterator[str]:
    """Launch every kernel on random operands of widths that fill no slot; what was launched."""
    torch.manual_seed(0)
    for progressive in (False, True):
        layout = ActivationFormat(_N_INPUTS, _N_OUTLIERS, hadamard=True, progressive=progressive)
        order = ChannelOrder.of(torch.randperm(_N_INPUTS, device="cuda"), layout)
        weight = _weight(_N_OUTLIERS, progressive)
        for n_tokens in _TOKENS:
            quantized = quantize_act(_tokens(n_tokens), layout, order)
            w4a4_gemm(quantized, weight)
            large = choose_tile(n_tokens, 128, progressive)  # as on many more channels and inputs
            w4a4_gemm(quantized, weight, engine=Engine.WGMMA_INT8, tile=large)
            w4a4_gemm(quantized, weight, torch.bfloat16, engine=Engine.MMA_INT8)
            w4a4_gemm_kv(quantized, weight, _HEAD_DIM, hadamard=True)
            yield f"quantize_act, w4a4_gemm, w4a4_gemm_kv: {n_tokens} tokens, progressive {progressive}"
    plain = _weight(0, False)
    for n_tokens in _TOKENS:
        w4a16_gemm(_tokens(n_tokens), plain)
        yield f"w4a16_gemm: {n_tokens} tokens"
    layout = ActivationFormat(_N_INPUTS, _N_OUTLIERS, 64, hadamard=True)
    parameters = torch.randn(2, _N_INPUTS, device="cuda")
    norm = NormParameters.of(parameters[0], parameters[1], 1e-5, layout)
    x, up = _tokens(9), _tokens(9)
    activations.rms_norm_quantize(x, norm, layout)
    activations.rms_norm_quantize(x, norm, layout, added=Added.to(up))
    activations.layer_norm_quantize(x, norm, layout)
    activations.silu_mul_quantize(x, up, layout)
    activations.relu_quantize(x, layout)
    yield "quantize_act: every prologue"
    for head_dim in (64, 96, 128):
        for hadamard in (False, True):
            heads = quantize_kv(torch.randn(9, 3, head_dim, device="cuda").half(), hadamard=hadamard)
            dequantize_kv(heads, torch.float16, hadamard=hadamard)
    yield "quantize_kv, dequantize_kv"
    factor = torch.linalg.cholesky(torch.eye(100, device="cuda") + 0.1, upper=True)
    block, scales = torch.randn(33, 100, device="cuda"), torch.full((33,), 0.3, device="cuda")
    gptq_block(block, scales, None, factor, CodeGrid(4))
    yield "gptq_block"
    yield from run_decode_kernels("cuda")
    torch.cuda.synchronize()


def run_decode_kernels(device: str) -> Iterator[str]:
    """Launch what decoding adds: the paged cache in every layout, ragged and with an empty slot, and rows."""
    lengths, per_row = (1, 0, 17, 1090), 18
    table = torch.randperm(len(lengths) * per_row, device=device).int().reshape(len(lengths), per_row)
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).int().to(device)
    positions = torch.cat([torch.arange(n) for n in lengths]).int().to(device)
    at = torch.tensor(lengths, dtype=torch.int32, device=device)
    angles = torch.rand(64 * per_row, _CACHE_HEAD_DIM // 2, device=device)
    norms = torch.rand(2, _CACHE_HEAD_DIM, device=device)
    for name, layout in layouts(2, _CACHE_HEAD_DIM).items():
        heads = HeadParameters.of(
            torch.stack((angles.cos(), angles.sin()), dim=-1).contiguous(),
            0.1,
            *norms,
            1e-5,
            *random_balance(CACHES[name], layout, 64 * per_row, device),
        )
        pages = torch.zeros((table.numel(), 2, layout.page_bytes), dtype=torch.uint8, device=device)
        keys, values = torch.randn(2, len(rows), 2, _CACHE_HEAD_DIM, device=device).half()
        append_kv(keys, values, pages, table, rows, positions, layout, heads)
        read_kv(pages, table, rows, positions, layout, heads, torch.float16)
        for group in (1, 12):
            query = torch.randn(len(lengths), 2 * group, _CACHE_HEAD_DIM, device=device).half()
            for n_splits in (1, 2):
                decode_attention(query, pages, table, at, layout, heads, n_splits)
        yield f"kv_append, kv_read, kv_attention: {name}"
    x, weight = torch.randn(9, 2 * _N_INPUTS, device=device).half(), torch.rand(_N_INPUTS, device=device)
    prepare_rows(x, silu_mul=True)
    first, second = x.chunk(2, dim=1)
    codes, scales = quantize_rows(
        first, norm_weight=weight, epsilon=1e-5, added=Added.to(second.contiguous())
    )
    scale_sums(codes.int(), scales, weight, torch.float16)
    yield "rows, scale_sums"


def _weight(n_outliers: int, progressive: bool) -> PackedWeight:
    n_normal = _N_INPUTS - n_outliers
    shape = (_N_CHANNELS, -(-n_normal // 128))
    factors = torch.randint(1, 17, shape, device="cuda").to(torch.uint8)
    return repack_weight(
        CanonicalWeight(
            torch.randint(0, 256, (_N_CHANNELS, -(-n_normal // 2)), device="cuda").to(torch.uint8),
            factors if progressive else torch.rand(shape, device="cuda").half(),
            n_normal,
            128,
            scale_base=torch.rand(_N_CHANNELS, device="cuda") if progressive else None,
            outlier_weight=torch.randint(-127, 128, (_N_CHANNELS, n_outliers), device="cuda").to(torch.int8)
            if n_outliers
            else None,
            outlier_scales=torch.rand(_N_CHANNELS, device="cuda") if n_outliers else None,
            bias=torch.randn(_N_CHANNELS, device="cuda"),
        )
    )


def _tokens(n_tokens: int) -> torch.Tensor:
    return torch.randn(n_tokens, _N_INPUTS, device="cuda", dtype=torch.float16)


def sanitize(tool: str) -> dict[str, Any]:
    """What `compute-sanitizer --tool <tool>` finds in `run_kernels`."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3", sys.executable, "-m"]
    environment = {**os.environ, **({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {})}
    begin = time.monotonic()
    run = subprocess.run(
        [*command, "benchmarks.sanitize", "--kernels"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = run.stdout.splitlines()
    summary = [line for line in lines if re.search(r"(ERROR|RACECHECK) SUMMARY", line)]
    return {
        "exit_code": run.returncode,
        "summary": summary[-1].lstrip("= ") if summary else (run.stderr or run.stdout)[-2000:],
        "launched": [line for line in lines if not line.startswith("=")],
        "findings": [line for line in lines if line.startswith("=")][:_MAX_FINDINGS]
        if run.returncode
        else [],
        "seconds": round(time.monotonic() - begin, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", action="store_true", help="launch them only, with no sanitizer")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    if options.kernels:
        for line in run_kernels():
            sys.stdout.write(line + "\n")
        return
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True, check=True)
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": options.commit,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "sanitizer": version.stdout.split()[-1],
        "tools": {},
    }
    for tool in TOOLS:
        record["tools"][tool] = sanitize(tool)
        text = json.dumps(record, indent=1) + "\n"
        if options.save:
            options.save.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    sys.exit(any(found["exit_code"] for found in record["tools"].values()))


if __name__ == "__main__":
    main()
