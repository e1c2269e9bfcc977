"""The self-check finds what is broken on purpose, names its stage, and passes what is not broken.

The faults are put into the ops, whose oracles then run in the kernels' place; two tests run the kernels themselves.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from tests.kernels.support import DEVICE
from tests.support import CPU, load
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.fused import products, selfcheck
from xr0_engine.fused.head import FusedHead
from xr0_engine.fused.ops import FusedOps
from xr0_engine.fused.selfcheck import (
    check,
    checkpoint_model,
    checkpoint_sessions,
    first_layers,
    judge,
    make_case,
    seeded_config,
    seeded_model,
    seeded_sessions,
    worst,
)
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.model.quantization import RECIPES
from xr0_engine.sizes import published_config, small_config, tiny_config

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def seeded(dtype: torch.dtype = torch.float32, formats=(None, None)):
    """The comparisons of the seeded model, on the oracles."""
    model = seeded_model(seeded_config(), CPU, dtype, formats=formats)
    return list(check(model, seeded_sessions(model.config), "reference", TacticTable("")))


def first_fault(comparisons):
    return next((each for each in comparisons if not each.passed), None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selfcheck") / "tiny"
    init_checkpoint(folder)
    return folder


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_right_passes(dtype, tiny):
    found = seeded(dtype)
    assert first_fault(found) is None
    assert {each.case for each in found} == {
        "one row, op by op", "one row, prefix, op by op", "one row, op by op, again after another input",
        "one row, op by op, again at once", "one row, kept KV block", "two rows, op by op",
        "two rows, op by op, again at once", "two rows, kept KV block",
    }  # fmt: skip
    model = checkpoint_model(tiny, CPU, dtype)
    assert first_fault(check(model, checkpoint_sessions(model.config), "reference", TacticTable(""))) is None


def test_the_seeded_model_has_every_part():
    config = seeded_config()
    assert config.text.num_heads > config.text.num_kv_heads
    assert config.head.num_heads > config.head.num_kv_heads
    assert config.first_read_layer > 0
    assert len(config.vision.deepstack_layers) > 1
    cases = [case for session in seeded_sessions(config) for case in session]
    assert len({selfcheck.session_key(case.inputs).tokens for case in cases}) > 1
    assert any(len(set(case.inputs.image_grids)) > 1 for case in cases)
    assert {case.inputs.preamble_length > 0 for case in cases} == {True, False}
    assert {case.inputs.pixel_values.shape[1] for case in cases} == {config.vision.frame_dim, config.vision.patch_dim}
    assert any(not case.inputs.attention_mask.all() for case in cases)
    lengths = [int(length) for case in cases for length in case.prefix_length]
    assert min(lengths) == 0
    assert max(lengths) == config.head.action_length - 1


def scaled(op: str, factor: float = 1.02):
    """The op's first output, times the factor."""

    def fault(patch):
        honest = getattr(FusedOps, op)
        # Where an op's outputs begin among its arguments.
        place = {"linear": 2, "swiglu": 2, "qkv": 3, "attention": 3, "lambda_attention": 7}[op]

        def run(self, *arguments, **options):
            honest(self, *arguments, **options)
            arguments[place].mul_(factor)

        patch.setattr(FusedOps, op, run)

    return fault


def changed(op: str, change):
    """The op called with what `change` makes of its arguments and options."""

    def fault(patch):
        honest = getattr(FusedOps, op)

        def run(self, *arguments, **options):
            arguments, options = change(list(arguments), dict(options))
            honest(self, *arguments, **options)

        patch.setattr(FusedOps, op, run)

    return fault


def swap_keys_and_values(arguments, options):
    if options.get("k_weight") is not None:
        arguments[3], arguments[4] = arguments[4], arguments[3]
    return arguments, options


def one_more_is_prefix(place):
    def change(arguments, options):
        arguments[place] = arguments[place] + 1
        return arguments, options

    return change


def option(name, value):
    return lambda arguments, options: (arguments, {**options, name: value(options[name])})


def without_deepstack(arguments, options):
    residual = options.get("residual")
    if residual is not None and residual.extra is not None:
        options["residual"] = replace(residual, extra=None, extra_index=None)
    return arguments, options


def image_tokens_moved(arguments, options):
    arguments[2] = torch.where(arguments[2] >= 0, (arguments[2] - 1).clamp(min=0), arguments[2])
    return arguments, options


def not_a_number(patch):
    honest = FusedOps.euler_step

    def run(self, *arguments):
        honest(self, *arguments)
        arguments[6].view(-1)[7] = torch.nan

    patch.setattr(FusedOps, "euler_step", run)


def one_wrong_column(patch):
    """Of one op in thousands of columns, as the edge of a tile gives it."""
    honest = FusedOps.swiglu

    def run(self, x, weight, out, **options):
        honest(self, x, weight, out, **options)
        if out.shape[-1] == 192:
            out[..., -1] = 3

    patch.setattr(FusedOps, "swiglu", run)


def unfolded_text(patch):
    patch.setattr(products, "fold_rms_norm", lambda norm, weights: norm.weight.fill_(1))


def unfolded_vision(patch):
    def fold(norm, linear):
        norm.weight.fill_(1)
        norm.bias.zero_()

    patch.setattr(products, "fold_layer_norm", fold)


TAP, KEYS, VALUES, CHUNK = "DeepStack tap 0", "KV keys of text layer 1", "KV values of text layer 1", "action chunk"
# fault, where it is first seen, whether bfloat16 tells it too.
FAULTS = {
    "linear 2 % off": (scaled("linear"), TAP, False),
    "qkv 2 % off": (scaled("qkv"), TAP, False),
    "swiglu 2 % off": (scaled("swiglu"), KEYS, False),
    "attention 2 % off": (scaled("attention"), TAP, False),
    "action attention 2 % off": (scaled("lambda_attention"), CHUNK, False),
    "keys for values": (changed("qkv", swap_keys_and_values), KEYS, True),
    "prefix begins one late": (changed("start_flow", one_more_is_prefix(2)), CHUNK, True),
    "prefix kept one longer": (changed("euler_step", one_more_is_prefix(7)), CHUNK, True),
    "window one wider": (changed("lambda_attention", option("window", lambda window: window + 1)), CHUNK, True),
    "offset one more": (changed("dit_rope_tables", option("offset", lambda offset: offset + 1)), CHUNK, False),
    "prompt not causal": (changed("attention", option("causal", lambda causal: False)), KEYS, True),
    "DeepStack left out": (changed("linear", without_deepstack), KEYS, True),
    "image tokens one off": (changed("embed", image_tokens_moved), KEYS, True),
    "one NaN": (not_a_number, CHUNK, True),
    "one wrong column": (one_wrong_column, KEYS, False),
    "norms of the text not folded": (unfolded_text, KEYS, True),
    "norms of the images not folded": (unfolded_vision, TAP, True),
}


@pytest.mark.parametrize(
    ("fault", "stage", "dtype"),
    [
        pytest.param(fault, stage, dtype, id=f"{name}, {str(dtype).removeprefix('torch.')}")
        for name, (fault, stage, in_bfloat16) in FAULTS.items()
        for dtype in (torch.float32, torch.bfloat16)[: 1 + in_bfloat16]
    ],
)
def test_a_fault_is_found_and_named(monkeypatch, fault, stage, dtype):
    fault(monkeypatch)
    found = first_fault(seeded(dtype))
    assert found is not None
    assert found.quantity.startswith(stage), found


def test_what_an_earlier_replay_left_is_found(monkeypatch):
    """A scratch counter that is not put back: right the first time, wrong ever after."""
    honest, calls = FusedOps.euler_step, []

    def run(self, *arguments):
        honest(self, *arguments)
        calls.append(self)
        if calls.count(self) > 2:
            arguments[6].view(-1)[3] += 1e-6

    monkeypatch.setattr(FusedOps, "euler_step", run)
    wrong = [each for each in seeded() if not each.passed]
    assert {each.case for each in wrong} == {
        "one row, op by op, again after another input", "one row, op by op, again at once",
        "two rows, op by op, again at once",
    }  # fmt: skip
    assert {(each.quantity, each.error) for each in wrong} == {(CHUNK, 1)}


def test_a_fault_of_the_kept_block_alone_is_found(monkeypatch):
    honest = FusedHead.run

    def run(self, ops, inputs, buffers, trace=None, **options):
        if int(inputs.begin.max()):
            inputs = replace(inputs, begin=inputs.begin + 1)
        return honest(self, ops, inputs, buffers, trace, **options)

    monkeypatch.setattr(FusedHead, "run", run)
    found = first_fault(seeded())
    assert (found.case, found.quantity) == ("two rows, kept KV block", CHUNK)


def test_a_fault_of_one_flow_is_found_in_that_flow_by_the_kernels(monkeypatch):
    """The kernels themselves, wherever they run: as a chain they pass."""
    pytest.importorskip("triton")
    honest = FusedOps.flow_loop

    def run(self, weights, inputs, buffers, **options):
        honest(self, weights, inputs, buffers, **{**options, "window": options["window"] + 1})

    monkeypatch.setattr(FusedOps, "flow_loop", run)
    whole = seeded_config()
    config = replace(
        whole,
        text=replace(whole.text, num_layers=2),
        vision=replace(whole.vision, depth=1, deepstack_layers=(0,)),
        head=replace(whole.head, num_layers=1, flow_steps=1, action_length=6),
    )
    case = make_case(config, "one row", [[(2, 2)]], [[1, 1]], [1], 0, preamble=2)
    model = seeded_model(config, DEVICE, torch.float32)
    found = list(check(model, [[case]], "triton", TacticTable("", flow="persistent")))
    assert first_fault(each for each in found if "op by op" in each.case) is None
    wrong = [each for each in found if not each.passed]
    # A kept block is sampled as the table says, too.
    assert {each.quantity for each in wrong} == {CHUNK}
    assert {"persistent flow" in each.case or "kept KV block" in each.case for each in wrong} == {True}
    assert len(wrong) == 2


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("dtype", "formats"),
    [(torch.bfloat16, (None, None)), (torch.float16, (None, None)), (torch.bfloat16, RECIPES["int8-all"]),
     (torch.float16, RECIPES["fp8"])],
    ids=str,
)  # fmt: skip
def test_the_kernels_pass(dtype, formats):
    model = seeded_model(seeded_config(), DEVICE, dtype, formats=formats)
    assert first_fault(check(model, seeded_sessions(model.config), "triton", TacticTable(""))) is None


def test_the_row_and_the_column_that_are_most_wrong_count():
    exact = torch.ones(2, 50, 100)
    row, column = exact.clone(), exact.clone()
    row[1, 7] += 0.5
    column[..., 99] += 0.5
    assert worst(row, exact) == pytest.approx(0.5)
    assert worst(column, exact) == pytest.approx(0.5)


def test_pytorch_s_own_error_sets_the_tolerance():
    exact = torch.ones(20, 30)
    plain = exact + 0.01
    assert judge("", "", exact + 0.029, plain, exact, torch.bfloat16).passed
    assert not judge("", "", exact + 0.031, plain, exact, torch.bfloat16).passed
    assert judge("", "", exact + 0.007, exact, exact, torch.bfloat16).passed
    assert not judge("", "", exact + 0.001, exact, exact, torch.float32).passed
    for broken in (torch.nan, torch.inf):
        assert not judge("", "", torch.full_like(exact, broken), plain, exact, torch.bfloat16).passed


def test_the_first_layers_are_the_checkpoints(tiny):
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(tiny.iterdir())}
    model, whole = checkpoint_model(tiny, CPU, torch.float32), load(tiny)
    expected = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name][: len(parameter)]), name
    list(check(model, checkpoint_sessions(model.config), "reference", TacticTable("")))
    assert before == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(tiny.iterdir())}
    # What the check folds is its own.
    for name, parameter in load(tiny).named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("config", [tiny_config(), small_config(), published_config()], ids=["tiny", "small", "4b"])
def test_the_first_layers_keep_the_sizes(config):
    shallow = first_layers(config)
    assert (shallow.vision.depth, shallow.text.num_layers, shallow.head.num_layers) == (2, 3, 2)
    assert shallow.vision.deepstack_layers == (0, 1)
    assert shallow.text.vocab_size <= 1024
    same = {"num_layers": config.text.num_layers, "vocab_size": config.text.vocab_size}
    assert replace(shallow.text, **same) == config.text
    assert replace(shallow.head, num_layers=config.head.num_layers) == config.head


def test_a_fault_shows_in_the_first_layers_too(tiny, monkeypatch):
    changed("linear", without_deepstack)(monkeypatch)
    model = checkpoint_model(tiny, CPU, torch.bfloat16)
    found = first_fault(check(model, checkpoint_sessions(model.config), "reference", TacticTable("")))
    assert (found.case, found.quantity) == ("first layers, op by op", KEYS)


def test_weights_that_are_not_finite_are_no_fault_of_the_kernels(tiny):
    model = checkpoint_model(tiny, CPU, torch.float32)
    model.head.sink.weight.data.fill_(torch.inf)
    model.finish_loading()
    with pytest.raises(ValueError, match=f"action chunk: {selfcheck.NOT_FINITE}"):
        list(check(model, checkpoint_sessions(model.config), "reference", TacticTable("")))


def test_a_model_that_the_kernels_lack_is_told(tiny, monkeypatch, capsys):
    class Lacking(selfcheck.FusedModel):
        def __init__(self, *_, **__):
            raise NotImplementedError("such heads have no kernels")

    monkeypatch.setattr(selfcheck, "FusedModel", Lacking)
    words = ["selfcheck", "--device", "cpu", "--dtype", "float32", "--checkpoint", str(tiny)]
    monkeypatch.setattr("sys.argv", words)
    selfcheck.main()
    *stages, last = (json.loads(line.removeprefix(selfcheck.MARK)) for line in capsys.readouterr().out.splitlines())
    assert stages == [{"stage": "loading"}, {"stage": "PyTorch"}]
    assert "have no kernels" in last["refused"]
