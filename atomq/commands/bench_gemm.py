"""`atomq bench-gemm`: the GEMM kernels, checked and timed beside their peers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atomq.commands import console
from atomq.commands.loading import loading
from atomq.commands.options import JsonOption
from atomq.errors import ConfigError

if TYPE_CHECKING:
    from atomq.eval.gemm_bench import Result
    from atomq.eval.gemm_candidates import Candidate
    from atomq.kernels.variants import Variant

HELP = "Check the GEMM kernels against exact arithmetic, then time them beside fp16, INT8, FP8 and Humming."


def command(
    model: Annotated[
        str, typer.Option(help="Shapes of a model, such as llama-2-7b, llama-3-8b, llama-3-70b, qwen3-8b.")
    ] = "llama-2-7b",
    shape: Annotated[
        list[str] | None, typer.Option(metavar="NxK", help="Output channels x inputs; in place of --model.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Shapes of a checkpoint's linears; in place of --model.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens.")] = "1,16,64,128,256,1024,4096",
    only: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Only these kernels and peers. Default: all that run here."),
    ] = None,
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="No GPU: compile every kernel for every architecture.")
    ] = False,
    save: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write the record.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the speed-up over fp16.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    with loading():
        from atomq.eval import gemm_bench

    if compile_only:
        _compile_everything(json_output)
        return
    for path, endings in ((save, (".json",)), (plot, (".png", ".svg"))):
        if path is not None and path.suffix not in endings:
            raise ConfigError(f"{path} must end in {' or '.join(endings)}")
    shapes = _shapes(model, shape or [], checkpoint)
    counts = parse_counts("--tokens", tokens)
    candidates, left_out = gemm_bench.usable(_chosen(gemm_bench.all_candidates(), only))
    ceilings = gemm_bench.measure_ceilings()
    results: list[Result] = []
    n_cases = len(shapes) * len(counts) * len(candidates)
    with console.progress("bench-gemm") as on_progress:
        for result in gemm_bench.bench(shapes, counts, candidates, ceilings, left_out.append):
            results.append(result)
            on_progress(len(results), n_cases, f"{result.name} {result.n_channels}x{result.n_inputs}")
    console.warn(left_out)
    record = {
        **gemm_bench.environment(ceilings),
        "left_out": left_out,
        "results": [result.to_dict() for result in results],
    }
    if save is not None:
        from atomq.formats.files import write_json

        write_json(save, record)
    if plot is not None:
        from atomq.formats.gemm_plot import draw_speedups

        draw_speedups(plot, record["results"], record["gpu"])
    if json_output:
        console.print_json(record)
    else:
        for size in shapes:
            _print_shape(size, [r for r in results if (r.n_channels, r.n_inputs) == size], record["gpu"])


def parse_counts(option: str, text: str) -> list[int]:
    """ "1,16,64" -> [1, 16, 64].

    Raises:
        ConfigError: something in it is not a number of at least 1.
    """
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ConfigError(
            f"{option} {text} must be numbers of at least 1 with commas between, such as 1,16,64"
        )
    return counts


def _chosen(candidates: list[Candidate], only: str | None) -> list[Candidate]:
    if only is None:
        return candidates
    names, wanted = [candidate.name for candidate in candidates], only.split(",")
    for name in wanted:
        if name not in names:
            raise ConfigError(f"--only {name}: there is no such kernel or peer; there are {', '.join(names)}")
    return [candidate for candidate in candidates if candidate.name in wanted]


def _shapes(model: str, texts: list[str], checkpoint: Path | None) -> list[tuple[int, int]]:
    from atomq.eval.gemm_bench import MODEL_SHAPES

    if checkpoint is not None:
        from atomq.checkpoints import checkpoint_shapes

        return checkpoint_shapes(checkpoint)
    if texts:
        return [_parse_shape(text) for text in texts]
    if model not in MODEL_SHAPES:
        raise ConfigError(f"unknown model {model!r}; shapes are known of {', '.join(MODEL_SHAPES)}")
    return list(MODEL_SHAPES[model])


def _parse_shape(text: str) -> tuple[int, int]:
    n, _, k = text.lower().partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) and int(k) > 128):
        raise ConfigError(
            f"--shape {text} must look like 4096x4096 (output channels x inputs, inputs above 128)"
        )
    return int(n), int(k)


def _print_shape(size: tuple[int, int], results: list[Result], gpu: str) -> None:
    rows = []
    for r in sorted(results, key=lambda r: (r.n_tokens, r.is_peer)):
        beside = [other for other in results if other.n_tokens == r.n_tokens]
        fp16 = min((o.timing.graph_us for o in beside if o.name == "fp16"), default=None)
        rival = min((o.timing.graph_us for o in beside if o.is_peer), default=None)
        rows.append(
            [
                r.name,
                str(r.n_tokens),
                f"{r.timing.graph_us:.1f}",
                f"{r.timing.cold_us:.1f}",
                "" if r.whole is None else f"{r.whole.graph_us:.1f}",
                f"{r.tops:.0f}",
                f"{r.gigabytes_per_s:.0f}",
                f"{100 * r.floor_us / r.timing.graph_us:.0f} %",
                "" if fp16 is None else f"{fp16 / r.timing.graph_us:.2f}x",
                "" if rival is None else f"{rival / r.timing.graph_us:.2f}x",
            ]
        )
    columns = [
        "kernel",
        "tokens",
        "us",
        "us, cold",
        "us, quantize too",
        "TOP/s",
        "GB/s",
        "of floor",
        "over fp16",
        "over best peer",
    ]
    console.print_table(f"{size[0]} x {size[1]} on {gpu}", columns, rows)


def _compile_everything(json_output: bool) -> None:
    from atomq.kernels.loader import ARCHITECTURES
    from atomq.kernels.variants import compile_variants

    with console.progress("compile") as on_progress:
        built = list(compile_variants(on_progress))
    record: list[dict[str, Any]] = [variant.to_dict() for variant in built]
    if json_output:
        console.print_json({"architectures": list(ARCHITECTURES), "kernels": record})
        return
    columns = ["kernel", "architecture", "variants", "registers", "shared bytes", "spilled bytes"]
    console.print_table("kernels compiled by NVRTC; --json lists each variant", columns, _by_kernel(built))


def _by_kernel(built: Sequence[Variant]) -> list[list[str]]:
    """A row for each kernel and architecture: how many variants, and the range of what they take.

    Shared memory with that of the launch, where a parameter says how much.
    """
    variants: dict[tuple[str, str], list[Variant]] = {}
    for variant in built:
        variants.setdefault((variant.name, variant.arch), []).append(variant)
    return [
        [
            *of,
            str(len(same)),
            _range([v.registers for v in same]),
            _range([v.shared_bytes + int(v.defines.get("SHARED_BYTES", 0)) for v in same]),
            _range([v.spill_bytes for v in same]),
        ]
        for of, same in variants.items()
    ]


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
