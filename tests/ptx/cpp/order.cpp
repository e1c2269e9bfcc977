#include "order.h"

#include <algorithm>

namespace ptx {

void join(Row& row, const Row& other) {
    if (row.size() < other.size()) {
        row.resize(other.size());
    }
    for (size_t i = 0; i < other.size(); ++i) {
        row[i].join(other[i]);
    }
}

const Seen* Rows::find(Agent agent) const {
    const auto at = std::lower_bound(homes.begin(), homes.end(), home_of(agent));
    if (at == homes.end() || *at != home_of(agent)) {
        return nullptr;
    }
    const Row& row = rows[at - homes.begin()];
    return slot_of(agent) < row.size() ? &row[slot_of(agent)] : nullptr;
}

Row& Rows::row(uint32_t home) {
    const auto at = std::lower_bound(homes.begin(), homes.end(), home);
    const auto index = at - homes.begin();
    if (at == homes.end() || *at != home) {
        homes.insert(at, home);
        rows.insert(rows.begin() + index, Row());
    }
    return rows[index];
}

void Rows::join(const Rows& other) {
    if (homes == other.homes) {
        for (size_t i = 0; i < rows.size(); ++i) {
            ptx::join(rows[i], other.rows[i]);
        }
        return;
    }
    for (size_t i = 0; i < other.homes.size(); ++i) {
        ptx::join(row(other.homes[i]), other.rows[i]);
    }
}

void Rows::clear() {
    homes.clear();
    rows.clear();
}

void View::join(const View& other) {
    ptx::join(own, other.own);
    if (!other.others || others == other.others) {
        return;
    }
    if (!others) {
        others = other.others;
        return;
    }
    auto both = std::make_shared<Rows>(*others);
    both->join(*other.others);
    others = std::move(both);
}

void View::join(const Rows& rows, uint32_t home) {
    auto both = others ? std::make_shared<Rows>(*others) : std::make_shared<Rows>();
    for (size_t i = 0; i < rows.homes.size(); ++i) {
        ptx::join(rows.homes[i] == home ? own : both->row(rows.homes[i]), rows.rows[i]);
    }
    others = std::move(both);
}

bool View::covers(Agent agent, uint32_t clock, int lane, uint32_t home) const {
    if (home_of(agent) == home) {
        return slot_of(agent) < own.size() && own[slot_of(agent)].covers(clock, lane);
    }
    const Seen* seen = others ? others->find(agent) : nullptr;
    return seen && seen->covers(clock, lane);
}

void Order::reset(uint32_t slots) {
    clock = synchronised = 1;
    view.own.assign(slots, Seen());
    view.others.reset();
    acquired.own.clear();
    acquired.others.reset();
    acquirers = 0;
    unfenced.reset();
    fenced.reset();
    proxied.assign(slots, 0);
    last_acquired = {};
}

}  // namespace ptx
