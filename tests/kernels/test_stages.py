"""The barrier of the whole grid, alone: what each program wrote before it, all see behind it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tests.kernels.support import DEVICE
from xr0_engine.kernels.device import gdc_begin
from xr0_engine.kernels.launch import INTERPRETED, launch, processors
from xr0_engine.kernels.stages import arrive, leave, wait

PROGRAMS = 8
ROUNDS = 12
WORDS = 256
"""Two for every thread: the words of one thread are read by others."""


@triton.jit
def _pass_on(
    words, barrier, rounds, PROGRAMS: tl.constexpr, WORDS: tl.constexpr, COMPILED: tl.constexpr, PDL: tl.constexpr
):
    """In every round a program takes the next one's words of the round before, backwards, and adds 1."""
    program, count = tl.program_id(0), tl.num_programs(0)
    gdc_begin(PDL)
    word = tl.arange(0, WORDS)
    place = (program + 1) % count * WORDS + WORDS - 1 - word
    for stage in range(1, rounds + 1):
        arrive(barrier)
        wait(barrier, stage, COMPILED)
        turn = stage % 2
        value = tl.load(words + (1 - turn) * PROGRAMS * WORDS + place)
        tl.store(words + turn * PROGRAMS * WORDS + program * WORDS + word, value + 1)
    leave(barrier, rounds)


def test_all_programs_see_what_all_wrote():
    """Twice: the second launch finds the barrier as the first one did."""
    programs = min(PROGRAMS, processors(DEVICE))
    barrier = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    torch.manual_seed(0)
    for _ in range(2):
        given = torch.rand(programs, WORDS)
        words = torch.full((2, PROGRAMS, WORDS), torch.nan, device=DEVICE)
        words[0, :programs] = given.to(DEVICE)
        launch(
            _pass_on,
            (programs,),
            {
                "words": words,
                "barrier": barrier,
                "rounds": ROUNDS,
                "PROGRAMS": PROGRAMS,
                "WORDS": WORDS,
                "COMPILED": not INTERPRETED,
            },
            cooperative=True,
        )
        for _ in range(ROUNDS):
            given = given.roll(-1, 0).flip(1) + 1
        assert torch.equal(words[ROUNDS % 2, :programs].cpu(), given)
        assert barrier.item() == 0
