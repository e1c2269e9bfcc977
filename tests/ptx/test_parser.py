"""PTX texts as compilers and people write them, and what the emulator refuses of them by name."""

from __future__ import annotations

import pytest

from tests.ptx.decoder import decode
from tests.ptx.parser import parse, split_operands

HEAD = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
"""


def entry(body: str, parameters: str = "", directives: str = ".reqntid 128", head: str = HEAD) -> str:
    return f"{head}\n.visible .entry kernel({parameters})\n{directives}\n{{\n{body}\n}}\n"


def test_statements_know_where_they_stand():
    function = parse(
        entry(
            """
	.reg .pred 	%p<3>;
	.reg .b32 	%r<5>;
	// begin inline asm
	add.s32 %r1, %r2, 0x10; @!%p1 bra.uni $L__BB0_1; // two in a line
	// end inline asm
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1, %r2 },
		{ %r3,%r4 }, // in the middle
		[%r1 + -4];
$L__BB0_1: mov.b32 %r3, {%rs1, _};
$L__BB0_2:
	ret;"""
        )
    )
    told = [(s.opcode.split(".")[0], s.operands, s.predicate, s.negated, s.line) for s in function.statements]
    assert told == [
        ("add", ("%r1", "%r2", "0x10"), None, False, 13),
        ("bra", ("$L__BB0_1",), "%p1", True, 13),
        ("mma", ("{ %r1, %r2 }", "{ %r3,%r4 }", "[%r1 + -4]"), None, False, 15),
        ("mov", ("%r3", "{%rs1, _}"), None, False, 18),
        ("ret", (), None, False, 20),
    ]
    assert [statement.target for statement in function.statements] == [-1, 3, -1, -1, -1]


def test_scopes_have_their_own_registers_and_labels():
    """As every wait for a barrier in memory is written: each with a label and a predicate of the same names."""
    wait = """
	{
	.reg .pred complete, %p1;
	waitLoop:
	setp.eq.s32 complete, %r1, %r2;
	@complete bra.uni done;
	@!complete bra.uni waitLoop;
	done:
	}"""
    function = parse(entry(f".reg .b32 %r<3>;\n.reg .pred %p<2>;\n@%p1 bra done;{wait}{wait}\ndone: ret;"))
    assert [statement.target for statement in function.statements] == [7, -1, 4, 1, -1, 7, 4, -1]
    assert [statement.predicate for statement in function.statements[:4]] == ["%p1", None, "complete@1", "complete@1"]
    assert function.statements[4].operands == ("complete@2", "%r1", "%r2")
    assert function.registers == {
        "%r0": "b32", "%r1": "b32", "%r2": "b32", "%p0": "pred", "%p1": "pred",
        "complete@1": "pred", "%p1@1": "pred", "complete@2": "pred", "%p1@2": "pred",
    }  # fmt: skip


def test_lines_of_the_source_go_outwards():
    body = """
	.loc	1 10 0
	.loc	1 20 3
	mov.b32 %r1, 0;
	.loc	2 7 1, function_name $L__info_string0, inlined_at 1 20 3 // b.py:7:1
	.loc	3 5 9, function_name $L__info_string1, inlined_at 2 7 1
	mov.b32 %r1, 1;
	.loc	1 30 3
	mov.b32 %r1, 2;
	ret;
	.file	1 "/src//a.py"
	.file	2 "b.py" 0, 0
	.file	3 "c.py" """
    function = parse(entry(".reg .b32 %r<2>;" + body))
    frames = [function.locations[statement.location] for statement in function.statements]
    inner = (("c.py", 5), ("b.py", 7), ("/src//a.py", 20))
    assert frames == [(("/src//a.py", 20),), inner, (("/src//a.py", 30),), (("/src//a.py", 30),)]


def test_inline_assembly_is_of_one_line():
    body = """
	.loc	1 20 3
	// begin inline asm
	.loc	1 20 3
	mov.b32 %r1, 0;
	.loc	1 21 3
	mov.b32 %r1, 1;
	// end inline asm
	.loc	1 22 3
	ret;"""
    function = parse(entry(".reg .b32 %r<2>;" + body))
    assert [function.locations[statement.location][0][1] for statement in function.statements] == [20, 20, 22]


def test_parameters_are_laid_out_by_their_sizes():
    parameters = """
	.param .u32 a,
	.param .u64 .ptr .global .align 1 b,
	.param .b8 c,
	.param .u64 .ptr .align 16 d, .param .f32 e,
	.param .align 64 .b8 map[128]
"""
    function = parse(entry("ret;", parameters))
    places = {"a": (0, 4), "b": (8, 8), "c": (16, 1), "d": (24, 8), "e": (32, 4), "map": (64, 128)}
    assert function.parameters == places
    assert function.parameter_bytes == 192


def test_directives_and_shared_memory():
    head = HEAD + ".shared .align 8 .b8 barriers[24];\n.global .align 1 .b8 _$_str[3] = {95, 95, 0};\n"
    directives = ".explicitcluster\n.reqnctapercluster 2, 1, 1\n.maxntid 256, 1, 1\n.minnctapersm 1"
    function = parse(entry(".shared .b32 one;\nret;", directives=directives, head=head))
    assert (function.threads, function.cluster) == ((256, 1, 1), (2, 1, 1))
    assert function.shared == {"barriers": 0, "one": 24, "global_smem": 32}
    assert function.static_shared == 28
    assert function.unsupported == {"_$_str": "a variable in .global memory"}


def test_comments_of_c_hide_what_is_in_them():
    function = parse(entry(".reg .b32 %r<2>; /* mov.b32\n %r1, 9; */ mov.b32 %r1, /* one */ 1; ret;"))
    assert [(statement.opcode, statement.line) for statement in function.statements] == [("mov.b32", 10), ("ret", 10)]


@pytest.mark.parametrize(
    ("text", "operands"),
    [
        ("", ()),
        ("%r1", ("%r1",)),
        ("%r1|%p1, %r2, -1", ("%r1|%p1", "%r2", "-1")),
        ("[%r1+0], [ %rd2 + 64 ], 0x10, %r3", ("[%r1+0]", "[ %rd2 + 64 ]", "0x10", "%r3")),
        ("[%r1], [%rd1, {%r2, %r3}], [%r4]", ("[%r1]", "[%rd1, {%r2, %r3}]", "[%r4]")),
    ],
)
def test_operands(text, operands):
    assert split_operands(text) == operands


CALL = ".extern .func (.param .b32 func_retval0) vprintf(.param .b64 a, .param .b64 b);\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD, r"expected one .entry, found \[\]"),
        (entry("ret;") + entry("ret;", head=""), "expected one .entry"),
        (entry("ret;", head=HEAD + ".func (.reg .b32 r) helper(.reg .b32 a) { ret; }\n"), "beside the entry: helper"),
        (entry("bra $nowhere;"), r"branch to \$nowhere in line 9: there is no such label"),
        (entry(".tex .u32 t;"), r"declaration \.tex"),
        (entry("ret;", ".param .texref t"), r"parameter \.param \.texref t"),
    ],
    ids=["no entry", "two entries", "a function", "no label", "a declaration", "a parameter"],
)
def test_what_the_parser_refuses(text, message):
    with pytest.raises(NotImplementedError, match=message):
        parse(text)


def test_branches_go_to_statements_that_are_several_records():
    """The minimum of three is two."""
    least = "min.f32 %r1, %r2, %r3, %r4;"
    body = f".reg .pred %p<2>; .reg .b32 %r<9>;\n{least} @%p1 bra LAST; AGAIN: {least} bra AGAIN; LAST: {least} ret;"
    program = decode(entry(body))
    ops = [program.ops[record["op"]] for record in program.records]
    assert ops == ["min.f32", "min.f32", "bra", "min.f32", "min.f32", "bra", "min.f32", "min.f32", "ret", "ret"]
    assert [record["target"] for record in program.records if record["target"] >= 0] == [6, 3]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("frobnicate.b32 %r1, %r2;", r"kernel, PTX line 12: frobnicate\.b32 is not known"),
        ("add.sat.s32 %r1, %r2, %r3;", r"add\.sat\.s32 is not known"),
        ("mul.rz.f32 %r1, %r2, %r3;", r"mul\.rz\.f32 is not known"),
        ("add.s32 %r1, %r2, %rd1;", "add.s32 with %rd1 of type b64"),
        ("add.s64 %rd1, %rd1, %r1;", "add.s64 with %r1 of type b32"),
        ("add.s32 %r1, %r2;", "with 2 operands; 3 are known"),
        ("selp.b32 %r1, %r2, %r3, %r4;", "with %r4 of type b32"),
        ("ld.b32 %r1, [%rd1];", "of generic memory"),
        ("ld.global.v2.b32 {%r1, %r2, %r3}, [%rd1];", "with operands {%r1, %r2, %r3}"),
        ("ld.global.v2.b32 {%r1, %rd1}, [%rd1];", "with registers %r1, %rd1"),
        ("ld.global.b64 %r1, [%rd1];", "with registers %r1"),
        ("ld.global.b128 %rd1, [%rd1];", "of type b128"),
        ("ld.global.mmio.sys.b32 %r1, [%rd1];", "with .mmio"),
        ("ld.param.b32 %r1, [elsewhere];", "of elsewhere, which is no parameter"),
        ("mov.b64 %rd1, _$_str;", r"with operand _\$_str, a variable in \.global memory"),
        ("call.uni (%r1), vprintf, (%rd1, %rd2);", r"call\.uni is not known"),
        ("mov.b64 %rd1, vprintf;", "with operand vprintf, a function"),
        ("mov.u32 %r1, %envreg3;", "with operand %envreg3"),
        ("@%r1 mov.b32 %r1, 0;", "under %r1, which is no predicate"),
        ("mov.b32 5, %r1;", "writes 5, which is no register"),
        ("mma.sync.aligned.m16n8k16.row.row.f32.bf16.bf16.f32 {%r1}, {%r1}, {%r1}, {%r1};", "is not known"),
        ("cp.async.bulk.tensor.2d.shared::cta.global.im2col.mbarrier::complete_tx::bytes [%r1];", "is not known"),
        ("ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r1, %r2}, [%r3];", "is not known"),
        ("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 128;", "is not known"),
        (".reg .b128 %q<2>; ret;", "register %q0 of type b128"),
    ],
)  # fmt: skip
def test_what_the_decoder_refuses(statement, message):
    head = HEAD + ".global .align 1 .b8 _$_str[3] = {95, 95, 0};\n" + CALL
    body = f".reg .pred %p<3>; .reg .b32 %r<9>; .reg .b64 %rd<9>;\n{statement}\nret;"
    with pytest.raises(NotImplementedError, match=message):
        decode(entry(body, head=head))
