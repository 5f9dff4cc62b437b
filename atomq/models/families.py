"""Model families as data: which linears read the same activation, and where its order is absorbed.

One table entry per family; adding a family is a new entry and a tiny-model test, never a subclass.
The table follows section 4.1 of Atom (arXiv 2310.19102): q/k/v share one input order, gate/up share one,
and the order of down_proj's input is absorbed by the rows of gate_proj and up_proj.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from atomq.errors import UnsupportedModelError


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one block that read the same activation; they share one `perm` and one Hessian.

    Attributes:
        linears: names relative to the block, in the order of computation. The first one owns the
            group's tensors on disk. A "*" stands for every expert: each has a group of its own.
        absorbed_by: linears of the same block whose output rows are stored in this group's order, so
            that the activation arrives reordered; empty if the order is gathered at run time. A fused
            linear (gate over up) has the order in each of its parts.
        transformed: whether the scheme's in-group transform applies to this group.
    """

    linears: tuple[str, ...]
    absorbed_by: tuple[str, ...] = ()
    transformed: bool = True

    @property
    def owner(self) -> str:
        return self.linears[0]

    @property
    def routed(self) -> bool:
        """Whether a router chooses the tokens that these linears see."""
        return any(part == "*" or part.isdigit() for part in self.owner.split("."))

    def of_expert(self, index: int) -> LinearGroup:
        """The group of one expert, of a group of all of them."""

        def named(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(name.replace(".*.", f".{index}.") for name in names)

        return LinearGroup(named(self.linears), named(self.absorbed_by), self.transformed)


@dataclass(frozen=True)
class ModelFamily:
    """Where atomq finds things in a model of one family (dotted paths from the model's root).

    Attributes:
        model_type: `model_type` of config.json.
        groups: the linear groups of a block, in the order of computation.
        key: the module whose output is K before RoPE (after the k norm, if the family has one).
        value: the module whose output is V. If it is the `key` too, the output holds the heads of Q, K
            and V one after another.
    """

    model_type: str
    groups: tuple[LinearGroup, ...]
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    embeddings: str = "model.embed_tokens"
    lm_head: str = "lm_head"

    @property
    def has_keys_by_head(self) -> bool:
        """Whether `key` puts out [batch, n_heads, tokens, head_dim], not tokens before heads: Gemma 3 norms K
        after the transpose.
        """
        return self.model_type == "gemma3_text"

    @property
    def has_experts(self) -> bool:
        return any(group.routed for group in self.groups)

    def owns_group(self, name: str) -> bool:
        """Whether the linear of the full `name` is the first of a group."""
        relative = name.removeprefix(f"{self.blocks}.").partition(".")[2]
        return re.sub(r"\.\d+\.", ".*.", relative) in {group.owner for group in self.groups}


@dataclass(frozen=True)
class Residual:
    """How a block reads and writes the residual stream, where a rotation of it can go into the weights.

    Attributes:
        readers: RMSNorms of the block, each with all linears that read its output.
        writers: linears whose output is added to the stream; the first reads what attention makes of V.
        norm_offset: the norms multiply by this + their weight.
    """

    readers: tuple[tuple[str, tuple[str, ...]], ...]
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    norm_offset: float = 0.0


@dataclass(frozen=True)
class LinearShape:
    """A linear of the unquantized model: [n_out, n_in], with or without bias."""

    n_out: int
    n_in: int
    has_bias: bool


_LLAMA_GROUPS = (
    LinearGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    LinearGroup(("self_attn.o_proj",)),
    LinearGroup(("mlp.gate_proj", "mlp.up_proj")),
    LinearGroup(("mlp.down_proj",), absorbed_by=("mlp.gate_proj", "mlp.up_proj")),
)

_PHI3_GROUPS = (
    LinearGroup(("self_attn.qkv_proj",)),
    LinearGroup(("self_attn.o_proj",)),
    LinearGroup(("mlp.gate_up_proj",)),
    LinearGroup(("mlp.down_proj",), absorbed_by=("mlp.gate_up_proj",)),
)
_STARCODER2_GROUPS = (
    LinearGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    LinearGroup(("self_attn.o_proj",)),
    LinearGroup(("mlp.c_fc",)),
    LinearGroup(("mlp.c_proj",), absorbed_by=("mlp.c_fc",)),
)
_OPT_GROUPS = (
    LinearGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    LinearGroup(("self_attn.out_proj",)),
    LinearGroup(("fc1",)),
    LinearGroup(("fc2",), absorbed_by=("fc1",)),
)

_ATTENTION_GROUPS = _LLAMA_GROUPS[:2]
_EXPERT_GROUPS = (
    LinearGroup(("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")),
    LinearGroup(
        ("mlp.experts.*.down_proj",), absorbed_by=("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
    ),
)
_SHARED_EXPERT_GROUPS = (
    LinearGroup(("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")),
    LinearGroup(
        ("mlp.shared_expert.down_proj",),
        absorbed_by=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    ),
)

# What files call modules that transformers calls otherwise: (pattern, its replacement) by family.
STORED_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "mixtral": (
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"(\.experts\.\d+)\.w1\.", r"\1.gate_proj."),
        (r"(\.experts\.\d+)\.w2\.", r"\1.down_proj."),
        (r"(\.experts\.\d+)\.w3\.", r"\1.up_proj."),
    )
}

# The way back, for files that other tools are to read.
PUBLISHED_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "mixtral": (
        (r"\.mlp\.", ".block_sparse_moe."),
        (r"(\.experts\.\d+)\.gate_proj\.", r"\1.w1."),
        (r"(\.experts\.\d+)\.down_proj\.", r"\1.w2."),
        (r"(\.experts\.\d+)\.up_proj\.", r"\1.w3."),
    )
}

FAMILIES: dict[str, ModelFamily] = {
    family.model_type: family
    for family in (
        ModelFamily("llama", _LLAMA_GROUPS),
        ModelFamily("mistral", _LLAMA_GROUPS),
        ModelFamily("qwen2", _LLAMA_GROUPS),
        ModelFamily("qwen3", _LLAMA_GROUPS, key="self_attn.k_norm"),
        ModelFamily("gemma", _LLAMA_GROUPS),
        ModelFamily("gemma2", _LLAMA_GROUPS),
        ModelFamily("gemma3_text", _LLAMA_GROUPS, key="self_attn.k_norm"),
        ModelFamily("granite", _LLAMA_GROUPS),
        ModelFamily("olmo2", _LLAMA_GROUPS, key="self_attn.k_norm"),
        ModelFamily("smollm3", _LLAMA_GROUPS),
        ModelFamily("phi3", _PHI3_GROUPS, key="self_attn.qkv_proj", value="self_attn.qkv_proj"),
        ModelFamily("starcoder2", _STARCODER2_GROUPS),
        ModelFamily("mixtral", _ATTENTION_GROUPS + _EXPERT_GROUPS),
        ModelFamily("qwen2_moe", _LLAMA_GROUPS + _SHARED_EXPERT_GROUPS + _EXPERT_GROUPS),
        ModelFamily("qwen3_moe", _LLAMA_GROUPS + _EXPERT_GROUPS, key="self_attn.k_norm"),
        ModelFamily(
            "opt",
            _OPT_GROUPS,
            blocks="model.decoder.layers",
            final_norm="model.decoder.final_layer_norm",
            embeddings="model.decoder.embed_tokens",
        ),
    )
}

_LLAMA_RESIDUAL = Residual(
    (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    )
)
_PHI3_RESIDUAL = Residual(
    (
        ("input_layernorm", ("self_attn.qkv_proj",)),
        ("post_attention_layernorm", ("mlp.gate_up_proj",)),
    )
)

# By model_type; the other families have norms elsewhere, norms with a mean, or routers.
RESIDUALS: dict[str, Residual] = {
    "llama": _LLAMA_RESIDUAL,
    "mistral": _LLAMA_RESIDUAL,
    "qwen2": _LLAMA_RESIDUAL,
    "qwen3": _LLAMA_RESIDUAL,
    "gemma": replace(_LLAMA_RESIDUAL, norm_offset=1.0),
    "granite": _LLAMA_RESIDUAL,
    "smollm3": _LLAMA_RESIDUAL,
    "phi3": _PHI3_RESIDUAL,
}


def find_family(model_type: str) -> ModelFamily:
    """Return the table entry of `model_type`.

    Raises:
        UnsupportedModelError: the family is not in the table; the message lists those that are.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not a family that atomq knows; it knows {known}"
        ) from None
