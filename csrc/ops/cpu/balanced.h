// One parallel loop over the work of many jobs of different size.
#pragma once

#include <algorithm>
#include <vector>

#include "ops/cpu/common.h"

namespace qlora::ops_cpu {

// Calls run(job, begin, end) for ranges of each job's units. Threads get ranges of about equal cost, so that one large
// job is divided and many small ones are not. `units_of(job)` counts units, `cost(job)` is the cost of one unit in
// multiply-adds.
template <class Job, class Units, class Cost, class Run>
void run_balanced(const std::vector<Job>& jobs, const Units& units_of, const Cost& cost, const Run& run) {
  // A unit without products still has results to write.
  const auto cost_of = [&](const Job& job) { return std::max(cost(job), int64_t{1}); };
  constexpr int64_t kLeastCost = 1 << 17, kMostParts = 1024;  // below the least cost a thread costs more than it saves
  std::vector<int64_t> first_cost{0};                         // of each job, and the end
  for (const Job& job : jobs) first_cost.push_back(first_cost.back() + units_of(job) * cost_of(job));
  const int64_t total = first_cost.back();
  if (total == 0) return;
  const int64_t parts = std::clamp(total / kLeastCost, int64_t{1}, kMostParts);
  parallel(parts, 1, [&](int64_t begin, int64_t end) {
    const auto cost_at = [&](int64_t part) {
      return static_cast<int64_t>(static_cast<double>(total) * static_cast<double>(part) / static_cast<double>(parts));
    };
    const int64_t from = cost_at(begin), to = end == parts ? total : cost_at(end);
    auto job = static_cast<size_t>(std::upper_bound(first_cost.begin(), first_cost.end(), from) - first_cost.begin());
    // A unit belongs to the thread in whose range its middle lies, so ranges are wrong by at most half a unit.
    for (job = job > 0 ? job - 1 : 0; job < jobs.size() && first_cost[job] < to; ++job) {
      const int64_t unit_cost = cost_of(jobs[job]), units = units_of(jobs[job]);
      const auto unit_at = [&](int64_t at) {
        const int64_t twice = 2 * (at - first_cost[job]) - unit_cost;
        return std::clamp(ceil_div(std::max(twice, int64_t{0}), 2 * unit_cost), int64_t{0}, units);
      };
      const int64_t first = unit_at(from), last = unit_at(to);
      if (first < last) run(jobs[job], first, last);
    }
  });
}

}  // namespace qlora::ops_cpu
