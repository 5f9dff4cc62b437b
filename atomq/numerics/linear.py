"""`QuantizedLinear`: the arithmetic of a deployed linear, in torch.

One class serves from calibration to deployment: with a float weight while Hessians are collected, with codes
after; so what was simulated is what is stored, and what is loaded computes the same. It is the oracle for
the CUDA kernels: inputs are gathered, transformed and quantized, both operands are dequantized and
multiplied in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from atomq.config import FLOAT_BITS, QuantScheme
from atomq.numerics.activations import compute_dtype, fake_quantize_activations
from atomq.numerics.groups import n_groups
from atomq.numerics.hadamard import transform_groups
from atomq.numerics.outliers import OUTLIER_DTYPES, Outliers
from atomq.numerics.packing import (
    FACTOR_BITS,
    pack_codes,
    pack_factors,
    packed_width,
    unpack_codes,
    unpack_factors,
)
from atomq.numerics.scales import stored_dtype, straight_through
from atomq.numerics.weights import QuantizedWeight, weight_grid

_SAME_SIZE_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class TensorSpec(NamedTuple):
    """What a stored tensor must look like: one of `dtypes`, and exactly `shape`."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]


def linear_specs(n_out: int, n_in: int, scheme: QuantScheme) -> dict[str, TensorSpec]:
    """The code tensors of a linear [n_out, n_in] by name, without `perm`, `bias` and float weights.

    The first dtype is the usual one. docs/format.md describes each tensor.
    """
    weights, n_outliers = scheme.weights, scheme.outliers.n_outliers
    if weights.n_bits == FLOAT_BITS:
        return {}
    n_normal = n_in - n_outliers
    groups = n_groups(n_normal, weights.group_size)
    half_or_single = (torch.float16, torch.float32)
    rows = -(-n_out // weights.channel_group)
    specs = {"qweight": TensorSpec((torch.uint8,), (n_out, packed_width(n_normal, weights.n_bits)))}
    if weights.scale_mode == "progressive":
        specs["scale_base"] = TensorSpec(half_or_single, (n_out,))
        specs["scale_factors"] = TensorSpec((torch.uint8,), (n_out, packed_width(groups, FACTOR_BITS)))
    else:
        specs["scales"] = TensorSpec(half_or_single, (rows, groups))
    if not weights.symmetric:
        specs["zeros"] = TensorSpec((torch.uint8,), (rows, groups))
    if n_outliers:
        dtype = OUTLIER_DTYPES[scheme.outliers.precision]
        specs["outlier_weight"] = TensorSpec((dtype,), (n_out, n_outliers))
        if scheme.outliers.precision == "int8":
            specs["outlier_scales"] = TensorSpec(half_or_single, (n_out,))
    return specs


class GroupInput(NamedTuple):
    """Where a linear finds what its group knows of the input: the order of its channels, and its clip ratio.

    Attributes:
        owner: the linear that holds `perm` and `clip_ratio`, or None if the linear itself does.
        gathered: whether the input is gathered by `perm` at run time; else its producer is already reordered.
    """

    owner: QuantizedLinear | None
    gathered: bool


class SharedInput:
    """What the linears of one group make of the input that all of them read: the first makes it for all.

    An input counts as the same only while it is the very same tensor, and until each of them has read it.
    """

    def __init__(self, n_readers: int) -> None:
        self.n_readers = n_readers
        self._n_left = 0
        self._pair: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, x: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``make(x)``, or what an earlier reader made of `x`."""
        if self._pair is None or self._pair[0] is not x:
            self._pair, self._n_left = (x, make(x)), self.n_readers
        made = self._pair[1]
        self._n_left -= 1
        if not self._n_left:
            self._pair = None
        return made


class QuantizedLinear(nn.Module):
    """A linear whose weight is stored in codes and whose input is quantized on the way in.

    Buffers are those of `linear_specs`, `perm` int32 [in_features] on the first linear of a reordered group,
    `clip_ratio` float32 [1] on the first of a group that has its own, and `weight` [out, in] while the
    weight is in floating point. All but `weight` keep dtype and bits under `.half()`, `.to(dtype)` and the
    like; only device moves reach them.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: QuantScheme,
        bias: nn.Parameter | None,
        group: GroupInput | None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.observer: Callable[[torch.Tensor], None] | None = None
        # Gives the dense weight while it is being learned; quantized inputs then let gradients through.
        self.learned_weight: Callable[[], torch.Tensor] | None = None
        self.shared: SharedInput | None = None  # given to the linears of a group that read one input alike
        # A tuple hides the owner from nn.Module's registry: its `perm` must appear once in the state dict.
        self._owner = () if group is None or group.owner is None else (group.owner,)
        self.is_gathered = group is not None and group.gathered
        self._clipped: tuple[torch.Tensor, int, QuantScheme] | None = None
        self._dense: torch.Tensor | None = None
        self.register_parameter("bias", bias)
        self.code_names = tuple(linear_specs(out_features, in_features, scheme))

    @property
    def device(self) -> torch.device:
        """Where the codes or the float weight lie."""
        return next(buffer.device for buffer in self._buffers.values() if buffer is not None)

    def input_order(self) -> torch.Tensor:
        """int32 [in_features]: new position -> old channel, the `perm` of the group's first linear."""
        perm = self.group_owner._buffers["perm"]
        assert perm is not None
        return perm

    @property
    def group_owner(self) -> QuantizedLinear:
        """The linear of the group that holds `perm` and `clip_ratio`, if there are any."""
        return self._owner[0] if self._owner else self

    def allocate(self, stored: Mapping[str, TensorSpec]) -> None:
        """Register empty buffers on the meta device, to be filled from a checkpoint that has such tensors."""
        for name, spec in stored.items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtypes[0], device="meta"))

    def set_perm(self, perm: torch.Tensor) -> None:
        """Make this linear the owner of the group's order."""
        self.register_buffer("perm", perm.to(torch.int32))

    def set_clip_ratio(self, ratio: float) -> None:
        """Make this linear the owner of the group's clip ratio, above 0 and at most 1."""
        self.register_buffer("clip_ratio", torch.tensor([ratio], dtype=torch.float32, device=self.device))

    def input_scheme(self) -> QuantScheme:
        """The scheme with the clip ratio that its input has, which may be its group's own.

        Such a tensor is read when it is new or was written to, since each reading makes a GPU wait.
        """
        if not self.scheme.activations.has_own_clips:
            return self.scheme
        stored = self.group_owner.get_buffer("clip_ratio")
        version = 0 if stored.is_inference() else stored._version
        if self._clipped is None or self._clipped[0] is not stored or self._clipped[1] != version:
            activations = replace(self.scheme.activations, clip_ratio=stored.item())
            self._clipped = (stored, version, replace(self.scheme, activations=activations))
        return self._clipped[2]

    def set_float_weight(self, weight: torch.Tensor) -> None:
        """Compute with the float `weight` [out, in], in the order and basis of the stored input."""
        self.register_buffer("weight", weight)
        self._dense = None

    def set_codes(self, weight: QuantizedWeight) -> None:
        """Replace the float weight by codes, packed as they are stored."""
        stored: dict[str, torch.Tensor] = {"qweight": pack_codes(weight.codes, self.scheme.weights.n_bits)}
        if weight.base is not None and weight.factors is not None:
            stored["scale_base"] = weight.base.to(stored_dtype(weight.base))
            stored["scale_factors"] = pack_factors(weight.factors)
        else:
            stored["scales"] = weight.scales.to(stored_dtype(weight.scales))
        if weight.zeros is not None:
            stored["zeros"] = weight.zeros.to(torch.uint8)
        if weight.outliers is not None:
            stored["outlier_weight"] = weight.outliers.values
            if weight.outliers.scales is not None:
                stored["outlier_scales"] = weight.outliers.scales.to(stored_dtype(weight.outliers.scales))
        self.set_stored(stored)

    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors of `linear_specs` that are there: all or, with a float weight, none."""
        tensors = ((name, self._buffers.get(name)) for name in self.code_names)
        return {name: tensor for name, tensor in tensors if tensor is not None}

    def set_stored(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace the float weight by codes in the form that `stored` answers."""
        self._buffers.pop("weight", None)
        self._dense = None
        for name in self.code_names:
            self.register_buffer(name, tensors[name].contiguous())

    def quantized_weight(self) -> QuantizedWeight:
        """The stored codes, unpacked."""
        buffers: dict[str, Any] = dict(self._buffers)
        weights, n_normal = self.scheme.weights, self.in_features - self.scheme.outliers.n_outliers
        codes = unpack_codes(buffers["qweight"], weights.n_bits, n_normal, weight_grid(weights).signed)
        base, factors = None, None
        if weights.scale_mode == "progressive":
            base = buffers["scale_base"].float()
            factors = unpack_factors(buffers["scale_factors"], n_groups(n_normal, weights.group_size))
            scales = base.unsqueeze(-1) * factors.float()
        else:
            scales = buffers["scales"].float()
        outliers = None
        if "outlier_weight" in buffers:
            outliers = Outliers(buffers["outlier_weight"], buffers.get("outlier_scales"))
        return QuantizedWeight(codes, scales, buffers.get("zeros"), outliers, base, factors)

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] that the codes stand for, in the stored order and basis; kept for the next
        call.
        """
        if self._dense is None or self._dense.dtype != dtype:
            weight = self._buffers.get("weight")
            if weight is not None:
                return weight.to(dtype)
            with torch.inference_mode(False), torch.no_grad():  # it is kept for calls in any mode
                self._dense = self.quantized_weight().dequantize(self.scheme.weights, dtype)
        return self._dense

    def order_input(self, x: torch.Tensor) -> torch.Tensor:
        """An input [..., in_features] as the codes see it: gathered, in the compute dtype, transformed."""
        return self._as_coded(x, gathered=self.is_gathered)

    def order_channels(self, x: torch.Tensor) -> torch.Tensor:
        """What `order_input` makes of an input [..., in_features] of the float model, whoever reorders it."""
        return self._as_coded(x, gathered=self.scheme.outliers.reorder)

    def _as_coded(self, x: torch.Tensor, *, gathered: bool) -> torch.Tensor:
        if gathered:
            x = x.index_select(-1, self.input_order())
        x = x.to(compute_dtype(x.dtype))
        return transform_input(x, self.scheme) if self.scheme.transform == "hadamard" else x

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """What the multiplication sees of an input [..., in_features]: ordered and fake-quantized."""
        ordered, scheme = self.order_input(x), self.input_scheme()
        if scheme.activations.n_bits == FLOAT_BITS:
            return ordered
        n_outliers = scheme.outliers.n_outliers
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.learned_weight is None):
            quantized = fake_quantize_activations(
                ordered, scheme.activations, n_outliers, scheme.outliers.precision
            )
        return quantized if self.learned_weight is None else straight_through(ordered, quantized)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.shared is None or torch.is_grad_enabled():
            quantized = self.quantize_input(x)
        else:
            quantized = self.shared.of(x, self.quantize_input)
        if self.observer is not None:
            self.observer(quantized)
        bias = None if self.bias is None else self.bias.to(quantized.dtype)
        learned = self.learned_weight
        weight = self.dense_weight(quantized.dtype) if learned is None else learned()
        return F.linear(quantized, weight, bias).to(x.dtype)

    def extra_repr(self) -> str:
        weights, activations = self.scheme.weights.n_bits, self.scheme.activations.n_bits
        return (
            f"{self.in_features}, {self.out_features}, W{weights}A{activations}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLinear:
        """nn.Module's hook behind `.half()`, `.to()` and `.cuda()`: shown integers, a dtype cast leaves bits
        alone.
        """
        self._dense = None
        names = (*self.code_names, "clip_ratio")
        exact = {name: self._buffers[name] for name in names if self._buffers.get(name) is not None}
        for name, tensor in exact.items():
            if tensor is not None:
                self._buffers[name] = tensor.view(_SAME_SIZE_INTEGER[tensor.element_size()])
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in exact.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None:
                self._buffers[name] = moved.view(tensor.dtype)
        return self


def transform_input(x: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """Turn the groups of the normal channels of `x` [..., K] (inputs or weight rows); outliers stay."""
    n_normal = x.shape[-1] - scheme.outliers.n_outliers
    group_size = scheme.activations.group_size
    return torch.cat((transform_groups(x[..., :n_normal], group_size), x[..., n_normal:]), dim=-1)
