"""What is launched under the sanitizer runs, here by the twins."""

from __future__ import annotations

from atomq.eval.attention_bench import CACHES
from benchmarks.sanitize import run_decode_kernels


def test_decoding_is_launched_in_every_layout():
    launched = list(run_decode_kernels("cpu"))
    assert launched == [*(f"kv_append, kv_read, kv_attention: {name}" for name in CACHES), "rows, scale_sums"]
