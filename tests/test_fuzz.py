"""Two thousand spoilt inputs: each is refused by a typed error, or loaded as what it says."""

from __future__ import annotations

import contextlib
import time
from collections import Counter

import fuzz
import pytest
from fuzz import KINDS, Fuzzer, WrongLoad
from safetensors.torch import load_file, save_file

from atomq.errors import UnsupportedModelError

N_INPUTS, SECONDS = 2000, 60


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory) -> Fuzzer:
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


def test_every_spoilt_input_is_refused_or_loaded_as_what_it_says(fuzzer):
    outcomes: Counter[tuple[str, str]] = Counter()
    began = time.process_time()
    for seed in range(N_INPUTS):
        try:
            outcomes[fuzzer.run(seed)] += 1
        except BaseException as error:
            raise AssertionError(f"input {seed} (fuzz.Fuzzer.run): {error!r}") from error
    assert time.process_time() - began < SECONDS
    for name in KINDS:  # both happen, or the inputs would not reach far
        assert outcomes[name, "loaded"] > 0
        assert sum(n for (kind, outcome), n in outcomes.items() if kind == name and outcome != "loaded") > 5


def test_the_same_seed_gives_the_same_outcome(fuzzer):
    assert [fuzzer.run(seed) for seed in range(40)] == [fuzzer.run(seed) for seed in range(40)]


@pytest.mark.parametrize("trouble", [ZeroDivisionError, MemoryError, RecursionError, SystemExit])
def test_an_error_that_is_not_typed_would_be_noticed(fuzzer, monkeypatch, trouble):
    def fail(_folder, _rng):
        raise trouble

    monkeypatch.setattr(fuzz, "KINDS", {"GGUF": KINDS["GGUF"]._replace(open=fail)})
    with pytest.raises(trouble):
        fuzzer.run(0)


def test_a_hang_would_be_noticed(fuzzer, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS_ALLOWED", 0.2)
    monkeypatch.setattr(fuzz, "KINDS", {"GGUF": KINDS["GGUF"]._replace(open=lambda *_: time.sleep(30))})
    with pytest.raises(fuzz.TooSlow):
        fuzzer.run(0)


def test_memory_beyond_the_limit_would_be_noticed(fuzzer, monkeypatch):
    monkeypatch.setattr(fuzz, "KINDS", {"GGUF": KINDS["GGUF"]._replace(open=lambda *_: bytearray(1 << 33))})
    with pytest.raises(MemoryError):
        fuzzer.run(0)


def test_a_wrong_load_would_be_noticed(fuzzer, monkeypatch):
    """One number in the file that is not the one in the model."""
    folder = fuzzer.places["float model"]
    path = folder / "model.safetensors"
    kept = path.read_bytes()
    read = fuzz.load_float_model

    def read_and_change(source):
        model = read(source)
        tensors = load_file(path)
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, path, {"format": "pt"})
        return model

    monkeypatch.setattr(fuzz, "load_float_model", read_and_change)
    try:
        with pytest.raises(WrongLoad, match=r"model\.norm\.weight is not what the file says"):
            fuzz.open_source(folder, fuzz.random.Random(1))
    finally:
        path.write_bytes(kept)
    with contextlib.suppress(UnsupportedModelError):
        fuzzer.run(0)
