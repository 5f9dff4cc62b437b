"""`atomq generate`: continue prompts with a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atomq.commands import console
from atomq.commands.loading import loading
from atomq.commands.opening import choose_backend
from atomq.commands.options import CheckpointArgument, DeviceOption, JsonOption
from atomq.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from atomq.runtime.generate import OnToken, Sampling

HELP = "Continue one or more prompts with a checkpoint."
_UNFINISHED = "\ufffd"  # what a tokenizer shows of a character whose bytes are not all there yet


def command(
    checkpoint: CheckpointArgument,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="The texts to continue, as one batch.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="One prompt per line, after PROMPT.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens.")] = 64,
    chat: Annotated[
        bool, typer.Option("--chat", help="Take each prompt as a user's turn in the chat template.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among this many tokens only.")] = None,
    top_p: Annotated[
        float, typer.Option(help="Sample among the fewest tokens of this probability together.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End where this text appears; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    no_check: Annotated[bool, typer.Option("--no-check", help="Skip the SHA-256 check.")] = False,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    backend: Annotated[
        str,
        typer.Option(help="simulation, or kernels: decode by the GPU's kernels, each step a CUDA graph."),
    ] = "simulation",
    json_output: JsonOption = False,
) -> None:
    texts = [*(prompts or []), *_read_prompts(prompt_file)]
    if not texts or not all(texts):
        raise ConfigError("give a prompt that is not empty, as an argument or a line of --prompts FILE")
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {max_new_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"--temperature {temperature:g} must be a finite number of at least 0 (greedy)")
    if backend not in ("simulation", "kernels"):
        raise ConfigError(f"--backend {backend} is not one of simulation, kernels")
    if not all(stop or []):
        raise ConfigError("--stop takes a text that is not empty")
    with loading():
        from atomq import checkpoints, hf
        from atomq.pipeline import choose_device
        from atomq.runtime.generate import Sampling

    console.silence_libraries()
    place = choose_device(device)
    model = hf.load(checkpoint, device=str(place), dtype=dtype, check_hashes=not no_check)
    tokenizer = checkpoints.load_checkpoint_tokenizer(checkpoint)
    if chat and not tokenizer.chat_template:
        raise ConfigError(f"{checkpoint.name} has no chat template; leave --chat away")
    ids = [_encode(tokenizer, text, chat) for text in texts]
    ends = model.generation_config.eos_token_id if model.generation_config else None
    stop_tokens = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, stop_tokens)
    longest = max(map(len, ids)) + max_new_tokens
    generate = _generator(model, backend, longest, hf.runtime_dtype(dtype))
    del model
    streams = len(texts) == 1 and not json_output
    continuations = [_Continuation(tokenizer, stop or [], streams) for _ in texts]
    if streams and not chat:
        console.print_piece(texts[0])
    start = time.perf_counter()
    results = generate(ids, sampling, lambda prompt, token: continuations[prompt].add(token))
    seconds = time.perf_counter() - start
    records: list[dict[str, Any]] = [
        {"prompt": text, "text": continuation.finish(), "n_new_tokens": len(tokens)}
        for text, continuation, tokens in zip(texts, continuations, results, strict=True)
    ]
    if json_output:
        only = records[0] if len(records) == 1 else {"generations": records}
        console.print_json({**only, "backend": backend, "seconds": seconds})
    elif streams:
        console.print_line("")
    else:
        for record in records:
            console.print_line(record["text"] if chat else record["prompt"] + record["text"])
            console.print_line("")


class _Continuation:
    """The text of one prompt's new tokens: shown as far as it is certain, cut where a stop text begins."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[str], streams: bool) -> None:
        self.tokenizer, self.stops, self.streams = tokenizer, stops, streams
        self.tokens: list[int] = []
        self.text, self.n_shown = "", 0

    def add(self, token: int) -> bool:
        """Answers whether to go on."""
        self.tokens.append(token)
        self.text = str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))
        found = [at for stop in self.stops if (at := self.text.find(stop)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            return False
        if self.streams and not self.text.endswith(_UNFINISHED):
            self._show(max(0, len(self.text) - max((len(stop) - 1 for stop in self.stops), default=0)))
        return True

    def finish(self) -> str:
        """All of the text; what was held back is shown."""
        if self.streams:
            self._show(len(self.text))
        return self.text

    def _show(self, end: int) -> None:
        if end > self.n_shown:
            console.print_piece(self.text[self.n_shown : end])
            self.n_shown = end


def _generator(
    model: PreTrainedModel, backend: str, longest: int, dtype: Any
) -> Callable[[list[list[int]], Sampling, OnToken], list[list[int]]]:
    """What continues prompts of up to `longest` tokens in all: a decoder of kernels, or the model itself.

    Where the kernels' runtime does not take a model, the kernels compute its linears inside transformers.
    """
    from atomq.kernels.kv_pages import PAGE_TOKENS
    from atomq.runtime.generate import generate, simulate
    from atomq.runtime.loading import decoder_of, runtime_problem

    n_positions = max(longest, PAGE_TOKENS)
    if backend == "kernels":
        problem = runtime_problem(model, n_positions)
        if problem is None:
            if model.device.type != "cuda":
                console.warn(["no GPU here: the kernels' twins in torch compute, which are slow"])
            decoder = decoder_of(model, n_positions, dtype)
            return lambda *arguments: generate(decoder, *arguments)
        console.warn([f"only the linears run on the kernels, one prompt after the other: {problem}"])
        choose_backend(model, backend)
    return lambda *arguments: simulate(model, *arguments)


def _read_prompts(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(
            f"--prompts {path} is not UTF-8: byte {byte:#04x} at offset {error.start}; save it as UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(f"--prompts {path} cannot be read: {error.strerror or error}") from error


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(text)["input_ids"])
    turns = [{"role": "user", "content": text}]
    encoded: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])
