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
from torch import Tensor

from xr0_engine.fused.ops import STATS_COLUMNS, FusedOps, InputNorm, Residual, RowScratch, Segments, StatsOut, Weight
from xr0_engine.fused.products import Product, scratch_for
from xr0_engine.model.layers import mrope_axes, parts_of
from xr0_engine.model.vision import LAYER_NORM_EPS, PatchMerger, VisionBlock, VisionTower
from xr0_engine.model.vlm import LanguageModel, TextLayer


def new_sums(rows: tuple[int, int], columns: int, device: torch.device, width: int = STATS_COLUMNS) -> Tensor:
    """(slots, B, M, 2) float32, for the statistics of (B, M, columns). width: of a slot, as StatsOut has it."""
    return torch.zeros(-(-columns // width), *rows, 2, device=device)


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
    scratch: RowScratch


@dataclass(frozen=True)
class _Block:
    """The products of a block of the vision tower."""

    qkv: Product
    proj: Product
    fc1: Product
    fc2: Product


@dataclass(frozen=True)
class _Merger:
    """A merger's products; norm_within: whether the first one's input is normed by it, not before it."""

    module: PatchMerger
    fc1: Product
    fc2: Product
    norm_within: bool


class FusedVision:
    """Shares the tower's weights, and folds its norms into those in 16 bits in place.

    frame_weight: (C, frame_dim), what multiplies a patch of one frame, the same picture in all of its temporal patch.
    """

    def __init__(self, tower: VisionTower) -> None:
        self.tower, self.config = tower, tower.config
        self.frame_weight = fold_frames(tower.patch_embed.proj.weight)
        dtype = tower.patch_embed.proj.weight.dtype
        self._blocks = [
            _Block(
                qkv=Product.after_layer_norm(block.norm1, block.attn.qkv),
                proj=Product.of(block.attn.proj, dtype),
                fc1=Product.after_layer_norm(block.norm2, block.mlp.linear_fc1),
                fc2=Product.of(block.mlp.linear_fc2, dtype),
            )
            for block in parts_of(tower.blocks, VisionBlock)
        ]
        # Slots of statistics that are full add up to those of merged rows.
        within = self.config.hidden_size % STATS_COLUMNS == 0
        self._taps = [_merger(merger, within) for merger in parts_of(tower.deepstack_merger_list, PatchMerger)]
        # Normalised before it is merged: a row of its product has a mean and a scale for each of its patches.
        self._merger = _merger(tower.merger, within=False)

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
        in_blocks = [product for block in self._blocks for product in (block.qkv, block.proj, block.fc1, block.fc2)]
        in_mergers = [product for merger in (*self._taps, self._merger) for product in (merger.fc1, merger.fc2)]
        products = [*((product, patches) for product in in_blocks), *((product, tokens) for product in in_mergers)]
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
            scratch=scratch_for(products, dtype, device),
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
        norm = InputNorm(b.sums, LAYER_NORM_EPS, "layer")
        for index, block in enumerate(self._blocks):
            x, options = block.qkv.take(ops, b.x, b.scratch, norm)
            ops.qkv(x, block.qkv.weight, b.q, b.k, b.v, bias=block.qkv.bias, cos=b.cos, sin=b.sin, **options)
            ops.attention(b.q, b.k, b.v, b.mixed, causal=False, segments=b.segments)
            x, options = block.proj.take(ops, b.mixed, b.scratch)
            ops.linear(
                x, block.proj.weight, b.x, bias=block.proj.bias, residual=Residual(b.x), stats=stats, **options
            )  # fmt: skip
            x, options = block.fc1.take(ops, b.x, b.scratch, norm)
            ops.linear(x, block.fc1.weight, b.hidden, bias=block.fc1.bias, activation="gelu_tanh", **options)
            x, options = block.fc2.take(ops, b.hidden, b.scratch)
            ops.linear(x, block.fc2.weight, b.x, bias=block.fc2.bias, residual=Residual(b.x), stats=stats, **options)
            if index in config.deepstack_layers:
                tap = config.deepstack_layers.index(index)
                self._merge(ops, self._taps[tap], b, b.deepstack[tap])
        self._merge(ops, self._merger, b, b.tokens)

    def _merge(self, ops: FusedOps, merger: _Merger, b: VisionBuffers, out: Tensor) -> None:
        first, second, merged = merger.fc1, merger.fc2, b.merged.shape
        if merger.norm_within:
            norm = InputNorm(b.merged_sums, LAYER_NORM_EPS, "layer")
            rows, options = first.take(ops, b.x.view(merged), b.scratch, norm)
        else:
            module = merger.module
            shape = merged if module.norm_after_merge else b.x.shape
            normed = b.normed.view(shape)
            ops.layer_norm(b.x.view(shape), module.norm.weight, module.norm.bias, LAYER_NORM_EPS, normed)
            rows, options = first.take(ops, b.normed.view(merged), b.scratch)
        ops.linear(rows, first.weight, b.merged, bias=first.bias, activation="gelu", **options)
        rows, options = second.take(ops, b.merged, b.scratch)
        ops.linear(rows, second.weight, out, bias=second.bias, **options)


def _merger(module: PatchMerger, within: bool) -> _Merger:
    norm, first, dtype = module.norm, module.linear_fc1, module.norm.weight.dtype
    fc1 = Product.after_layer_norm(norm, first) if within else Product.of(first, dtype)
    return _Merger(module, fc1, Product.of(module.linear_fc2, dtype), within)


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
    scratch: RowScratch


@dataclass(frozen=True)
class _Layer:
    """A layer of the language model and its products: of one that gives keys and values alone, the first."""

    module: TextLayer
    qkv: Product
    others: tuple[Product, Product, Product] | None
    """Of attention's output, of gate and up, of down."""

    @staticmethod
    def of(layer: TextLayer) -> _Layer:
        qkv = Product.after_rms_norm(layer.input_layernorm, layer.self_attn)
        if layer.kv_only:
            return _Layer(layer, qkv, None)
        gate_up = Product.after_rms_norm(layer.post_attention_layernorm, layer.mlp)
        dtype = layer.input_layernorm.weight.dtype
        out, down = (Product.of(part, dtype) for part in (layer.self_attn.o_proj, layer.mlp.down_proj))
        return _Layer(layer, qkv, (out, gate_up, down))


class FusedText:
    """Shares the language model's weights, and folds its norms into those in 16 bits in place."""

    def __init__(self, language: LanguageModel) -> None:
        self.language, self.config = language, language.config
        self._layers = [_Layer.of(layer) for layer in parts_of(language.layers, TextLayer)]
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
        products = [product for layer in self._layers for product in (layer.qkv, *(layer.others or ()))]
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
            scratch=scratch_for(((product, batch * own) for product in products), weight.dtype, weight.device),
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
        norm = InputNorm(b.sums, self.config.rms_eps)
        for index, layer in enumerate(self._layers):
            self._keys_and_values(ops, layer, norm, b, index)
            layer_done(index)
            if layer.others is None:
                return
            out, gate_up, down = layer.others
            ops.attention(b.q, b.keys[index], b.values[index], b.mixed, causal=True)
            x, options = out.take(ops, b.mixed, b.scratch)
            ops.linear(x, out.weight, b.x, residual=Residual(b.x), stats=stats, **options)
            x, options = gate_up.take(ops, b.x, b.scratch, norm)
            ops.swiglu(x, gate_up.weight, b.hidden, **options)
            residual = Residual(b.x)
            if index < len(deepstack):
                residual = Residual(b.x, extra=deepstack[index], extra_index=image_index)
            x, options = down.take(ops, b.hidden, b.scratch)
            ops.linear(x, down.weight, b.x, residual=residual, stats=stats, **options)

    def _keys_and_values(self, ops: FusedOps, layer: _Layer, norm: InputNorm, b: TextBuffers, index: int) -> None:
        attn, preamble = layer.module.self_attn, b.keys.shape[3] - b.x.shape[1]
        x, options = layer.qkv.take(ops, b.x, b.scratch, norm)
        ops.qkv(
            x, layer.qkv.weight, None if layer.others is None else b.q, b.keys[index, :, :, preamble:],
            b.values[index, :, :, preamble:], q_weight=None if layer.others is None else attn.q_norm.weight,
            k_weight=attn.k_norm.weight, eps=self.config.rms_eps, cos=b.cos, sin=b.sin, **options,
        )  # fmt: skip
