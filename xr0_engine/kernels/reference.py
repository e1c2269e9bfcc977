"""The PyTorch oracle of every op: what the kernels must compute, and the CPU backend.

Shape legend: B batch, Q queries, N cached VLM tokens, H query heads, G KV heads (H a multiple of G), D head_dim.
Norms, rotations and softmax run in float32 whatever the input dtype; results return in the input dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest magnitude that a row, or a weight's row, is scaled to before it is rounded to 8 bits."""
LEAST_LARGEST = 2.0**-100
"""A row whose largest magnitude is below is scaled as if it were this: its reciprocal is finite."""
EXACT_COLUMNS = 1024
"""Products of so many pairs of int8 add up in float32 without rounding: 127 * 127 * 1024 < 2**24."""
BLOCK = 2**17
"""Elements that are rounded at a time on a CPU, so that what lies between stays in its caches."""
DIGITS, DIGIT_BITS = 3, 8
"""Of a row in 16 bits, as whole numbers in int8: as exact as float32, whose significand has 24 bits."""
FLOAT32_EXPONENT = 0x7F800000
ROWS_OF_DIGITS = 256
"""Multiplied at a time: their sums are three times as large as the result."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis: statistics in float32, cast to x's dtype, then times weight (spec section 2.2)."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves convention. x: (..., D); cos, sin: float32, broadcastable to x, each half repeated."""
    first, second = x.float().chunk(2, dim=-1)
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(turned, dim=-1).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Softmax attention with scale 1/sqrt(D) and grouped KV.

    q: (B, H, Q, D); k, v: (B, G, N, D); mask: bool, broadcastable to (B, 1, Q, N), True = may attend.
    Returns (B, H, Q, D).
    """
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def lambda_attention(q: Tensor, k: Tensor, v: Tensor, kv_keys: Tensor, kv_values: Tensor, mask: Tensor) -> Tensor:
    """DiT attention over [cached VLM KV block ; own K, V] under the Lambda-shaped mask (spec sections 2.2 and 2.4).

    q, k, v: (B, H, Q, D), q and k after their norms and RoPE; kv_keys, kv_values: (B, G, N, D);
    mask: (B, 1, Q, N + Q) bool, True = may attend. Returns (B, H, Q, D). The two parts share one softmax and are never
    concatenated, so the cached block is read where it lies.
    """
    batch, heads, queries, dim = q.shape
    groups, cached = kv_keys.shape[1], kv_keys.shape[2]
    weights = lambda_weights(q, k, kv_keys, mask).to(v.dtype)
    on_cache, on_own = weights.split((cached, queries), dim=-1)
    out = torch.bmm(on_cache.reshape(batch * groups, -1, cached), kv_values.flatten(0, 1))
    out = torch.baddbmm(out.view(-1, queries, dim), on_own.flatten(0, 1), v.flatten(0, 1))
    return out.view(batch, heads, queries, dim)


def lambda_weights(q: Tensor, k: Tensor, kv_keys: Tensor, mask: Tensor) -> Tensor:
    """What lambda_attention weighs values with, in float32: (B, H, Q, N + Q), rows of sum 1. Arguments as there."""
    batch, heads, queries, dim = q.shape
    groups, cached = kv_keys.shape[1], kv_keys.shape[2]
    scale, unread = dim**-0.5, q.new_empty(())
    over_cache = torch.baddbmm(
        unread, q.reshape(batch * groups, -1, dim), kv_keys.flatten(0, 1).transpose(1, 2), beta=0, alpha=scale
    )
    over_own = torch.baddbmm(unread, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), beta=0, alpha=scale)
    scores = torch.cat(
        (over_cache.view(batch, heads, queries, cached), over_own.view(batch, heads, queries, queries)), dim=-1
    )
    return scores.masked_fill_(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row, (..., K) floating point, in 8 bits by a scale of its own, symmetric: x is about q * scale.

    dtype: a key of MOST. Returns q of that dtype, to nearest, ties to even, and scale (...) float32. A row that is not
    finite has a scale that is not.
    """
    if x.device.type == "cpu" and x.dim() > 1 and x.numel() > BLOCK:
        rows = x.flatten(0, -2)
        parts = [_quantize(block, dtype) for block in rows.split(max(1, BLOCK // x.shape[-1]))]
        q, scale = (torch.cat(part) for part in zip(*parts, strict=True))
        return q.view(x.shape), scale.view(x.shape[:-1])
    return _quantize(x, dtype)


def _quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, most = x.float(), MOST[dtype]
    largest = rows.abs().amax(-1, keepdim=True).clamp(min=LEAST_LARGEST)
    scaled = rows * (most / largest)
    q = scaled.round_().to(dtype) if dtype == torch.int8 else scaled.clamp_(-most, most).to(dtype)
    return q, (largest / most).squeeze(-1)


def quantize_by(x: Tensor, scale: Tensor) -> Tensor:
    """(..., K) in int8, by one scale for all, () in x's dtype, as ONNX's QuantizeLinear has it: to nearest, ties to
    even, what is beyond cut off."""
    return (x / scale).round().clamp(-128, 127).to(torch.int8)


def product_8bit(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(M, N), rows (M, K) of quantize_rows times a weight (N, K) of the same dtype, both with their scales, and a bias
    (N,): in float32, rounded once to dtype.

    The sums of int8 are exact, so that every backend's are the same bits; those of float8 are float32's.
    """
    sums = integer_product(q, weight) if q.dtype == torch.int8 else q.float() @ weight.float().t()
    # On a CPU in blocks that stay in its caches.
    rows = max(1, BLOCK // len(weight)) if q.device.type == "cpu" else max(1, len(q))
    wide = None if bias is None else bias.float()
    out = torch.empty(sums.shape, dtype=dtype, device=q.device)
    for begin in range(0, len(q), rows):
        some = slice(begin, begin + rows)
        y = sums[some].float().mul_(scale[some, None]).mul_(weight_scale)
        out[some] = y if wide is None else y.add_(wide)
    return out


def product_8bit_weight(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """(M, N) float32, rows (M, K) floating point times a weight (N, K) int8 with its scales; sums in float32, or as
    exact as these.

    On a CPU that multiplies int8, a row in 16 bits is a power of two times a whole number of three digits in int8:
    their products read the weight as it is stored. Widened to float32, it would be written and read at four times the
    size for a few dozen rows. In bfloat16, what is at least 2**-14 of its row's largest magnitude is not rounded.
    """
    if x.is_cuda or x.dtype == torch.float32 or not _multiplies_int8():
        return F.linear(x.float(), weight.float()).mul_(weight_scale)
    parts = [_by_digits(rows, weight).mul_(weight_scale) for rows in x.split(ROWS_OF_DIGITS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _by_digits(x: Tensor, weight: Tensor) -> Tensor:
    digits, unit = _digits(x)
    sums = integer_product(digits.flatten(0, 1), weight).unflatten(0, (DIGITS, len(x)))
    total = sums[-1].float()
    for digit in range(DIGITS - 2, -1, -1):
        total.mul_(2.0**DIGIT_BITS).add_(sums[digit])
    return total.mul_(unit)


def _digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Digits (DIGITS, M, K) int8, the lowest first, and unit (M, 1) float32, a power of two: x is about unit times the
    whole number. Of a row that is not finite the unit is none."""
    largest = x.abs().amax(-1, keepdim=True).float().clamp_(min=LEAST_LARGEST)
    # Its exponent alone: the next power of two below. One bit is the sign, and one is left for what the lower digits
    # carry over.
    power = largest.view(torch.int32).bitwise_and_(FLOAT32_EXPONENT).view(torch.float32)
    unit = power * 2.0 ** (3 - DIGITS * DIGIT_BITS)
    whole = (x / unit).round_().int()
    digits = torch.empty(DIGITS, *x.shape, dtype=torch.int8, device=x.device)
    for number, digit in enumerate(digits):
        if number:
            # The digit before was two's complement: below 0 from 128 on, which this one makes good.
            whole.add_(2 ** (DIGIT_BITS - 1)).bitwise_right_shift_(DIGIT_BITS)
        digit.copy_(whole)
    return digits, unit


def integer_product(q: Tensor, weight: Tensor) -> Tensor:
    """(M, N) int32 of (M, K) and (N, K) int8, exact."""
    (rows, columns), outputs = q.shape, weight.shape[0]
    if q.is_cuda:
        # What cuBLASLt takes.
        padded = F.pad(q, (0, -columns % 8, 0, max(0, 17 - rows)))
        other = F.pad(weight, (0, -columns % 8, 0, -outputs % 8))
        return torch._int_mm(padded, other.t())[:rows, :outputs]
    # Of one column, torch 2.13 multiplies nonsense where the processor has AMX.
    if columns > 1 and _multiplies_int8():
        return torch._int_mm(q, weight.t())
    sums = torch.zeros(rows, outputs, dtype=torch.int32, device=q.device)
    for part, other in zip(q.split(EXACT_COLUMNS, 1), weight.split(EXACT_COLUMNS, 1), strict=True):
        sums += (part.float() @ other.float().t()).int()
    return sums


def _multiplies_int8() -> bool:
    """Whether this processor has instructions for it; without, torch's product of int8 is many times slower than that
    of float32."""
    return torch.cpu._is_vnni_supported()
