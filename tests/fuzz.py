"""Mutated inputs: each is refused by a typed error or loaded as what it says, never anything else.

`python tests/fuzz.py 100000 [--seed S]` (make fuzz N=100000) prints a table of what happened.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tiny_checkpoints import quantize_tiny, rehash
from tiny_gguf import write_tiny_gguf
from tiny_models import make_tiny_model, save_tiny_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import atomq.hf
from atomq.checkpoints import describe, load_checkpoint_tokenizer, open_checkpoint
from atomq.errors import AtomqError, CheckpointError
from atomq.formats.calibration import CalibrationKey, read_calibration, write_calibration
from atomq.formats.writer import CheckpointWriter
from atomq.models.gguf import read_gguf
from atomq.models.loading import companions, load_config, load_float_model, load_tokenizer
from atomq.models.source import ModelSource, resolve_source
from atomq.numerics.channels import ChannelStatistics

PACKAGE = Path(atomq.hf.__file__).resolve().parent
SECONDS_ALLOWED = 20
BYTES_ALLOWED = 2 << 30
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
DTYPES = {
    **{"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32},
    **{"U8": torch.uint8, "I8": torch.int8},
}
INTERESTING = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64),
    *(-(2**63), 10**30, 0.0, -0.0, 0.5, 1e-45, 1e308, float("nan"), float("inf"), "", ".", "..", "../x", "/"),
    *("/etc/passwd", "a\0b", "x" * 70_000, "config.json", "model", "F64", "BOOL", "F32", "[]", "é\ud800"),
    *([], {}, [[]], [0], [-1], [2**62, 2**62], [2**31] * 5, {"": 0}, [None], ["a"] * 100, [[[[[[]]]]]]),
]


class WrongLoad(Exception):
    """Something was loaded that is not what the files say."""


class TooSlow(BaseException):
    """The time for one input is over."""


# How files are spoilt.


def spoil_bytes(content: bytes, rng: random.Random, first: int) -> bytes:
    """Change, drop, repeat or add bytes, mostly among the `first` ones."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        end = len(data) if rng.random() < 0.2 else min(first, len(data))
        at = rng.randrange(max(end, 1))
        n = rng.choice((1, 1, 2, 4, 8, rng.randrange(1, 200)))
        how = rng.randrange(8)
        if how == 0 and data:
            data[at : at + 1] = bytes([data[min(at, len(data) - 1)] ^ (1 << rng.randrange(8))])
        elif how == 1:
            data[at : at + n] = rng.randbytes(n)
        elif how == 2:
            data[at : at + n] = bytes([rng.choice((0, 0x7F, 0x80, 0xFF))]) * n
        elif how == 3:
            del data[at : at + n]
        elif how == 4:
            data[at:at] = data[at : at + n]
        elif how == 5:
            del data[at:]
        elif how == 6:
            data[at : at + 8] = rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little")
        else:
            data += rng.randbytes(n)
    return bytes(data)


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key or index of a JSON value."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places_in(value[key])


def spoil_json(content: bytes, rng: random.Random) -> bytes:
    """Replace, drop, rename or exchange values anywhere in a JSON document."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # it was spoilt before
        return spoil_bytes(content, rng, len(content))
    if rng.random() < 0.1:
        return spoil_bytes(content, rng, len(content))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(places_in(value))
        if not places:
            break
        container, key = rng.choice(places)
        how = rng.randrange(6)
        if how <= 2:
            container[key] = rng.choice(INTERESTING)
        elif how == 3:
            del container[key]
        elif how == 4:
            other, other_key = rng.choice(places)
            with contextlib.suppress(KeyError, IndexError, TypeError):
                container[key], other[other_key] = other[other_key], container[key]
        elif isinstance(container, dict):
            container[rng.choice((f"{key}x", "", "../x", key.upper()))] = container.pop(key)
        else:
            container.append(container[key])
        with contextlib.suppress(ValueError, RecursionError):
            json.dumps(value)
            continue
        return content  # an exchange made a circle
    return json.dumps(value, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")


def spoil_number(content: bytes, length: int, rng: random.Random) -> bytes:
    """Put zero, minus one, an infinity or NaN into a tensor, or a large number if it has integers."""
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
        header = json.loads(content[8 : 8 + length])
        entry = header[rng.choice(sorted(header.keys() - {"__metadata__"}))]
        begin, end = entry["data_offsets"]
        value = rng.choice((0.0, -1.0, np.inf, -np.inf, np.nan))
        single = np.float32(value).tobytes()
        number = {"F32": single, "BF16": single[2:], "F16": np.float16(value).tobytes()}
        put = number.get(entry["dtype"], b"\x7f")
        at = 8 + length + begin + len(put) * rng.randrange(int(end - begin) // len(put))
        return content[:at] + put + content[at + len(put) :]
    return spoil_bytes(content, rng, len(content))


def spoil_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Spoil the header, its length or the data."""
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.2:
        return spoil_number(content, length, rng)
    if rng.random() < 0.4:
        return spoil_bytes(content, rng, 8 + length)
    header = spoil_json(content[8 : 8 + length], rng)
    header += b" " * (-len(header) % 8)
    stated = len(header) if rng.random() < 0.95 else rng.choice((0, 1, len(header) + 8, 2**40, 2**64 - 1))
    return stated.to_bytes(8, "little") + header + content[8 + length :]


def spoil(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        changed = spoil_safetensors(content, rng)
    elif path.suffix == ".gguf":
        changed = spoil_bytes(content, rng, 9000)
    else:
        changed = spoil_json(content, rng)
    path.write_bytes(changed)


# What files say, read once more in the simplest way.


def naive_safetensors(path: Path) -> dict[str, torch.Tensor]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            raw = bytearray(content[8 + length + begin : 8 + length + end])
            flat = torch.frombuffer(raw, dtype=DTYPES[entry["dtype"]]) if raw else torch.empty(0)
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def naive_gguf(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a GGUF file by its own names; F32 and F16 only."""
    data, at = path.read_bytes(), 8

    def number(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(f"<{code}")
        return value

    def text() -> str:
        nonlocal at
        n = number("Q")
        at += n
        return data[at - n : at].decode()

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind == 9:
            inner, count = number("I"), number("Q")
            return [value(inner) for _ in range(count)]
        return number("BbHhIif?__QqD"[kind].replace("D", "d"))

    n_tensors, n_keys = number("Q"), number("Q")
    metadata = {text(): value(number("I")) for _ in range(n_keys)}
    table = []
    for _ in range(n_tensors):
        name, n_dims = text(), number("I")
        shape = [number("Q") for _ in range(n_dims)][::-1]
        table.append((name, shape, number("I"), number("Q")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in table:
        dtype = {0: torch.float32, 1: torch.float16}[kind]
        n_bytes = torch.Size(shape).numel() * dtype.itemsize
        raw = bytearray(data[start + offset : start + offset + n_bytes])
        tensors[name] = torch.frombuffer(raw, dtype=dtype).reshape(shape).float()
    return tensors


def same(found: torch.Tensor, stored: torch.Tensor) -> bool:
    """Equal in value; in bytes too where nothing was to be converted."""
    return found.shape == stored.shape and bool(
        ((found == stored) | (found.isnan() & stored.isnan())).all()
        if found.dtype.is_floating_point
        else torch.equal(found, stored)
    )


def shards_of(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return sorted({folder / name for name in index["weight_map"].values()})


def check_model(state: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> None:
    if not stored.keys() <= state.keys():
        raise WrongLoad(f"not loaded: {sorted(stored.keys() - state.keys())[:3]}")
    for name, tensor in stored.items():
        if not same(state[name].cpu(), tensor.to(state[name].dtype)):
            raise WrongLoad(f"{name} is not what the file says")


# The kinds of input: how a good one is made, which file is spoilt, how it is opened.


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in shards_of(folder) for name, t in naive_safetensors(path).items()}


def make_source(folder: Path) -> Path:
    return save_tiny_model(folder / "model", **SIZES)


def open_source(folder: Path, rng: random.Random) -> None:
    source = resolve_source(str(folder))
    if rng.random() < 0.5:
        load_tokenizer(source)
        companions(source)
    model = load_float_model(source)
    check_model(model.state_dict(), all_tensors(folder))


def make_gguf(folder: Path) -> Path:
    (folder / "model").mkdir()
    write_tiny_gguf(folder / "model" / "tiny.gguf", make_tiny_model("llama", **SIZES))
    return folder / "model"


def open_gguf(folder: Path, rng: random.Random) -> None:
    source = ModelSource("tiny.gguf", folder / "tiny.gguf", "gguf")
    read_gguf(source.path)
    load_config(source)
    if rng.random() < 0.3:
        load_tokenizer(source)
    if rng.random() < 0.3:
        model = load_float_model(source, torch.float32)
        stored = naive_gguf(source.path)
        check_model(
            {"head": model.lm_head.weight, "norm": model.model.norm.weight},
            {
                "head": stored.get("output.weight", stored["token_embd.weight"]),
                "norm": stored["output_norm.weight"],
            },
        )


def make_checkpoint(folder: Path) -> Path:
    settings = {"weights.group_size": 8, "activations.group_size": 8, "outliers.n_outliers": 3}
    made = quantize_tiny(make_source(folder), folder / "OUT", "atom", n_samples=2, settings=settings)
    return made.path


def rehash_perhaps(folder: Path, rng: random.Random) -> bool:
    """Mostly let the manifest agree with the spoilt file, or nothing behind it would be reached."""
    if rng.random() < 0.8:
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError, AttributeError, RecursionError):
            rehash(folder)
    return rng.random() < 0.5


def untouched(folder: Path) -> None:
    """With hashes checked every listed file is as the manifest says."""
    for name, entry in json.loads((folder / "manifest.json").read_text())["files"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != entry["sha256"]:
            raise WrongLoad(f"{name} was altered, and nobody noticed")


def sound(folder: Path) -> None:
    """With values checked no number is none, and no scale loses a weight."""
    for name, tensor in all_tensors(folder).items():
        values = tensor.double().numpy() if tensor.is_floating_point() else np.zeros(0)
        if not np.isfinite(values).all() or (name.endswith("scales") and (values <= 0).any()):
            raise WrongLoad(f"{name} has values that cannot be, and nobody noticed")


def open_headers(folder: Path, rng: random.Random) -> None:
    check_hashes = rehash_perhaps(folder, rng)
    headers = open_checkpoint(folder, check_hashes=check_hashes).headers
    for name, tensor in all_tensors(folder).items():
        if headers[name].shape != tuple(tensor.shape) or headers[name].dtypes != (tensor.dtype,):
            raise WrongLoad(f"{name} has another header")
    if check_hashes:
        untouched(folder)
    if rng.random() < 0.5:
        describe(folder, check=check_hashes)
        if check_hashes:
            sound(folder)


def open_directly(folder: Path, rng: random.Random) -> None:
    """By transformers' own name; what transformers refuses before it asks atomq it refuses in its way."""
    rehash_perhaps(folder, rng)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except AtomqError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, MemoryError) or any(PACKAGE in Path(frame.filename).parents for frame in frames):
            raise
        raise CheckpointError(f"transformers: {error!r}"[:1000]) from error
    if getattr(model, "hf_quantizer", None) is None:  # without quantization_config it never asks atomq
        raise CheckpointError("transformers: taken for a float model")
    check_model(model.state_dict(), all_tensors(folder))


def open_loaded(folder: Path, rng: random.Random) -> None:
    if rng.random() < 0.5:
        open_directly(folder, rng)
        return
    check_hashes = rehash_perhaps(folder, rng)
    model = atomq.hf.load(folder, check_hashes=check_hashes)
    check_model(model.state_dict(), all_tensors(folder))
    if check_hashes:
        untouched(folder)
    if rng.random() < 0.2:
        load_checkpoint_tokenizer(folder)


KEY = CalibrationKey("m" * 64, "d" * 64, 0, "hessian", 3)


def make_artefact(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    statistics = {
        f"model.layers.0.{name}": ChannelStatistics(
            torch.rand(16, generator=generator), torch.rand(16, generator=generator)
        )
        for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    orders = {name: torch.arange(16, dtype=torch.int32) for name in statistics}
    write_calibration(folder / "artefact" / "stats.safetensors", KEY, statistics, orders, {"model": "x"})
    return folder / "artefact"


def open_artefact(folder: Path, _rng: random.Random) -> None:
    path = folder / "stats.safetensors"
    statistics = read_calibration(path, KEY)
    stored = naive_safetensors(path)
    check_model(
        {
            f"{name}.{part}": getattr(s, part)
            for name, s in statistics.items()
            for part in ("hessian", "abs_mean")
        },
        {
            name: t
            for name, t in stored.items()
            if name.rpartition(".")[0] in statistics and not name.endswith("perm")
        },
    )


JOB = {"recipe": {"n_bits": 4, "clip": 0.9}, "source": {"sha256": "m" * 64}, "calibration": None}


def make_unfinished(folder: Path) -> Path:
    """What a process leaves that is killed after its second shard."""
    place = folder / "run"
    place.mkdir()
    with contextlib.suppress(KeyboardInterrupt), CheckpointWriter(place / "OUT", overwrite=False) as writer:
        writer.begin(JOB, n_shards=3)
        writer.write_shard(1, {"a": torch.arange(6.0)})
        writer.write_shard(2, {"b": torch.arange(3, dtype=torch.uint8)}, {"linears": [{"error": 0.5}]})
        raise KeyboardInterrupt
    return place


def open_unfinished(folder: Path, _rng: random.Random) -> None:
    """What is gone on with is what was written; all else is made again."""
    with CheckpointWriter(folder / "OUT", overwrite=False) as writer:
        writer.begin(JOB, n_shards=3)
        for number, name, facts in ((1, "a", {}), (2, "b", {"linears": [{"error": 0.5}]})):
            found = writer.facts_of(number)
            if found is not None:
                stored = {"a": torch.arange(6.0), "b": torch.arange(3, dtype=torch.uint8)}
                check_model(writer.read_shard(number), {name: stored[name]})
                if found != facts:
                    raise WrongLoad(f"facts of shard {number}: {found}")
        if writer.facts_of(3) is not None:
            raise WrongLoad("a shard that was never written")


class Kind(NamedTuple):
    """A kind of input. `share`: of all inputs. `spoilt`: patterns of the files that are spoilt, by weight."""

    share: float
    make: Callable[[Path], Path]
    open: Callable[[Path, random.Random], None]
    spoilt: tuple[str, ...]


CHECKPOINT_FILES = (
    *("config.json", "manifest.json", "model.safetensors.index.json", "model-*.safetensors"),
    *("config.json", "model-*.safetensors", "generation_config.json"),
)
KINDS = {
    "float model": Kind(
        0.15,
        make_source,
        open_source,
        ("config.json", "model.safetensors", "model.safetensors", "*config.json", "tokenizer.json"),
    ),
    "GGUF": Kind(0.3, make_gguf, open_gguf, ("tiny.gguf",)),
    "checkpoint, headers": Kind(0.2, make_checkpoint, open_headers, CHECKPOINT_FILES),
    "checkpoint, from_pretrained": Kind(0.05, make_checkpoint, open_loaded, CHECKPOINT_FILES),
    "calibration artefact": Kind(0.2, make_artefact, open_artefact, ("stats.safetensors",)),
    "unfinished run": Kind(0.1, make_unfinished, open_unfinished, (".OUT.partial/*/*",)),
}


class Fuzzer:
    """Holds one good input of every kind in `folder`; `run` spoils a copy and opens it."""

    def __init__(self, folder: Path) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.places = {}
        for name, kind in KINDS.items():
            place = folder / name
            place.mkdir()
            self.places[name] = kind.make(place)

    def run(self, seed: int) -> tuple[str, str]:
        """Kind and outcome ("loaded" or the error's name) of input `seed`.

        Raises:
            BaseException: what must not happen.
        """
        rng = random.Random(seed)
        name = rng.choices(list(KINDS), [kind.share for kind in KINDS.values()])[0]
        kind, place = KINDS[name], self.places[name]
        kept = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        try:
            for _ in range(rng.choice((1, 1, 1, 2))):
                spoil(rng.choice(sorted(place.glob(rng.choice(kind.spoilt)))), rng)
            with limits():
                kind.open(place, rng)
        except AtomqError as error:
            if not str(error) or len(str(error)) > 200_000:
                raise
            return name, type(error).__name__
        finally:
            for path, content in kept.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return name, "loaded"


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """No more than SECONDS_ALLOWED, and BYTES_ALLOWED more address space than there is now."""

    def stop(_signal: int, _frame: object) -> None:
        raise TooSlow

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES_ALLOWED, old[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS_ALLOWED)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, old)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="write the record here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcomes: Counter[tuple[str, str]] = Counter()
    seconds: Counter[str] = Counter()
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        for seed in range(options.seed, options.seed + options.n):
            began = time.perf_counter()
            try:
                name, outcome = fuzzer.run(seed)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # noqa: BLE001 -- that is what is looked for
                name, outcome = "BAD", f"{type(error).__name__}"
                bad.append(seed)
                sys.stdout.write(f"seed {seed}: {''.join(traceback.format_exception(error)[-12:])}\n")
            outcomes[name, outcome] += 1
            seconds[name] += time.perf_counter() - began
    for (name, outcome), count in sorted(outcomes.items()):
        sys.stdout.write(f"{name:30} {outcome:24} {count:7}\n")
    for name, total in seconds.items():
        n = sum(count for (kind, _), count in outcomes.items() if kind == name)
        sys.stdout.write(f"{name:30} {1000 * total / n:8.1f} ms each\n")
    sys.stdout.write(f"{options.n} inputs, {len(bad)} bad {bad[:20]}\n")
    if options.save:
        record = {
            "n_inputs": options.n,
            "first_seed": options.seed,
            "outcomes": {f"{name}: {outcome}": count for (name, outcome), count in sorted(outcomes.items())},
            "bad": bad,
            "seconds": round(sum(seconds.values()), 1),
            "versions": {"torch": torch.__version__, "atomq": atomq.__version__},
        }
        options.save.write_text(json.dumps(record, indent=2) + "\n")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
