#include "races.h"

#include <algorithm>

namespace ptx {

Touch::Touch(Warp& warp, const Instruction& instruction, const Cells& cells, Block* shared_of, uint8_t traits)
    : warp(warp), instruction(instruction), cells(cells), shared(shared_of != nullptr), traits(traits) {
    // Barriers of another block order nothing here.
    const uint32_t known = !shared ? warp.global_floor : shared_of == warp.block ? warp.shared_floor : 0;
    floor = stamp(std::max(known, warp.machine->first_number), 0);
    number = warp.machine->settings.race ? warp.number(instruction, traits) : 0;
    if (shared && shared_of != warp.block && number) {
        note_foreign(*shared_of, {number, warp.agent(), warp.order.clock});
    }
}

bool Touch::quiet(size_t cell, size_t count, Stamp mine) const {
    const Stamp* writes = cells.writes + cell;
    const Stamp* reads = cells.reads + cell;
    bool quiet = true;
    for (size_t i = 0; i < count; ++i) {
        quiet &= (writes[i] < floor) & ((reads[i] < floor) | (reads[i] == mine));
    }
    return quiet;
}

void Touch::split(size_t cell) {
    if (cells.writes[cell] == kSplit) {
        return;
    }
    cells.byte_writes[2 * cell] = cells.byte_writes[2 * cell + 1] = cells.writes[cell];
    cells.byte_reads[2 * cell] = cells.byte_reads[2 * cell + 1] = cells.reads[cell];
    cells.writes[cell] = cells.reads[cell] = kSplit;
}

bool Touch::quiet_row(size_t offset, size_t bytes) const {
    return bytes % 2 == 0 && offset % 2 == 0 && quiet(offset / 2, kLanes * bytes / 2, 0);
}

void Touch::read_row(size_t offset, size_t bytes) {
    if (!quiet_row(offset, bytes)) {
        for (int lane = 0; lane < kLanes; ++lane) {
            read(offset + lane * bytes, bytes, lane);
        }
        return;
    }
    Stamp* reads = cells.reads + offset / 2;
    for (int lane = 0; lane < kLanes; ++lane) {
        reads = std::fill_n(reads, bytes / 2, stamp(number, lane));
    }
}

void Touch::write_row(size_t offset, size_t bytes, const uint8_t* before, const uint8_t* after) {
    if (!quiet_row(offset, bytes)) {
        for (int lane = 0; lane < kLanes; ++lane) {
            write(offset + lane * bytes, bytes, lane, before + lane * bytes, after + lane * bytes);
        }
        return;
    }
    std::fill_n(cells.reads + offset / 2, kLanes * bytes / 2, 0);
    Stamp* writes = cells.writes + offset / 2;
    for (int lane = 0; lane < kLanes; ++lane) {
        writes = std::fill_n(writes, bytes / 2, stamp(number, lane));
    }
}

void Touch::read_any(size_t offset, size_t bytes, uint32_t lane) {
    const Stamp mine = stamp(number, lane);
    if ((offset | bytes) & 1) {
        for (size_t byte = offset; byte < offset + bytes; ++byte) {
            split(byte / 2);
            read_stamps(cells.byte_writes[byte], cells.byte_reads[byte], mine);
        }
        return;
    }
    const size_t first = offset / 2, count = bytes / 2;
    if (bytes != kUsual && bytes != 2 * kUsual && quiet(first, count, mine)) {
        std::fill_n(cells.reads + first, count, mine);
        return;
    }
    // Cells that remember the same are looked at once.
    for (size_t cell = first, next = first; cell < first + count; cell = next) {
        const Stamp written = cells.writes[cell], before = cells.reads[cell];
        do {
            ++next;
        } while (next < first + count && cells.writes[next] == written && cells.reads[next] == before &&
                 written != kSplit);
        if (written == kSplit) {
            read_split(cell, mine);
            continue;
        }
        Stamp reads = before;
        read_stamps(written, reads, mine);
        std::fill_n(cells.reads + cell, next - cell, reads);
    }
}

void Touch::read_split(size_t cell, Stamp mine) {
    for (size_t byte = 2 * cell; byte < 2 * cell + 2; ++byte) {
        read_stamps(cells.byte_writes[byte], cells.byte_reads[byte], mine);
    }
}

void Touch::read_stamps(Stamp written, Stamp& reads, Stamp mine) {
    if (written >= floor && number_of(written) != ordered_number) {
        uint32_t culprit = 0;
        const Verdict verdict = judge_all(written, mine, traits & kAtomic, culprit);
        if (verdict != Verdict::kOrdered) {
            report(verdict, culprit, "read", "write");
        }
    }
    reads = reads < floor ? mine : with(reads, mine, kSet);
}

Stamp Touch::with(Stamp before, Stamp mine, uint8_t kind) {
    Accesses& accesses = warp.machine->accesses;
    if (number_of(before) == number_of(mine)) {
        return before == mine ? mine : stamp(number, kManyLanes);
    }
    if (before == joined_before && mine == joined_mine) {
        return joined;
    }
    const Access& old = accesses[number_of(before)];
    const bool own = old.agent == warp.agent() && !(old.traits & kSet);
    if (own && (lane_of(before) == lane_of(mine) || number_of(before) < warp.lane_floor)) {
        return mine;
    }
    if (old.traits & kSet && old.agent == number) {
        return before;
    }
    joined_before = before;
    joined_mine = mine;
    joined = stamp(accesses.both(number_of(before), number, kind), kManyLanes);
    return joined;
}

void Touch::write_any(size_t offset, size_t bytes, uint32_t lane, const uint8_t* before, const uint8_t* after) {
    const Stamp mine = stamp(number, lane);
    if ((offset | bytes) & 1) {
        for (size_t byte = offset; byte < offset + bytes; ++byte) {
            split(byte / 2);
            const bool same = after && before[byte - offset] == after[byte - offset];
            write_stamps(cells.byte_writes[byte], cells.byte_reads[byte], mine, same);
        }
        return;
    }
    const size_t first = offset / 2, count = bytes / 2;
    if (bytes != kUsual && quiet(first, count, mine)) {
        std::fill_n(cells.writes + first, count, mine);
        std::fill_n(cells.reads + first, count, 0);
        return;
    }
    for (size_t i = 0; i < count; ++i) {
        const size_t cell = first + i;
        const bool same = after && std::memcmp(before + 2 * i, after + 2 * i, 2) == 0;
        if (cells.writes[cell] != kSplit) {
            write_stamps(cells.writes[cell], cells.reads[cell], mine, same);
            continue;
        }
        for (size_t byte = 2 * cell; byte < 2 * cell + 2; ++byte) {
            write_stamps(cells.byte_writes[byte], cells.byte_reads[byte], mine, same);
        }
        if (cells.byte_writes[2 * cell] == cells.byte_writes[2 * cell + 1] &&
            cells.byte_reads[2 * cell] == cells.byte_reads[2 * cell + 1]) {
            cells.writes[cell] = cells.byte_writes[2 * cell];
            cells.reads[cell] = cells.byte_reads[2 * cell];
        }
    }
}

bool Touch::same_line(Stamp written) const {
    return written >= floor && warp.machine->accesses[number_of(written)].line == instruction.line;
}

void Touch::write_stamps(Stamp& written, Stamp& reads, Stamp mine, bool same) {
    // Writing what is there changes nothing: replicated values are stored by several warps and lanes. In global memory
    // only the same instruction does that on purpose.
    if (same && (shared || same_line(written))) {
        written = written < floor ? mine : with(written, mine, kSet | kSameValue);
        return;
    }
    uint32_t culprit = 0;
    Stamp after = mine;
    if (written >= floor && number_of(written) != ordered_number) {
        const Verdict verdict = judge_all(written, mine, traits & kAtomic, culprit);
        if (verdict != Verdict::kOrdered) {
            report(verdict, culprit, "write", "write");
        }
        // Those who come later must be ordered behind all atomics, which need no order among themselves.
        const bool atomics = warp.machine->accesses[number_of(written)].traits & traits & kAtomic;
        if (atomics && judge_all(written, mine, 0, culprit) != Verdict::kOrdered) {
            after = with(written, mine, kSet | kAtomic);
        }
    }
    if (reads >= floor) {
        const Verdict verdict = judge_all(reads, mine, traits & kAtomic, culprit);
        if (verdict != Verdict::kOrdered) {
            report(verdict, culprit, "write", "read");
        }
    }
    written = after;
    reads = 0;
}

Touch::Verdict Touch::judge(Stamp earlier, Stamp mine) {
    const Access& access = warp.machine->accesses[number_of(earlier)];
    const int lane = lane_of(mine), earlier_lane = lane_of(earlier);
    if (access.agent == warp.agent()) {
        const bool apart =
            number_of(earlier) >= warp.lane_floor && lane >= 0 && earlier_lane >= 0 && lane != earlier_lane;
        return apart ? Verdict::kLanes : Verdict::kOrdered;
    }
    const uint32_t home = warp.block->home;
    if (!shared && home_of(access.agent) < warp.earliest_home) {
        ordered_number = number_of(earlier);
        return Verdict::kOrdered;
    }
    if (warp.order.view.covers(access.agent, access.clock, earlier_lane, home)) {
        ordered_number = earlier_lane < 0 ? number_of(earlier) : ordered_number;
        return Verdict::kOrdered;
    }
    const View& view = warp.order.seen_by(lane);
    return view.covers(access.agent, access.clock, earlier_lane, home) ? Verdict::kOrdered : Verdict::kUnordered;
}

Touch::Verdict Touch::judge_all(Stamp earlier, Stamp mine, uint8_t tolerated, uint32_t& culprit) {
    const Access& access = warp.machine->accesses[number_of(earlier)];
    if (access.traits & kSet) {
        return judge_set(number_of(earlier), mine, tolerated, culprit);
    }
    culprit = number_of(earlier);
    return access.traits & tolerated ? Verdict::kOrdered : judge(earlier, mine);
}

Touch::Verdict Touch::judge_set(uint32_t set, Stamp mine, uint8_t tolerated, uint32_t& culprit) {
    // Of writes of one value, one that is ordered is enough; atomics each change it.
    const bool any = warp.machine->accesses[set].traits & kSameValue;
    Verdict worst = Verdict::kOrdered;
    for (uint32_t at = set;;) {
        const Access access = warp.machine->accesses[at];
        const uint32_t member = access.traits & kSet ? access.agent : at;
        const bool ignored = warp.machine->accesses[member].traits & tolerated;
        // Which lanes they were is no longer known.
        const Verdict verdict = ignored ? Verdict::kOrdered : judge(stamp(member, kManyLanes), mine);
        if (any && verdict == Verdict::kOrdered) {
            return verdict;
        }
        if (verdict != Verdict::kOrdered && worst == Verdict::kOrdered) {
            worst = verdict;
            culprit = member;
            if (!any) {
                return worst;
            }
        }
        if (!(access.traits & kSet)) {
            return worst;
        }
        at = access.link;
    }
}

void Touch::report(Verdict verdict, uint32_t culprit, const char* what, const char* earlier) {
    Machine& machine = *warp.machine;
    const Access access = machine.accesses[culprit];
    const Place at = warp.place(instruction);
    const uint32_t home = home_of(access.agent);
    int32_t grid = 0;
    for (const GridRun& run : machine.grids) {
        grid = home >= run.first_home ? run.number : grid;
    }
    const Place other{access.line, grid};
    const char* atomic = access.traits & kAtomic ? "atomic " : "";
    const char* space = shared ? "shared" : "global";
    if (verdict == Verdict::kLanes) {
        machine.reports.add(Kind::kLaneRace, at, other,
                            "%s %s by one lane, %s by another lane of the warp before, bar.warp.sync not between",
                            space, what, earlier);
    } else if (shared && access.traits & (kCopy | kAsync) && *earlier == 'w' && *what == 'r') {
        machine.reports.add(
            Kind::kUnwaitedCopy, at, other,
            "shared read of a copy that this warp neither waited for nor had a barrier after the wait of");
    } else if (shared) {
        machine.reports.add(Kind::kSharedRace, at, other, "shared %s not ordered after %s%s by another warp%s", what,
                            atomic, earlier, home == warp.block->home ? "" : " of another block");
    } else if (grid != at.grid) {
        machine.reports.add(Kind::kDependencyRace, at, other,
                            "global %s not ordered after %s%s by the %s grid: griddepcontrol.wait missing or too late",
                            what, atomic, earlier, grid < at.grid ? "earlier" : "later");
    } else {
        machine.reports.add(Kind::kGlobalRace, at, other, "global %s not ordered after %s%s by another %s", what,
                            atomic, earlier, home == warp.block->home ? "warp of the block" : "block");
    }
}

}  // namespace ptx
