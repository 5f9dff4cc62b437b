"""`atomq generate`: continue a prompt with a checkpoint."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from atomq.commands import console
from atomq.commands.opening import choose_backend
from atomq.commands.options import BackendOption, CheckpointArgument, DeviceOption, JsonOption
from atomq.errors import ConfigError

HELP = "Continue a prompt with a checkpoint."


def command(
    checkpoint: CheckpointArgument,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens.")] = 64,
    chat: Annotated[
        bool, typer.Option("--chat", help="Take the prompt as a user's turn in the chat template.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    no_check: Annotated[bool, typer.Option("--no-check", help="Skip the SHA-256 check.")] = False,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    backend: BackendOption = "simulation",
    json_output: JsonOption = False,
) -> None:
    if max_new_tokens < 1 or not 0 <= temperature < float("inf") or not prompt:
        raise ConfigError("give a prompt, --max-new-tokens of at least 1 and a --temperature of at least 0")
    import torch

    from atomq import checkpoints, hf
    from atomq.pipeline import choose_device

    console.silence_libraries()
    place = choose_device(device)
    model = hf.load(checkpoint, device=str(place), dtype=dtype, check_hashes=not no_check)
    choose_backend(model, backend)
    tokenizer = checkpoints.load_checkpoint_tokenizer(checkpoint)
    if chat and not tokenizer.chat_template:
        raise ConfigError(f"{checkpoint.name} has no chat template; leave --chat away")
    inputs: Any
    if chat:
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: inputs[name].to(place) for name in ("input_ids", "attention_mask")}
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    torch.manual_seed(seed)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)[0]  # type: ignore[operator]
    n_prompt = inputs["input_ids"].shape[1]
    text = str(tokenizer.decode(ids[n_prompt:], skip_special_tokens=True))
    if json_output:
        console.print_json({"prompt": prompt, "text": text, "n_new_tokens": len(ids) - n_prompt})
    else:
        console.print_line(text if chat else prompt + text)
