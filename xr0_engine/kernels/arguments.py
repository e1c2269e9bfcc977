"""What the fused ops take besides tensors. No triton here: the oracle (fused_reference.py) takes the same.

Shape legend: B batch, M rows of each, K columns in, N columns out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

STATS_COLUMNS = 64
"""One partial sum of a row covers so many columns: whoever writes them adds them up alone, in one fixed order."""
SLOT_WIDTHS = (STATS_COLUMNS, 32, 16)
"""Where narrower tiles write a row, it covers fewer."""

SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Compute capability -> bytes of shared memory that one block may use."""


@dataclass(frozen=True)
class Weight:
    """A linear layer's weight. data: (N, K), K contiguous; 8-bit data come with scale, (N,) float32 per output.

    factor: the model's dtype, to which float32 rows of 8-bit data are rounded; other weights' are rounded to theirs.
    """

    data: Tensor
    scale: Tensor | None = None
    factor: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class InputNorm:
    """Normalisation of a product's input rows, applied to the output rows instead: nothing waits for whole rows.

    Where the product is rounded to float16 before that, or one of its factors is, it comes first: what would overflow
    there need not overflow once normalised.
    The norm's own weight is folded into the product's weight or column scale, its bias into the product's bias.
    sums: (slots, B, M, 2) float32, partial sums of each row of the input, as StatsOut describes.
    kind: rms: x / rms(x). layer: (x - mean(x)) / std(x), of centred sums; needs column_sums, (N,) float32, the sum of
    each row of the folded weight. double_rms: rms norm with a weight, then rms norm, of weighted sums.
    A layer norm's mean is taken off the product, whose float32 rounding it leaves: up to 2^-17 |mean(x)| / std(x) of
    the result, which is less than bfloat16 makes of the normalised row up to a ratio of 256, float16 up to 64.
    """

    sums: Tensor
    eps: float
    kind: Literal["rms", "layer", "double_rms"] = "rms"
    column_sums: Tensor | None = None


@dataclass(frozen=True)
class Residual:
    """out = base + gate * product + extra, with base = x, or rms_norm(x) * weight where sums are given.

    x: (B, M, N). gate: (N,) float32, or None = 1. sums: (slots, B, M, 2) float32 of x, weight: (N,) float32.
    extra: (rows, N), added where extra_index (B, M) int32 names one of its rows; -1 names none.
    """

    x: Tensor
    gate: Tensor | None = None
    sums: Tensor | None = None
    weight: Tensor | None = None
    eps: float = 0.0
    extra: Tensor | None = None
    extra_index: Tensor | None = None


@dataclass(frozen=True)
class StatsOut:
    """Where to put partial sums of the rows written, taken in float32 of what stands in out: of rounded values.

    sums: (slots, B, M, 2) float32. A slot is of STATS_COLUMNS columns, or of 32 or 16, for narrower tiles: how many
    there are says which (slot_columns). [..., 0] of x * x. [..., 1] of (weight * x) ** 2 where a weight (N,) float32 is
    given, else it is left alone.
    centred, without a weight: [..., 0] of (x - m) ** 2, m the mean of the slot's own columns, and [..., 1] of x: from
    them a row's variance comes without a difference of large numbers, however far from zero its mean is.
    """

    sums: Tensor
    weight: Tensor | None = None
    centred: bool = False


STREAMED_ROWS = 16, 32
"""Of a streamed flow loop (streamed.py), padding included: a thread holds a warp's part of no more."""


def streamed_rows(rows: int) -> int | None:
    """To how many so many rows are padded in a streamed loop, None: it is for fewer."""
    return next((height for height in STREAMED_ROWS if rows <= height), None)


def slot_columns(name: str, sums: Tensor, columns: int) -> int:
    """How many of so many columns each slot of sums, (slots, B, M, 2), covers. Raises ValueError for no such width."""
    for width in SLOT_WIDTHS:
        if -(-columns // width) == sums.shape[0]:
            return width
    slots = ", ".join(str(-(-columns // width)) for width in SLOT_WIDTHS)
    raise ValueError(f"{name}: expected {slots} slots for {columns} columns, got {sums.shape[0]}")


Schedule = Literal["tiled", "stream", "whole", "tma", "swapped", "warpgroups"]
"""tiled: a program computes one tile of rows and columns, over one of split_k parts of K (product.py). stream: tiles
of up to block_m rows in pieces of mixed heights, shared out evenly over split_k programs, or each its own where that is
1 (wide.py). whole: its warps share out K, its weight is loaded before the wait (whole.py); of lambda_attention, they
share out the keys. tma: tiles come by TMA; whole ones in waves of split_k programs, the last of which shares out what
is left (bulk.py). swapped: the weight's rows are the MMA's, those of x its columns; warpgroups: the same where
warpgroups multiply what TMA brings (swapped.py)."""


TMA_FROM = 90
"""Compute capability from which tiles of a tensor are copied by a unit of their own (TMA), as a descriptor has them."""
WARPGROUPS_ON = 90
"""Compute capability of the chips whose warps multiply in groups of four, sums in their registers (wgmma)."""


def schedule_runs(schedule: Schedule, arch: int) -> bool:
    """Whether a chip has what a schedule is made of."""
    return {"tma": arch >= TMA_FROM, "warpgroups": arch == WARPGROUPS_ON}.get(schedule, True)


@dataclass(frozen=True)
class Tactic:
    """How one kernel runs.

    schedule: of a product's tiles, as Schedule has them. library: the product by torch (cuBLASLt), what surrounds it by
    one kernel of ours; attention by torch alone. flash: with library, attention by the package flash-attn instead.
    """

    block_m: int = 32
    block_n: int = 64
    block_k: int = 64
    split_k: int = 1
    warps: int = 4
    stages: int = 3
    library: bool = False
    flash: bool = False
    schedule: Schedule = "tiled"


def heads_of_tile(tactic: Tactic, dim: int) -> int:
    """How many heads of queries, keys and values a tile of swapped.py has: as block_n asks, one or two."""
    return max(1, min(2, tactic.block_n // dim))


IDLE = 8
"""Where as many programs for each tile would leave more than this part of them without any, tiles are cut anywhere."""


def sharers_of(shared: int, programs: int, blocks: int) -> tuple[int, int]:
    """How many of the programs share out the tiles of swapped.py that are cut, of blocks of K each, and how many of
    them a tile has at most; 1: none is cut, and some programs have a whole one more than others."""
    if not shared or blocks == 1:
        return 0, 1
    each = min(programs // shared, blocks)
    if each > 1 and IDLE * (programs - shared * each) <= programs:
        return shared * each, each
    sharers = min(programs, shared * blocks)
    runs = [
        (program * shared * blocks // sharers, (program + 1) * shared * blocks // sharers) for program in range(sharers)
    ]
    held = [tile for first, last in runs for tile in range(first // blocks, (last - 1) // blocks + 1)]
    return sharers, max(held.count(tile) for tile in range(shared))


def end_passes(height: int, warps: int, unit: int, parts: int) -> int:
    """Of a tile of swapped.py that is cut into parts: how many passes over its height rows, each of all
    threads with eight of unit columns, are finished together. As many as cost nobody a row more."""
    rows, most = 256 * warps // unit, 64

    def ended(passes: int) -> int:
        return -(-height // (rows * passes) // parts) * rows * passes

    possible = [passes for passes in (1, 2, 4) if passes == 1 or passes * parts * 8 <= most]
    return max(possible, key=lambda passes: (-ended(passes), passes))


@dataclass(frozen=True)
class Segments:
    """Rows of one sequence in segments, which attention does not cross: images of any sizes behind each other.

    bounds: (S, 2) int32 on the device, each segment's first row and one past its last; spans: the same on the host. The
    longest comes first, so that what takes longest starts first.
    """

    bounds: Tensor
    spans: tuple[tuple[int, int], ...]

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device) -> Segments:
        """Of so many rows each, in the order of the rows. Raises ValueError for lengths that are not positive."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths: expected at least one, all positive; got {list(lengths)}")
        ends = list(accumulate(lengths))
        spans = sorted(((end - length, end) for length, end in zip(lengths, ends, strict=True)), key=_longest_first)
        return Segments(torch.tensor(spans, dtype=torch.int32, device=device), tuple(spans))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of each, the longest first."""
        return tuple(end - first for first, end in self.spans)


def _longest_first(span: tuple[int, int]) -> tuple[int, int]:
    return span[0] - span[1], span[0]


@dataclass(frozen=True)
class Heads:
    """What an attention's queries and keys still lack where they come as their product left them, in float32.

    q_weight, k_weight: (D,) float32 of a head's RMSNorm with eps; cos, sin: (B, Q, D / 2) float32, halves convention.
    """

    q_weight: Tensor
    k_weight: Tensor
    eps: float
    cos: Tensor
    sin: Tensor


class HalfBlock(NamedTuple):
    """Attention or MLP of the layers at the steps: what surrounds its products, (S, L, columns) float32 each.

    scale: of the input's columns: the weights of the norms before it, times 1 + scale. bias: of the first product: its
    own, plus what the shift contributes. gate: of the last product.
    """

    scale: Tensor
    bias: Tensor
    gate: Tensor

    def at(self, step: int, layer: int) -> HalfBlock:
        """Of one layer at one step, (columns,) each."""
        return HalfBlock(self.scale[step, layer], self.bias[step, layer], self.gate[step, layer])


@dataclass(frozen=True)
class FlowWeights:
    """What a flow of S steps through L layers is computed with; A action columns, C hidden, F inner, H heads of D.

    addresses: (L, 4) int64, of each layer's contiguous matrices: attention's (3 H D, C) and (C, H D), the MLP's
    (2 F, C) and (C, F). matrices: those, so that they are kept as long as their addresses. middle_norms, final_norms:
    (L, C) of heads that normalise the residual stream itself, None of others; q_norms, k_norms: (L, D); float32.
    in_weights: (C, A), (C, C), of the action projector; out_weights: (A, C), the last norm folded in, and (A, A), or of
    a wide output layer, whose first product is one of its own, (wide, C) and (A, wide).
    """

    addresses: Tensor
    matrices: tuple[Tensor, ...]
    attention: HalfBlock
    mlp: HalfBlock
    middle_norms: Tensor | None
    final_norms: Tensor | None
    q_norms: Tensor
    k_norms: Tensor
    in_weights: tuple[Tensor, Tensor]
    out_weights: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class FlowInputs:
    """What a chunk is sampled from, on the device; changing the values recaptures nothing.

    keys, values: (L, B, G, N, D), of whose N tokens begin <= n < end count, (B,) int32 each; next_position: (3, B)
    int32; state: (B, state_length, S) in the head's dtype; noise, prefix, action_mask: (B, T, A) float32;
    prefix_length: (B,) int32.
    """

    keys: Tensor
    values: Tensor
    begin: Tensor
    end: Tensor
    next_position: Tensor
    state: Tensor
    noise: Tensor
    prefix: Tensor
    prefix_length: Tensor
    action_mask: Tensor


class RowScratch(NamedTuple):
    """Where rows lie between two ops, for one product at a time.

    eight: (bytes,) int8, of rows in 8 bits; scale: (rows,) float32, theirs; normed: (elements,) in the model's dtype.
    """

    eight: Tensor
    scale: Tensor
    normed: Tensor


class FlowBuffers(NamedTuple):
    """One batch size and chunk length, Q = context + T tokens. Streams are (B, Q, C) float32, each with its sums.

    start: the step's input; middle: after a layer's attention; end: after its MLP. q, k, v: (B, H, Q, D); raw: (B, Q,
    3 H D) float32, the three before norms and RoPE; mixed: (B, Q, C); hidden: (B, Q, 4 C); embedded: (B, T, C);
    state_hidden: (B, state_length, C); cos, sin: (B, Q, D / 2); z: (2, B, T, A) float32, whose halves take turns; wide:
    (B, T, wide), between the products of a wide output layer, None of another; scratch: of heads in 8 bits. fragments:
    (padded rows of all batches, 4 C + F), of what a streamed loop multiplies, None of more rows than that is for.
    """

    start: Tensor
    start_sums: Tensor
    middle: Tensor
    middle_sums: Tensor
    end: Tensor
    end_sums: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    mixed: Tensor
    hidden: Tensor
    embedded: Tensor
    state_hidden: Tensor
    cos: Tensor
    sin: Tensor
    z: Tensor
    raw: Tensor
    wide: Tensor | None = None
    scratch: RowScratch | None = None
    fragments: Tensor | None = None


class Workspace:
    """Scratch memory of split reductions, for kernels that run one after another on one stream.

    It grows with what is asked for until it is reserved: then its size and addresses stay, and CUDA graphs may hold
    them. Counters are zero between kernels: who arrives last at one puts it back.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._reserved = device, False
        self._partials = torch.empty(0, dtype=torch.float32, device=device)
        self._counters = torch.zeros(0, dtype=torch.int32, device=device)

    @property
    def size(self) -> tuple[int, int]:
        """How many partial results, how many counters."""
        return self._partials.numel(), self._counters.numel()

    def reserve(self, partials: int, counters: int) -> None:
        """Hold at least so many, for good. Raises RuntimeError for more than was reserved before."""
        self.partials(partials)
        self.counters(counters)
        self._reserved = True

    def partials(self, elements: int) -> Tensor:
        """(elements,) float32, not initialised. Raises RuntimeError for more than is reserved."""
        if self._must_grow(self._partials, elements):
            self._partials = torch.empty(elements, dtype=torch.float32, device=self.device)
        return self._partials[:elements]

    def counters(self, count: int) -> Tensor:
        """(count,) int32, all zero. Raises RuntimeError for more than is reserved."""
        if self._must_grow(self._counters, count):
            self._counters = torch.zeros(count, dtype=torch.int32, device=self.device)
        return self._counters[:count]

    def _must_grow(self, held: Tensor, elements: int) -> bool:
        more = held.numel() < elements
        if self._reserved:
            if more:
                raise RuntimeError(
                    f"a workspace cannot grow from {held.numel()} elements to {elements}: it was reserved, and CUDA "
                    "graphs may hold its addresses"
                )
        elif self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # A later call would replace what the graph goes on using.
            raise RuntimeError("a CUDA graph cannot hold a workspace that was not reserved (fused/sizing.py)")
        return more
