"""What `bench-gemm` can time: one small interface for atomq's kernels and for the peers beside them.

Another package adds a peer by an entry point of the group "atomq.gemm_peers" that names a `Candidate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol

from atomq.errors import KernelError
from atomq.eval.gemm_timing import Launch

ENTRY_POINTS = "atomq.gemm_peers"


@dataclass(frozen=True)
class Work:
    """One candidate's product of a number of tokens with a weight, ready to be timed.

    Attributes:
        launches: the product with activations as the kernel wants them, once for each copy of the weight.
        whole: the same from float16 activations, which it quantizes first; None where there is nothing to
            quantize.
        moved_bytes: each operand and the output once.
        operand_bits: of the tensor cores' operands: 16, or 8 for INT8, INT4 unpacked to it, and FP8.
        error: relative Frobenius distance from the exact product, None if not compared.
    """

    launches: Sequence[Launch]
    whole: Sequence[Launch] | None
    moved_bytes: float
    operand_bits: int
    error: float | None


class Prepared(Protocol):
    """A candidate with a weight of one shape."""

    def work(self, n_tokens: int) -> Work | None:
        """Operands made and everything compiled; None if it does not take so many tokens.

        Raises:
            KernelError: it cannot do this product; a peer is left out then, with the reason.
        """


class Candidate(Protocol):
    """A kernel of atomq, or somebody else's."""

    @property
    def name(self) -> str:
        """As in the table."""

    @property
    def is_peer(self) -> bool:
        """Whether it is somebody else's."""

    def problem(self) -> str:
        """Why it cannot run here, as a sentence that says what to do; "" if it can."""

    def prepare(self, n_channels: int, n_inputs: int, max_tokens: int) -> Prepared:
        """Make weights [n_channels, n_inputs], enough copies to leave the L2 cache behind.

        Raises:
            KernelError: as in `Prepared.work`.
        """


def plugged_in() -> list[Candidate]:
    """The candidates of other packages.

    Raises:
        KernelError: an entry point does not load.
    """
    found: list[Candidate] = []
    for point in entry_points(group=ENTRY_POINTS):
        try:
            candidate: Any = point.load()
        except (ImportError, AttributeError) as error:
            raise KernelError(
                f"the GEMM peer {point.name} of {point.value} does not load: {error}"
            ) from error
        found.append(candidate)
    return found
