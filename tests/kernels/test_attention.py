"""Both attentions against their oracles: odd sizes, grouped KV, every mask, any number of splits."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from tests.kernels.support import DEVICE, DTYPES, Frame, assert_as_plain, assert_close, randn
from xr0_engine.kernels import fused_reference
from xr0_engine.kernels.arguments import Segments, Tactic, Workspace
from xr0_engine.kernels.attention import attention
from xr0_engine.kernels.lambda_attention import lambda_attention

SMALL = {"block_m": 16, "block_n": 16}


@pytest.fixture
def workspace():
    return Workspace(DEVICE)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "rows", "keys", "dim"),
    [
        pytest.param(1, 4, 1, 21, 21, 32, id="4 heads share"),
        pytest.param(2, 3, 3, 16, 16, 16, id="whole tiles"),
        pytest.param(2, 6, 2, 5, 37, 16, id="after a kept preamble"),
        pytest.param(3, 2, 1, 1, 1, 64, id="one token"),
    ],
)
@pytest.mark.parametrize("library", [False, True], ids=["kernel", "library"])
def test_attention(batch, heads, groups, rows, keys, dim, dtype, causal, library, workspace):
    check_attention((batch, heads, rows, groups, keys, dim), dtype, causal, Tactic(library=library, **SMALL), workspace)


def check_attention(shape, dtype, causal, tactic, workspace):
    """shape: (B, H, M, G, N, D)."""
    batch, heads, rows, groups, keys, dim = shape
    torch.manual_seed(0)
    # As the products leave them: heads beside each other in a row.
    q = randn(batch, rows, heads, dim, dtype=dtype, scale=2).transpose(1, 2)
    k, v = (randn(batch, groups, keys, dim, dtype=dtype) for _ in range(2))
    common = {"causal": causal, "tactic": tactic, "workspace": workspace}
    out, exact = Frame(batch, rows, heads * dim, dtype=dtype), torch.empty(batch, rows, heads * dim, device=DEVICE)
    attention(q, k, v, out.view, **common)
    fused_reference.attention(q, k, v, exact, **common)
    mask = torch.ones(rows, keys, dtype=torch.bool, device=DEVICE).tril(keys - rows if causal else keys)
    plain = plain_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    assert_as_plain(out.result(), exact, plain)


def plain_attention(q, k, v, mask):
    """With every intermediate result in the inputs' dtype."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "heads", "groups", "causal"),
    [
        pytest.param((5, 34, 16), 2, 2, False, id="of three lengths"),
        pytest.param((7, 7), 4, 2, True, id="of one length, causal"),
        pytest.param((19,), 2, 2, False, id="one"),
    ],
)
@pytest.mark.parametrize("library", [False, True], ids=["kernel", "library"])
def test_rows_see_their_own_segment(lengths, heads, groups, causal, dtype, library, workspace):
    torch.manual_seed(0)
    rows, dim = sum(lengths), 16
    q = randn(1, rows, heads, dim, dtype=dtype, scale=2).transpose(1, 2)
    k, v = (randn(1, groups, rows, dim, dtype=dtype) for _ in range(2))
    tactic, segments = Tactic(library=library, **SMALL), Segments.of(lengths, DEVICE)
    common = {"causal": causal, "segments": segments, "tactic": tactic, "workspace": workspace}
    out, exact = Frame(1, rows, heads * dim, dtype=dtype), torch.empty(1, rows, heads * dim, device=DEVICE)
    attention(q, k, v, out.view, **common)
    fused_reference.attention(q, k, v, exact, **common)
    mask = torch.block_diag(*(torch.ones(length, length, device=DEVICE) for length in lengths)).bool()
    plain = plain_attention(q, k, v, mask.tril() if causal else mask).transpose(1, 2).flatten(2)
    assert_as_plain(out.result(), exact, plain)


def test_the_longest_segment_starts_first():
    segments = Segments.of((4, 9, 4, 9), DEVICE)
    assert segments.spans == ((4, 13), (17, 26), (0, 4), (13, 17))
    assert segments.bounds.tolist() == [list(span) for span in segments.spans]
    assert segments.lengths == (9, 9, 4, 4)
    with pytest.raises(ValueError, match=r"lengths: expected at least one, all positive; got \[3, 0\]"):
        Segments.of((3, 0), DEVICE)


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "lengths"),
    [(1, 8, 8, (4, 3)), (2, 8, 8, (8,)), (1, 7, 8, (8,))],
    ids=["rows left over", "a batch", "a kept preamble"],
)
def test_segments_are_of_all_rows_of_one_sequence(batch, queries, keys, lengths, workspace):
    q, k, out = torch.zeros(batch, 2, queries, 16), torch.zeros(batch, 2, keys, 16), torch.zeros(batch, queries, 32)
    segments = Segments.of(lengths, q.device)
    with pytest.raises(ValueError, match="segments: expected those of all rows of one sequence"):
        attention(q, k, k, out, causal=False, segments=segments, tactic=Tactic(), workspace=workspace)


@pytest.mark.parametrize("lambda_shaped", [False, True], ids=["attention", "lambda_attention"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_beyond_what_exp_takes(dtype, lambda_shaped, workspace):
    """Up to the dtype's largest numbers: each row's maximum is taken off before."""
    torch.manual_seed(0)
    scale = 6e4 / 5
    q, k, v, keys, values = ((scale * x.clamp(-5, 5)).to(dtype) for x in torch.randn(5, 1, 2, 19, 16, device=DEVICE))
    out, exact = Frame(1, 19, 32, dtype=dtype), torch.empty(1, 19, 32, device=DEVICE)
    tactic = Tactic(split_k=3 if lambda_shaped else 1, **SMALL)
    if lambda_shaped:
        span = torch.tensor([[0], [19]], dtype=torch.int32, device=DEVICE)
        for run, target in ((lambda_attention, out.view), (fused_reference.lambda_attention, exact)):
            run(q, k, v, keys, values, *span, target, window=4, context=2, tactic=tactic, workspace=workspace)
    else:
        for run, target in ((attention, out.view), (fused_reference.attention, exact)):
            run(q, k, v, target, causal=True, tactic=tactic, workspace=workspace)
    # Differences between scores are so large that each row takes one value, which need not be rounded.
    assert exact.isfinite().all()
    assert torch.equal(out.result().float(), exact)


def test_flash_attn_is_called_as_it_wants_to_be(workspace, monkeypatch):
    """With a stand-in that states the package's contract: (B, M, H, D), grouped KV, the last query sees all keys."""

    def flash_attn_func(q, k, v, causal):
        assert q.shape == (2, 5, 4, 16)
        assert k.shape == v.shape == (2, 7, 2, 16)
        assert causal
        mask = torch.ones(5, 7, dtype=torch.bool, device=DEVICE).tril(2)
        return plain_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask).transpose(1, 2)

    q, k, v = randn(2, 4, 5, 16), randn(2, 2, 7, 16), randn(2, 2, 7, 16)
    out, expected = torch.empty(2, 5, 64, device=DEVICE), torch.empty(2, 5, 64, device=DEVICE)
    tactic = Tactic(library=True, flash=True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(NotImplementedError, match="flash-attn is not installed"):
        attention(q, k, v, out, causal=True, tactic=tactic, workspace=workspace)
    package = ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func
    package.__spec__ = ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    attention(q, k, v, out, causal=True, tactic=tactic, workspace=workspace)
    fused_reference.attention(q, k, v, expected, causal=True, tactic=tactic, workspace=workspace)
    torch.testing.assert_close(out, expected)


LAMBDA_SIZES = [
    pytest.param(1, 2, 2, 12, 50, 32, id="12 queries"),
    pytest.param(3, 2, 1, 7, 33, 16, id="2 heads share"),
    pytest.param(1, 3, 1, 13, 16, 16, id="several tiles"),
    pytest.param(1, 1, 1, 1, 1, 64, id="one token"),
]


def lambda_case(batch, heads, groups, queries, cached, dim, dtype):
    """q, k, v as views of one product, and a cache whose invalid ends are NaN; the last row's range is empty."""
    q, k, v = randn(batch, queries, 3, heads, dim, dtype=dtype, scale=2).permute(2, 0, 3, 1, 4)
    keys, values = (randn(batch, groups, cached, dim, dtype=dtype) for _ in range(2))
    begin = torch.tensor([cached // 3, 0, cached // 2][:batch], dtype=torch.int32, device=DEVICE)
    end = torch.tensor([cached - cached // 5, cached, cached // 2][:batch], dtype=torch.int32, device=DEVICE)
    place = torch.arange(cached, device=DEVICE)
    outside = (place < begin[:, None]) | (place >= end[:, None])
    for cache in (keys, values):
        cache.masked_fill_(outside[:, None, :, None], torch.nan)
    return q, k, v, keys, values, begin, end


@pytest.mark.parametrize(
    ("window", "context", "splits"),
    [
        pytest.param(None, 2, 1, id="causal"),
        pytest.param(4, 2, 3, id="window 4, 3 splits"),
        pytest.param(0, 1, 1, id="itself and the sink"),
        pytest.param(3, 0, 2, id="no context, 2 splits"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "groups", "queries", "cached", "dim"), LAMBDA_SIZES)
def test_lambda_attention(batch, heads, groups, queries, cached, dim, dtype, window, context, splits, workspace):
    shape = batch, heads, queries, groups, cached, dim
    check_lambda(shape, dtype, window, context, Tactic(split_k=splits, **SMALL), workspace)


def check_lambda(shape, dtype, window, context, tactic, workspace):
    """shape: (B, H, Q, G, N, D)."""
    batch, heads, queries, groups, cached, dim = shape
    torch.manual_seed(0)
    case = lambda_case(batch, heads, groups, queries, cached, dim, dtype)
    common = {"window": window, "context": context, "workspace": workspace, "tactic": tactic}
    out, exact = (
        Frame(batch, queries, heads * dim, dtype=dtype),
        torch.empty(batch, queries, heads * dim, device=DEVICE),
    )
    lambda_attention(*case, out.view, **common)
    fused_reference.lambda_attention(*case, exact, **common)
    # The next kernel counts from zero.
    assert not workspace.counters(batch * groups).any()
    assert_as_plain(out.result(), exact, plain_lambda(*case, window, context))


def plain_lambda(q, k, v, keys, values, begin, end, window, context):
    """With every intermediate result in the inputs' dtype, row by row, on what is valid alone."""
    token = torch.arange(q.shape[2], device=DEVICE)
    distance = token[:, None] - token
    own = distance >= 0
    if window is not None:
        own &= (token < context) | (distance <= window)
    rows, repeat = [], q.shape[1] // keys.shape[1]
    for row, (first, last) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        both = [
            torch.cat((cache[row, :, first:last].repeat_interleave(repeat, 0), mine[row]), dim=1)[None]
            for cache, mine in ((keys, k), (values, v))
        ]
        seen = torch.ones(len(token), last - first, dtype=torch.bool, device=DEVICE)
        rows.append(plain_attention(q[row : row + 1], *both, torch.cat((seen, own), dim=1)))
    return torch.cat(rows).transpose(1, 2).flatten(2)


def test_valid_range_is_read_on_the_device(workspace):
    """The same call replayed with another prompt length, as a captured graph replays it."""
    torch.manual_seed(0)
    q, k, v, keys, values, begin, end = lambda_case(1, 2, 2, 5, 40, 16, torch.float32)
    keys, values = keys.nan_to_num(0.5), values.nan_to_num(0.5)
    common = {"window": None, "context": 2, "workspace": workspace, "tactic": Tactic(split_k=2, **SMALL)}
    out, exact = Frame(1, 5, 32), torch.empty(1, 5, 32, device=DEVICE)
    # Ranges that are empty, or reach beyond the cache, are what the oracle takes them for.
    for first, last in ((0, 40), (39, 40), (8, 8), (0, 17), (30, 10), (-5, 7), (33, 99), (45, 60), (-9, -3)):
        begin[0], end[0] = first, last
        lambda_attention(q, k, v, keys, values, begin, end, out.view, **common)
        fused_reference.lambda_attention(q, k, v, keys, values, begin, end, exact, **common)
        assert_close(out.result(), exact)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"v": (1, 2, 8, 32)}, r"v: expected shape \(1, 2, 8, 16\), got \(1, 2, 8, 32\)"),
        ({"out": (1, 4, 32)}, r"out: expected shape \(1, 4, 64\)"),
        ({"k": (1, 3, 8, 16), "v": (1, 3, 8, 16)}, "expected a multiple of 3 KV heads, got 4"),
        ({"k": (1, 2, 3, 16), "v": (1, 2, 3, 16)}, "k: expected at least as many keys as queries, 4"),
        ({"q": (1, 4, 4, 24), "k": (1, 2, 8, 24), "v": (1, 2, 8, 24), "out": (1, 4, 96)}, "head_dim: expected a power"),
    ],
    ids=["v", "out", "groups", "too few keys", "head_dim"],
)
def test_wrong_shapes_are_refused(change, complaint, workspace):
    shapes = {"q": (1, 4, 4, 16), "k": (1, 2, 8, 16), "v": (1, 2, 8, 16), "out": (1, 4, 64)} | change
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=complaint):
        attention(**tensors, causal=True, tactic=Tactic(), workspace=workspace)


def test_tiles_must_be_powers_of_two(workspace):
    case = lambda_case(1, 2, 2, 3, 8, 16, torch.float32)
    for tactic, name in (
        (Tactic(block_n=48), "block_n"),
        (Tactic(block_m=8), "block_m"),
        (Tactic(split_k=0), "split_k"),
    ):
        with pytest.raises(ValueError, match=f"tactic.{name}: expected"):
            lambda_attention(*case, torch.empty(1, 3, 32), window=4, context=2, tactic=tactic, workspace=workspace)


def test_lambda_attention_has_no_library(workspace):
    case = lambda_case(1, 2, 2, 3, 8, 16, torch.float32)
    with pytest.raises(NotImplementedError, match="library: has no lambda_attention"):
        lambda_attention(
            *case, torch.empty(1, 3, 32), window=4, context=2, tactic=Tactic(library=True), workspace=workspace
        )
