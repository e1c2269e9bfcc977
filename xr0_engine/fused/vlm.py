"""The VLM as sequences of fused ops on static buffers: patches to image tokens, tokens to the KV block.

Nothing is allocated and nothing on the device is waited for, so that a CUDA graph can hold it. Prompts are padded on
the right here: what a row's end hides is then one number, and causal attention needs no mask. Shape legend: B batch,
P patches and I tokens of all images, N cached tokens, of which M behind the preamble are computed, C hidden, H heads, G
KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xr0_engine.fused.ops import STATS_COLUMNS, FusedOps, InputNorm, Residual, Segments, StatsOut, Weight
from xr0_engine.model.layers import PackedLinears, RMSNorm, mrope_axes, parts_of
from xr0_engine.model.vision import LAYER_NORM_EPS, PatchMerger, VisionBlock, VisionTower
from xr0_engine.model.vlm import LanguageModel, TextLayer


def new_sums(rows: tuple[int, int], columns: int, device: torch.device, width: int = STATS_COLUMNS) -> Tensor:
    """(slots, B, M, 2) float32, for the statistics of (B, M, columns). width: of a slot, as StatsOut has it."""
    return torch.zeros(-(-columns // width), *rows, 2, device=device)


def fold_rms_norm(norm: RMSNorm, weights: list[Tensor]) -> None:
    """Move the norm's weight into what multiplies its output, in place: the two together stay what they are."""
    for weight in weights:
        weight.copy_(weight.float() * norm.weight.float())
    norm.weight.fill_(1)


def fold_layer_norm(norm: nn.LayerNorm, linear: nn.Linear) -> None:
    """The same for a LayerNorm, whose bias goes into the linear layer's."""
    weight = linear.weight.float()
    linear.bias.copy_(linear.bias.float() + weight @ norm.bias.float())
    linear.weight.copy_(weight * norm.weight.float())
    norm.weight.fill_(1)
    norm.bias.zero_()


def fold_frames(kernel: Tensor) -> Tensor:
    """(C, channels, frames, height, width) -> (C, channels * height * width): the frames' weights, added.

    What rounding takes from a sum is added to the next pixel's. Neighbouring pixels are alike, so that the errors leave
    each other's products; rounded one by one, a filter that is blind to brightness would see it.
    """
    exact = kernel.float().sum(2).flatten(2)
    folded, rest = torch.empty_like(exact, dtype=kernel.dtype), torch.zeros_like(exact[..., 0])
    for pixel in range(exact.shape[-1]):
        wanted = exact[..., pixel] + rest
        folded[..., pixel] = wanted
        rest = wanted - folded[..., pixel].float()
    return folded.flatten(1)


@dataclass(frozen=True)
class VisionBuffers:
    """One set of image sizes. segments: the patches of each image.

    positions: (1, P, C); cos, sin: (1, P, D / 2) float32; x, mixed, normed: (1, P, C); q, k, v: (1, H, P, D); hidden:
    (1, P, MLP); merged: (1, I, 4 C); tokens and each of deepstack: (1, I, out). sums, merged_sums: of x's rows, and of
    its rows merged, (1, I, 4 C): the same memory.
    """

    segments: Segments
    positions: Tensor
    cos: Tensor
    sin: Tensor
    x: Tensor
    sums: Tensor
    merged_sums: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    mixed: Tensor
    hidden: Tensor
    normed: Tensor
    merged: Tensor
    tokens: Tensor
    deepstack: tuple[Tensor, ...]


class FusedVision:
    """Shares the tower's weights, and folds its norms into them in place.

    frame_weight: (C, frame_dim), what multiplies a patch of one frame, the same picture in all of its temporal patch.
    """

    def __init__(self, tower: VisionTower) -> None:
        self.tower, self.config = tower, tower.config
        self.frame_weight = fold_frames(tower.patch_embed.proj.weight)
        self._blocks = parts_of(tower.blocks, VisionBlock)
        self._mergers = parts_of(tower.deepstack_merger_list, PatchMerger)
        self._column_sums: list[tuple[Tensor, Tensor]] = []
        for block in self._blocks:
            fold_layer_norm(block.norm1, block.attn.qkv)
            fold_layer_norm(block.norm2, block.mlp.linear_fc1)
            qkv, fc1 = (linear.weight.float().sum(1) for linear in (block.attn.qkv, block.mlp.linear_fc1))
            self._column_sums.append((qkv, fc1))
        # Slots of statistics that are full add up to those of merged rows.
        self._merger_sums: list[Tensor | None] = [None] * len(self._mergers)
        if self.config.hidden_size % STATS_COLUMNS == 0:
            for tap, merger in enumerate(self._mergers):
                fold_layer_norm(merger.norm, merger.linear_fc1)
                self._merger_sums[tap] = merger.linear_fc1.weight.float().sum(1)

    def buffers(self, grids: tuple[tuple[int, int], ...]) -> VisionBuffers:
        config = self.config
        positions, cos, sin = self.tower.tables(grids)
        patches, half = len(positions), cos.shape[-1] // 2
        device, dtype = positions.device, positions.dtype

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        heads = (1, config.num_heads, patches, config.hidden_size // config.num_heads)
        width, merge = config.hidden_size, config.spatial_merge_size**2
        tokens = patches // merge
        # A row's slots lie beside each other, so that neighbouring rows' are those of the rows merged.
        slots = torch.zeros(1, patches, -(-width // STATS_COLUMNS), 2, device=device)
        return VisionBuffers(
            segments=Segments.of([height * columns for height, columns in grids], device),
            positions=positions[None],
            cos=cos[None, :, 0, :half].contiguous(),
            sin=sin[None, :, 0, :half].contiguous(),
            x=empty(1, patches, width),
            sums=slots.permute(2, 0, 1, 3),
            merged_sums=slots.view(1, tokens, -1, 2).permute(2, 0, 1, 3),
            q=empty(*heads),
            k=empty(*heads),
            v=empty(*heads),
            mixed=empty(1, patches, width),
            hidden=empty(1, patches, config.intermediate_size),
            normed=empty(1, patches, width),
            merged=empty(1, tokens, width * merge),
            tokens=empty(1, tokens, config.out_hidden_size),
            deepstack=tuple(empty(1, tokens, config.out_hidden_size) for _ in config.deepstack_layers),
        )

    def run(self, ops: FusedOps, patches: Tensor, b: VisionBuffers) -> None:
        """patches: (P, patch_dim), or (P, frame_dim) of still pictures, in the tower's dtype. Fills b.tokens and
        b.deepstack. Raises ValueError for other columns."""
        tower, config = self.tower, self.config
        embed = tower.patch_embed.proj
        whole = config.frames_of(patches.shape[1]) == config.temporal_patch_size
        weight = Weight(embed.weight.flatten(1) if whole else self.frame_weight)
        stats = StatsOut(b.sums, centred=True)
        ops.linear(patches[None], weight, b.x, bias=embed.bias, residual=Residual(b.positions), stats=stats)
        for index, block in enumerate(self._blocks):
            qkv_sums, fc1_sums = self._column_sums[index]
            attn, mlp = block.attn, block.mlp
            ops.qkv(
                b.x, Weight(attn.qkv.weight), b.q, b.k, b.v, bias=attn.qkv.bias, cos=b.cos, sin=b.sin,
                norm=InputNorm(b.sums, LAYER_NORM_EPS, "layer", qkv_sums),
            )  # fmt: skip
            ops.attention(b.q, b.k, b.v, b.mixed, causal=False, segments=b.segments)
            ops.linear(b.mixed, Weight(attn.proj.weight), b.x, bias=attn.proj.bias, residual=Residual(b.x), stats=stats)
            ops.linear(
                b.x, Weight(mlp.linear_fc1.weight), b.hidden, bias=mlp.linear_fc1.bias, activation="gelu_tanh",
                norm=InputNorm(b.sums, LAYER_NORM_EPS, "layer", fc1_sums),
            )  # fmt: skip
            ops.linear(
                b.hidden, Weight(mlp.linear_fc2.weight), b.x, bias=mlp.linear_fc2.bias, residual=Residual(b.x),
                stats=stats,
            )  # fmt: skip
            if index in config.deepstack_layers:
                tap = config.deepstack_layers.index(index)
                self._merge(ops, self._mergers[tap], b, b.deepstack[tap], self._merger_sums[tap])
        # Normalised before it is merged: a row of its product has a mean and a scale for each of its patches.
        self._merge(ops, tower.merger, b, b.tokens, None)

    def _merge(
        self, ops: FusedOps, merger: PatchMerger, b: VisionBuffers, out: Tensor, column_sums: Tensor | None
    ) -> None:
        """column_sums: of the first product's weight, into which the norm was folded; None where it stands apart."""
        first, second, merged = merger.linear_fc1, merger.linear_fc2, b.merged.shape
        if column_sums is None:
            shape, affine = merged if merger.norm_after_merge else b.x.shape, (merger.norm.weight, merger.norm.bias)
            ops.layer_norm(b.x.view(shape), *affine, LAYER_NORM_EPS, b.normed.view(shape))
            rows, norm = b.normed.view(merged), None
        else:
            rows, norm = b.x.view(merged), InputNorm(b.merged_sums, LAYER_NORM_EPS, "layer", column_sums)
        ops.linear(rows, Weight(first.weight), b.merged, bias=first.bias, activation="gelu", norm=norm)
        ops.linear(b.merged, Weight(second.weight), out, bias=second.bias)


@dataclass(frozen=True)
class TextBuffers:
    """One batch size, prompt bucket and kept preamble.

    x: (B, M, C); q: (B, H, M, D); mixed: (B, M, H * D); hidden: (B, M, MLP); cos, sin: (B, M, D / 2) float32; keys,
    values: (layers, B, G, N, D), whose first N - M tokens hold the kept preamble.
    """

    x: Tensor
    sums: Tensor
    q: Tensor
    mixed: Tensor
    hidden: Tensor
    cos: Tensor
    sin: Tensor
    keys: Tensor
    values: Tensor


class FusedText:
    """Shares the language model's weights, and folds its norms into them in place."""

    def __init__(self, language: LanguageModel) -> None:
        self.language, self.config = language, language.config
        self._layers = parts_of(language.layers, TextLayer)
        for layer in self._layers:
            fold_rms_norm(layer.input_layernorm, [packed(layer.self_attn)])
            if not layer.kv_only:
                fold_rms_norm(layer.post_attention_layernorm, [packed(layer.mlp)])
        device = language.embed_tokens.weight.device
        self.frequencies = language.frequencies(device)
        self.axes = mrope_axes(len(self.frequencies), self.config.mrope_section, device).int()

    def buffers(self, batch: int, tokens: int, preamble: int) -> TextBuffers:
        """tokens: N, of which the first `preamble` are kept."""
        config, weight = self.config, self.language.embed_tokens.weight
        own = tokens - preamble

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, device=weight.device, dtype=weight.dtype)

        def table() -> Tensor:
            return torch.zeros(batch, own, config.head_dim // 2, device=weight.device)

        cache = (config.num_layers, batch, config.num_kv_heads, tokens, config.head_dim)
        return TextBuffers(
            x=empty(batch, own, config.hidden_size),
            sums=new_sums((batch, own), config.hidden_size, weight.device),
            q=empty(batch, config.num_heads, own, config.head_dim),
            mixed=empty(batch, own, config.num_heads * config.head_dim),
            hidden=empty(batch, own, config.intermediate_size),
            cos=table(),
            sin=table(),
            keys=empty(*cache),
            values=empty(*cache),
        )

    def run(
        self,
        ops: FusedOps,
        ids: Tensor,
        positions: Tensor,
        image_index: Tensor,
        tokens: Tensor,
        deepstack: tuple[Tensor, ...],
        b: TextBuffers,
        layer_done: Callable[[int], None] = lambda index: None,
    ) -> None:
        """Fills b.keys and b.values; layer_done is called when a layer's are on their way.

        ids: (B, M) int32; positions: (3, B, M) int32; image_index: (B, M) int32, row of tokens and deepstack (I, C), -1
        for text.
        """
        stats = StatsOut(b.sums)
        ops.rope_tables(positions, self.frequencies, self.axes, b.cos, b.sin)
        ops.embed(ids, self.language.embed_tokens.weight, image_index, tokens, b.x, stats)
        for index, layer in enumerate(self._layers):
            self._keys_and_values(ops, layer, b, index)
            layer_done(index)
            if layer.kv_only:
                return
            ops.attention(b.q, b.keys[index], b.values[index], b.mixed, causal=True)
            ops.linear(b.mixed, Weight(layer.self_attn.o_proj.weight), b.x, residual=Residual(b.x), stats=stats)
            norm = InputNorm(b.sums, self.config.rms_eps)
            ops.swiglu(b.x, Weight(packed(layer.mlp)), b.hidden, norm=norm)
            residual = Residual(b.x)
            if index < len(deepstack):
                residual = Residual(b.x, extra=deepstack[index], extra_index=image_index)
            ops.linear(b.hidden, Weight(layer.mlp.down_proj.weight), b.x, residual=residual, stats=stats)

    def _keys_and_values(self, ops: FusedOps, layer: TextLayer, b: TextBuffers, index: int) -> None:
        attn, preamble = layer.self_attn, b.keys.shape[3] - b.x.shape[1]
        ops.qkv(
            b.x, Weight(packed(attn)), None if layer.kv_only else b.q, b.keys[index, :, :, preamble:],
            b.values[index, :, :, preamble:], norm=InputNorm(b.sums, self.config.rms_eps),
            q_weight=None if layer.kv_only else attn.q_norm.weight, k_weight=attn.k_norm.weight,
            eps=self.config.rms_eps, cos=b.cos, sin=b.sin,
        )  # fmt: skip


def packed(linears: PackedLinears) -> Tensor:
    assert linears.packed is not None, "the model was not packed"
    return linears.packed
