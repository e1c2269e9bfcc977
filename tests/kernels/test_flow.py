"""What runs between two flow steps, and the rotary tables of the DiT, against their oracles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.support import DEVICE, DTYPES, Frame, assert_as_plain, assert_close, randn
from xr0_engine.kernels import fused_reference
from xr0_engine.kernels.arguments import StatsOut
from xr0_engine.kernels.flow import dit_rope_tables, euler_step, start_flow

EPS = 1e-6
DT = 0.2
SIZES = [
    pytest.param(1, 10, 32, 320, id="libero"),
    pytest.param(2, 30, 32, 128, id="two rows of 30"),
    pytest.param(3, 5, 7, 200, id="odd sizes"),
    pytest.param(1, 1, 40, 72, id="one action"),
]


def prefix_lengths(batch, tokens):
    """0, some, all."""
    return torch.tensor([0, tokens // 2, tokens][:batch], dtype=torch.int32, device=DEVICE)


def action_masks(batch, tokens, actions):
    mask = torch.ones(batch, tokens, actions, device=DEVICE)
    mask[..., -2:] = 0
    return mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "actions", "columns"), SIZES)
def test_start_flow(batch, tokens, actions, columns, dtype):
    torch.manual_seed(0)
    noise, prefix = randn(batch, tokens, actions), randn(batch, tokens, actions)
    length, mask = prefix_lengths(batch, tokens), action_masks(batch, tokens, actions)
    weight = randn(columns, actions, dtype=dtype, scale=actions**-0.5)
    # What is not read may be anything.
    given = (torch.arange(tokens, device=DEVICE) < length[:, None])[..., None]
    noise, prefix = noise.masked_fill(given, torch.nan), prefix.masked_fill(~given, torch.nan)
    z, hidden = Frame(batch, tokens, actions), Frame(batch, tokens, columns, dtype=dtype)
    start_flow(noise, prefix, length, mask, weight, z.view, hidden.view)
    exact_z, exact = (torch.empty(batch, tokens, size, device=DEVICE) for size in (actions, columns))
    fused_reference.start_flow(noise, prefix, length, mask, weight, exact_z, exact)
    assert torch.equal(z.result(), exact_z)
    plain = F.gelu((exact_z * mask).to(dtype) @ weight.T, approximate="tanh")
    assert_as_plain(hidden.result(), exact, plain)


@pytest.mark.parametrize("last", [False, True], ids=["inner step", "last step"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "actions", "columns"), SIZES)
def test_euler_step(batch, tokens, actions, columns, dtype, last):
    torch.manual_seed(0)
    # The residual stream of the actions stands behind that of two context tokens.
    stream = 3 * randn(batch, tokens + 2, columns)
    stats = torch.full((-(-columns // 64), batch, tokens + 2, 2), torch.nan, device=DEVICE)
    fused_reference.write_stats(stream, StatsOut(stats))
    x, sums = stream[:, 2:], stats[:, :, 2:]
    weight1 = randn(actions, columns, dtype=dtype, scale=2 * columns**-0.5)
    weight2 = randn(actions, actions, dtype=dtype, scale=2 * actions**-0.5)
    in_weight = None if last else randn(columns, actions, dtype=dtype, scale=actions**-0.5)
    z, mask = randn(batch, tokens, actions), action_masks(batch, tokens, actions)
    length = prefix_lengths(batch, tokens)

    frame, hidden = Frame(batch, tokens, actions), Frame(batch, tokens, columns, dtype=dtype)
    step = (x, sums, EPS, weight1, weight2, z)
    euler_step(*step, frame.view, length, mask, DT, in_weight, None if last else hidden.view)
    exact_z, exact = (torch.empty(batch, tokens, size, device=DEVICE) for size in (actions, columns))
    fused_reference.euler_step(*step, exact_z, length, mask, DT, in_weight, None if last else exact)

    normed = F.rms_norm(x, (columns,), eps=EPS).to(dtype)
    velocity = F.gelu(normed @ weight1.T, approximate="tanh") @ weight2.T
    given = (torch.arange(tokens, device=DEVICE) < length[:, None])[..., None]
    plain_z = torch.where(given, z, z + DT * velocity.float())
    z_next = frame.result()
    assert_as_plain((z_next - z).to(dtype), exact_z - z, (plain_z - z).to(dtype))
    assert torch.equal(z_next[given.expand_as(z)], z[given.expand_as(z)])
    if in_weight is not None:
        plain = F.gelu((plain_z * mask).to(dtype) @ in_weight.T, approximate="tanh")
        assert_as_plain(hidden.result(), exact, plain)


@pytest.mark.parametrize("output", [1, 2], ids=["of one product", "of two"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_euler_step_of_rows_that_no_norm_is_for(output, dtype):
    """With one product: what another kernel has made of the stream, the last of a wide output layer."""
    batch, tokens, actions, columns = 2, 15, 60, 200
    torch.manual_seed(0)
    x = randn(batch, tokens, columns, dtype=dtype if output == 1 else torch.float32)
    weight1 = randn(actions, columns, dtype=dtype, scale=2 * columns**-0.5)
    weight2 = None if output == 1 else randn(actions, actions, dtype=dtype, scale=2 * actions**-0.5)
    in_weight = randn(columns, actions, dtype=dtype, scale=actions**-0.5)
    z, mask, length = randn(batch, tokens, actions), action_masks(batch, tokens, actions), prefix_lengths(batch, tokens)
    frame, hidden = Frame(batch, tokens, actions), Frame(batch, tokens, columns, dtype=dtype)
    euler_step(x, None, EPS, weight1, weight2, z, frame.view, length, mask, DT, in_weight, hidden.view)
    exact_z, exact = (torch.empty(batch, tokens, size, device=DEVICE) for size in (actions, columns))
    fused_reference.euler_step(x, None, EPS, weight1, weight2, z, exact_z, length, mask, DT, in_weight, exact)
    velocity = x.to(dtype) @ weight1.T
    if weight2 is not None:
        velocity = F.gelu(velocity, approximate="tanh") @ weight2.T
    given = (torch.arange(tokens, device=DEVICE) < length[:, None])[..., None]
    plain_z = torch.where(given, z, z + DT * velocity.float())
    assert_as_plain((frame.result() - z).to(dtype), exact_z - z, (plain_z - z).to(dtype))
    assert_as_plain(hidden.result(), exact, F.gelu((plain_z * mask).to(dtype) @ in_weight.T, approximate="tanh"))


@pytest.mark.parametrize("offset", [0, 10])
@pytest.mark.parametrize(("batch", "tokens", "half"), [(1, 12, 64), (3, 34, 8)])
def test_dit_rope_tables(batch, tokens, half, offset):
    torch.manual_seed(0)
    base = torch.randint(100, 2000, (3, batch), dtype=torch.int32, device=DEVICE)
    length = prefix_lengths(batch, tokens - 2)
    frequencies = 5e6 ** -torch.linspace(0, 1, half, device=DEVICE)
    axes = torch.arange(half, dtype=torch.int32, device=DEVICE) % 3
    cos, sin = Frame(batch, tokens, half), Frame(batch, tokens, half)
    dit_rope_tables(base, length, frequencies, axes, cos.view, sin.view, context=2, offset=offset)
    expected = torch.empty(2, batch, tokens, half, device=DEVICE)
    fused_reference.dit_rope_tables(base, length, frequencies, axes, *expected, context=2, offset=offset)
    assert_close(cos.result(), expected[0])
    assert_close(sin.result(), expected[1])


def test_wrong_arguments_are_refused():
    z, length = torch.zeros(1, 4, 8), torch.zeros(1, dtype=torch.int32)
    arguments = (torch.zeros(1, 4, 64), torch.zeros(1, 1, 4, 2), EPS, torch.zeros(8, 64), torch.zeros(8, 8))
    with pytest.raises(ValueError, match=r"z_next: expected shape \(1, 4, 8\), got \(1, 5, 8\)"):
        euler_step(*arguments, z, torch.zeros(1, 5, 8), length, z, DT, None, None)
    with pytest.raises(ValueError, match="z_next: expected another buffer"):
        euler_step(*arguments, z, z, length, z, DT, None, None)
    with pytest.raises(ValueError, match="hidden: expected with in_weight"):
        euler_step(*arguments, z, torch.zeros(1, 4, 8), length, z, DT, torch.zeros(64, 8), None)
    with pytest.raises(ValueError, match=r"in_weight: expected shape \(64, 8\)"):
        start_flow(z, z, length, z, torch.zeros(64, 9), z, torch.zeros(1, 4, 64))
