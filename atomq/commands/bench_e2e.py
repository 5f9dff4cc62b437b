"""`atomq bench-e2e`: decode throughput of whole models, ours beside float16, INT8 and W4A16."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atomq.commands import console
from atomq.commands.bench_gemm import parse_counts
from atomq.commands.e2e_output import print_record
from atomq.commands.loading import loading
from atomq.commands.options import JsonOption
from atomq.errors import ConfigError

if TYPE_CHECKING:
    from atomq.eval.e2e_bench import Ceiling, Step
    from atomq.runtime.decoder import Decoder
    from atomq.runtime.random_decoder import DecoderShape

HELP = "Decode throughput of a whole model by batch, context and memory, beside float16, INT8 and W4A16."
_GIB = 2**30


def command(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Decode this checkpoint too, beside random weights of its shape.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="The shape: llama-2-7b, llama-2-13b, llama-3-8b, llama-3-70b, qwen3-8b, ...")
    ] = "llama-2-7b",
    batches: Annotated[str, typer.Option(help="Equal batches.")] = "1,8,32",
    context: Annotated[int, typer.Option(help="Tokens in the cache of every row.")] = 1024,
    memory_gb: Annotated[
        float, typer.Option(help="Budget (GiB) in which each scheme gets its largest batch.")
    ] = 24.0,
    layers: Annotated[
        int | None, typer.Option(help="Measure only this many blocks and scale; the scaling is shown.")
    ] = None,
    schemes: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Only these schemes. Default: all.")
    ] = None,
    prefill: Annotated[bool, typer.Option(help="Time a prompt of --context tokens, too.")] = True,
    attention: Annotated[
        bool,
        typer.Option(
            "--attention",
            help="Time decode attention alone, beside torch's, FlashAttention's and FlashInfer's.",
        ),
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say how much of a step is products, attention, launches, ...")
    ] = False,
    key_position: Annotated[
        str | None,
        typer.Option(help="K of W4A4's cache: before_rope or after_rope. Default: as the default preset."),
    ] = None,
    trace: Annotated[
        int, typer.Option(metavar="N", help="Serve N requests by continuous batching, too.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
    save: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write the record.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw throughput against step time.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    for path, endings in ((save, (".json",)), (plot, (".png", ".svg"))):
        if path is not None and path.suffix not in endings:
            raise ConfigError(f"{path} must end in {' or '.join(endings)}")
    if context < 1 or memory_gb <= 0 or trace < 0:
        raise ConfigError("--context must be at least 1, --memory-gb above 0 and --trace at least 0")
    if key_position not in (None, "before_rope", "after_rope"):
        raise ConfigError(f"--key-position {key_position} is not one of before_rope, after_rope")
    counts = parse_counts("--batches", batches)
    with loading():
        from atomq.eval import e2e_bench

    shape, opened = _shape(model, checkpoint, context)
    n_layers = shape.n_layers if layers is None else layers
    if not 1 <= n_layers <= shape.n_layers:
        raise ConfigError(f"--layers {layers} must lie between 1 and the {shape.n_layers} of the model")
    names = _schemes(schemes)
    ceiling = e2e_bench.measure_ceiling()
    n_positions = max(64, context, 2048 if trace else 0)
    decoders = _decoders(shape, names, n_layers, n_positions, key_position, opened)
    steps = _measure(decoders, shape, counts, context, memory_gb * _GIB, ceiling, profile)
    record: dict[str, Any] = {
        **_environment(ceiling),
        "model": model if checkpoint is None else checkpoint.name,
        "n_layers": shape.n_layers,
        "n_layers_measured": n_layers,
        "context": context,
        "memory_gib": memory_gb,
        "kv_cache": {name: e2e_bench.describe_cache(decoder) for name, decoder in decoders.items()},
        "steps": [step.to_dict() for step in steps],
        "ratios": _ratios(steps),
    }
    if prefill:
        record["prefill"] = _measure_prefills(decoders, shape, context, profile)
    if trace:
        record["trace"] = _trace(decoders, steps, trace, seed)
    del decoders
    if attention:
        record["attention"] = _measure_attention(shape, context, ceiling)
    if save is not None:
        from atomq.formats.files import write_json

        write_json(save, record)
    if plot is not None:
        from atomq.formats.e2e_plot import draw_throughput

        draw_throughput(plot, record["steps"], f"{record['model']}, {context} tokens, {record['gpu']}")
    if json_output:
        console.print_json(record)
    else:
        print_record(record)


def _shape(model: str, checkpoint: Path | None, context: int) -> tuple[DecoderShape, Decoder | None]:
    """The shape to measure, and the checkpoint's own decoder."""
    from atomq.runtime.random_decoder import SHAPES, DecoderShape

    if checkpoint is None:
        if model not in SHAPES:
            raise ConfigError(f"unknown model {model!r}; shapes are known of {', '.join(SHAPES)}")
        return SHAPES[model], None
    import torch

    from atomq import hf
    from atomq.models.quantized import head_dim_of
    from atomq.runtime.loading import decoder_of

    console.silence_libraries()
    loaded = hf.load(checkpoint, device="cuda", dtype="float16")
    config: Any = loaded.config
    decoder = decoder_of(loaded, max(context, 2048), torch.float16)
    shape = DecoderShape(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim_of(config),
        config.vocab_size,
    )
    return shape, decoder


def _schemes(only: str | None) -> list[str]:
    from atomq.runtime.random_decoder import SCHEMES

    if only is None:
        return list(SCHEMES)
    names = only.split(",")
    if strange := [name for name in names if name not in SCHEMES]:
        raise ConfigError(f"unknown scheme {strange[0]!r}; schemes are {', '.join(SCHEMES)}")
    return names


def _decoders(
    shape: DecoderShape,
    names: list[str],
    n_layers: int,
    n_positions: int,
    key_position: Any,
    opened: Decoder | None,
) -> dict[str, Decoder]:
    import dataclasses

    import torch

    from atomq.runtime.random_decoder import SCHEMES, random_decoder

    decoders: dict[str, Decoder] = {}
    with console.progress("weights") as on_progress:
        for scheme in SCHEMES:
            if scheme in names:
                on_progress(len(decoders), len(names), scheme)
                decoders[scheme] = random_decoder(
                    shape, scheme, n_layers, n_positions, torch.device("cuda", 0), key_position
                )
    if opened is not None:
        decoders["checkpoint"] = dataclasses.replace(opened, blocks=opened.blocks[:n_layers])
    return decoders


def _measure(
    decoders: dict[str, Decoder],
    shape: DecoderShape,
    counts: list[int],
    context: int,
    budget: float,
    ceiling: Ceiling,
    profile: bool,
) -> list[Step]:
    from atomq.eval import e2e_bench

    cases = [("equal batch", {name: batch for name in decoders}) for batch in counts]
    prints = {name: e2e_bench.footprint(decoder, shape) for name, decoder in decoders.items()}
    largest = {name: prints[name].largest_batch(budget, context) for name in decoders}
    cases.append(("largest batch", largest))
    cases = [(kind, e2e_bench.within_reach(case)) for kind, case in cases]
    for name in (name for name, batch in largest.items() if not batch):
        console.warn([f"{name} does not fit {budget / _GIB:g} GiB with {context} tokens"])
    memory = e2e_bench.memory_for(decoders, [case for _, case in cases], context)
    steps: list[Step] = []
    with console.progress("bench-e2e") as on_progress:
        for index, (kind, case) in enumerate(cases):
            on_progress(index, len(cases), f"{kind} {max(case.values(), default=0)}")
            steps += e2e_bench.measure_steps(
                kind, decoders, case, context, shape, memory, ceiling, profile=profile
            )
    return steps


def _measure_prefills(
    decoders: dict[str, Decoder], shape: DecoderShape, context: int, profile: bool
) -> dict[str, dict[str, Any]]:
    from atomq.eval import e2e_bench

    memory = e2e_bench.memory_for(decoders, [{name: 1 for name in decoders}], context)
    return e2e_bench.measure_prefills(decoders, context, shape, memory, profile=profile)


def _trace(decoders: dict[str, Decoder], steps: list[Step], n_requests: int, seed: int) -> dict[str, Any]:
    """Each scheme with as many rows and pages as its largest batch has."""
    from atomq.eval import e2e_bench
    from atomq.eval.e2e_trace import run_trace, workload

    requests = workload(n_requests, seed)
    results = {}
    for step in steps:
        if step.comparison == "largest batch":
            decoder = decoders[step.scheme]
            memory = e2e_bench.memory_for(decoders, [{step.scheme: step.batch}], step.context)
            results[step.scheme] = run_trace(decoder, requests, min(step.batch, n_requests), memory).to_dict()
    return results


def _measure_attention(shape: DecoderShape, context: int, ceiling: Ceiling) -> list[dict[str, Any]]:
    from atomq.eval import attention_bench
    from atomq.eval.attention_peers import Case

    left_out: list[str] = []
    results = []
    group = shape.n_heads // shape.n_kv_heads
    case = Case(128, context, shape.n_kv_heads, group, shape.head_dim)
    try:
        for result in attention_bench.bench(case, ceiling.bandwidth, left_out.append):
            results.append(result.to_dict())
    except RuntimeError as error:  # a peer may bring the device down; what was measured before is to be kept
        left_out.append(f"attention could not be timed: {' '.join(str(error).split())[:200]}")
    console.warn(left_out)
    return results


def _ratios(steps: list[Step]) -> list[dict[str, Any]]:
    """Our schemes over each baseline of the same case."""
    from atomq.eval.e2e_bench import ratio

    rows = []
    for ours in steps:
        for other in steps:
            same = ours.comparison == other.comparison and (
                ours.comparison == "largest batch" or ours.batch == other.batch
            )
            if same and _is_ours(ours.scheme) and not _is_ours(other.scheme):
                measured, at_floors, valid = ratio(ours, other)
                rows.append(
                    {
                        "comparison": ours.comparison,
                        "scheme": ours.scheme,
                        "batch": ours.batch,
                        "baseline": other.scheme,
                        "baseline_batch": other.batch,
                        "measured": measured,
                        "at_floors": at_floors,
                        "baseline_floor_fraction": other.floor_fraction,
                        "baseline_is_valid": valid,
                    }
                )
    return rows


def _is_ours(scheme: str) -> bool:
    return scheme.startswith("w4a4") or scheme == "checkpoint"


def _environment(ceiling: Ceiling) -> dict[str, Any]:
    import torch

    from atomq.eval.gemm_timing import describe_method

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "read_gb_per_s": 1e-9 * ceiling.bandwidth,
        **describe_method(),
    }
