"""The ladder of `atomq ablate`: from plain rounding to the presets, one change at a time.

First the steps of the Atom paper (arXiv 2310.19102, section 5.4), then the levers of atomq, which start from
the paper's recipe before its KV cache is quantized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atomq.config import Recipe, override
from atomq.errors import ConfigError
from atomq.presets import PRESETS, REFINE_STEPS

REFINED = "atomq-refined"  # left out unless it is asked for: it takes longer than all the others


@dataclass(frozen=True)
class Rung:
    """One step of the ladder.

    Attributes:
        name: what `--only` takes.
        text: what tables show.
        below: the rung that it stands on; None for the first.
        changes: the settings in which its recipe differs from that rung's, as `override` takes them.
    """

    name: str
    text: str
    below: str | None
    changes: dict[str, Any]

    @property
    def recipe(self) -> Recipe:
        return override(PRESETS["atom"] if self.below is None else rung(self.below).recipe, self.changes)


_ROUNDED = {  # `atom` without all that the steps above add
    "weights.group_size": None,
    "weights.channel_group": 1,
    "activations.group_size": None,
    "activations.clip_ratio": 1.0,
    "outliers.n_outliers": 0,
    "outliers.reorder": False,
    "kv.n_bits": 16,
    "solver.method": "rtn",
    "solver.clip_ratio": 1.0,
    "solver.scale_span": "full",
}
_FP16_OUTLIERS = {"outliers.n_outliers": 128, "outliers.reorder": True, "outliers.precision": "fp16"}
_GROUPS = {"weights.group_size": 128, "weights.channel_group": 2, "activations.group_size": 128}
_CLIPPING = {"solver.clip_ratio": 0.85, "solver.scale_span": "half", "activations.clip_ratio": 0.9}
_CLIP_SEARCH = {"solver.clip_search": "hessian", "solver.clip_ratio": 1.0, "solver.scale_span": "full"}
_ASYMMETRY = {"solver.asymmetry": 0.5, "solver.asymmetry_damp": 1.0}
_PROGRESSIVE = {
    "weights.scale_mode": "progressive",
    "weights.channel_group": 1,
    "activations.scale_mode": "progressive",
}
_KEY_BALANCE = {"kv.key_position": "after_rope", "kv.key_balance": True}

LADDER: tuple[Rung, ...] = (
    Rung("rtn", "RTN, scale per row and token", None, _ROUNDED),
    Rung("outliers-fp16", "+ 128 outliers in FP16", "rtn", _FP16_OUTLIERS),
    Rung("outliers-int8", "outliers in INT8", "outliers-fp16", {"outliers.precision": "int8"}),
    Rung("groups", "+ groups of 128", "outliers-int8", _GROUPS),
    Rung("clipping", "+ clipping", "groups", _CLIPPING),
    Rung("gptq", "+ GPTQ = atom KV16", "clipping", {"solver.method": "gptq"}),
    Rung("kv4", "+ KV4 = atom", "gptq", {"kv.n_bits": 4}),
    Rung("hadamard", "atom KV16 + group Hadamard", "gptq", {"transform": "hadamard"}),
    Rung("clip-search", "+ Hessian clip search", "hadamard", _CLIP_SEARCH),
    Rung("asymmetry", "+ asymmetry", "clip-search", _ASYMMETRY),
    Rung("descent", "+ coordinate descent = atomq KV16", "asymmetry", {"solver.descent_sweeps": 4}),
    Rung("plain-kv4", "+ KV4", "descent", {"kv.n_bits": 4}),
    Rung("kv-hadamard", "+ Hadamard on K and V", "plain-kv4", {"kv.rotation": "hadamard"}),
    Rung("key-balance", "+ balance of K after RoPE = atomq", "kv-hadamard", _KEY_BALANCE),
    Rung(REFINED, "+ refinement", "key-balance", {"solver.refine_steps": REFINE_STEPS}),
    Rung("atomq-fast", "atomq-fast", "key-balance", _PROGRESSIVE),
)


def rung(name: str) -> Rung:
    """The rung of that name.

    Raises:
        ConfigError: there is none; the message lists those that are.
    """
    for known in LADDER:
        if known.name == name:
            return known
    raise ConfigError(f"there is no rung {name!r}; rungs are {', '.join(r.name for r in LADDER)}")


def choose_rungs(only: Sequence[str], refine: bool) -> list[Rung]:
    """The rungs named in `only`, or all of them; the refined one where it is named or `refine` is set.

    Raises:
        ConfigError: a name that no rung has.
    """
    names = {rung(name).name for name in only} or {r.name for r in LADDER} - {REFINED}
    return [r for r in LADDER if r.name in names or (refine and r.name == REFINED)]
