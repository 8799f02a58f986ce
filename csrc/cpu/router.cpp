#include "router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace dmoe::cpu {
namespace {

constexpr float kOut = -std::numeric_limits<float>::infinity();  // not a candidate

// The k best of one row, kept in order while candidates come in ascending id: ties stay with the lower id.
class Best {
 public:
  Best(int64_t k, int32_t* ids) : k_(k), ids_(ids), values_(k) {}
  void clear() { size_ = 0; }
  int64_t size() const { return size_; }

  void offer(float value, int32_t id) {
    if (!(value > kOut) || (size_ == k_ && !(value > values_[k_ - 1]))) return;
    int64_t at = size_ < k_ ? size_++ : k_ - 1;
    for (; at > 0 && value > values_[at - 1]; --at) {
      values_[at] = values_[at - 1];
      ids_[at] = ids_[at - 1];
    }
    values_[at] = value;
    ids_[at] = id;
  }

 private:
  int64_t k_, size_ = 0;
  int32_t* ids_;
  std::vector<float> values_;
};

// s and r of one token. Scores are rounded once, from double. A NaN logit scores 0 and is no candidate;
// nor is a NaN r, which is above nothing.
void score_row(const float* logits, const float* bias, int64_t experts, Score kind, float* score, float* selection) {
  if (kind == Score::sigmoid) {
    for (int64_t e = 0; e < experts; ++e)
      score[e] = static_cast<float>(1.0 / (1.0 + std::exp(-static_cast<double>(logits[e]))));
  } else {
    double top = -std::numeric_limits<double>::infinity();
    for (int64_t e = 0; e < experts; ++e) {
      if (logits[e] > top) top = logits[e];
    }
    // The limits of a softmax: equal shares among the +inf, and among all where everything is -inf.
    auto share = [&](float logit) { return logit == top ? 1.0 : std::exp(logit - top); };
    double sum = 0;
    for (int64_t e = 0; e < experts; ++e) {
      if (!std::isnan(logits[e])) sum += share(logits[e]);
    }
    for (int64_t e = 0; e < experts; ++e) score[e] = static_cast<float>(share(logits[e]) / sum);
  }
  for (int64_t e = 0; e < experts; ++e) {
    if (std::isnan(logits[e])) score[e] = 0;
    selection[e] = std::isnan(logits[e]) ? kOut : bias ? score[e] + bias[e] : score[e];
  }
}

// Stage 1: v of one block.
class Aggregator {
 public:
  Aggregator(const Routing& routing, int64_t experts)
      : routing_(routing),
        experts_(experts),
        k_(routing.aggregate == Aggregate::union_ ? routing.union_k : routing.top_k),
        ids_(k_),
        best_(k_, ids_.data()),
        total_(experts) {}

  void run(const float* score, const float* selection, int64_t tokens, float* value) {
    if (routing_.aggregate == Aggregate::max) {
      std::fill(value, value + experts_, kOut);
      for (int64_t i = 0; i < tokens * experts_; ++i) {
        float& v = value[i % experts_];
        v = std::max(v, selection[i]);
      }
      return;
    }
    std::fill(total_.begin(), total_.end(), 0.0);
    for (int64_t t = 0; t < tokens; ++t) vote(score + t * experts_, selection + t * experts_);
    std::copy(total_.begin(), total_.end(), value);
  }

 private:
  void vote(const float* score, const float* selection) {
    if (routing_.aggregate == Aggregate::sum) {
      const float sum = static_cast<float>(std::accumulate(score, score + experts_, 0.0));
      for (int64_t e = 0; e < experts_; ++e) total_[e] += score[e] / (sum + kEps);
      return;
    }
    best_.clear();
    for (int64_t e = 0; e < experts_; ++e) best_.offer(selection[e], static_cast<int32_t>(e));
    for (int64_t j = 0; j < best_.size(); ++j) {
      total_[ids_[j]] += routing_.aggregate == Aggregate::union_ ? 1.0 : selection[ids_[j]];
    }
  }

  const Routing& routing_;
  int64_t experts_, k_;
  std::vector<int32_t> ids_;
  Best best_;
  std::vector<double> total_;
};

// Experts in the order of their values, ties by their ids.
void rank(const float* value, std::vector<int32_t>& order) {
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return value[a] > value[b]; });  // none is NaN
}

// Stage 2: marks the coreset of one block in member[experts]. within: the experts there are, ascending.
void select_coreset(const Routing& routing, const float* value, const std::vector<int32_t>& within, int64_t experts,
                    uint8_t* member) {
  std::fill(member, member + experts, 0);
  if (routing.select == Select::all || routing.select == Select::nonzero) {
    for (int32_t e : within) member[e] = routing.select == Select::all || value[e] > 0;
    return;
  }
  std::vector<int32_t> order = within;
  rank(value, order);
  int64_t size = routing.capacity;
  if (routing.select == Select::top_p) {
    double total = 0;
    for (int32_t e : within) total += value[e];
    const float sum = static_cast<float>(total);
    double covered = 0;
    size = 1;
    for (int32_t e : order) {
      covered += value[e] / (sum + kEps);
      size += static_cast<float>(covered) <= routing.top_p;
    }
    size = std::min(std::max(size, routing.min_experts), routing.max_experts);
  }
  for (int64_t i = 0; i < std::min<int64_t>(size, order.size()); ++i) member[order[i]] = 1;
}

std::vector<int32_t> all_of(int64_t experts) {
  std::vector<int32_t> all(experts);
  std::iota(all.begin(), all.end(), 0);
  return all;
}

// The first experts, ascending, by what `blocks` rows of values give each: shares of their sums.
std::vector<int32_t> pool_of(const float* value, int64_t blocks, int64_t experts, int64_t capacity) {
  std::vector<double> total(experts);
  for (int64_t b = 0; b < blocks; ++b, value += experts) {
    double sum = 0;
    for (int64_t e = 0; e < experts; ++e) sum += std::max(value[e], 0.0f);
    const float votes = static_cast<float>(sum) + kEps;
    for (int64_t e = 0; e < experts; ++e) total[e] += value[e] == -kOut ? 1.0f : std::max(value[e], 0.0f) / votes;
  }
  std::vector<float> rounded(total.begin(), total.end());
  std::vector<int32_t> pool = all_of(experts);
  rank(rounded.data(), pool);
  pool.resize(std::min(capacity, experts));
  std::sort(pool.begin(), pool.end());
  return pool;
}

// Stage 2 of the blocks of one domain: value and member [blocks, experts] are theirs.
void share_pool(const BlockRoute& args, const Routing& routing, const float* value, int64_t blocks, uint8_t* member) {
  const int64_t experts = args.experts;
  std::vector<uint8_t> pool(experts);
  std::vector<int32_t> within = all_of(experts);
  if (args.pool_capacity) {
    within = pool_of(value, blocks, experts, args.pool_capacity);
    for (int32_t e : within) pool[e] = 1;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    uint8_t* in = member + b * experts;
    select_coreset(routing, value + b * experts, within, experts, in);
    if (args.pool_capacity) continue;
    for (int64_t e = 0; e < experts; ++e) pool[e] |= in[e];
  }
  if (!args.choose_in_pool) return;
  for (int64_t b = 0; b < blocks; ++b) std::copy(pool.begin(), pool.end(), member + b * experts);
}

// Stage 3: the experts of one token, best first, from scores that are kOut outside its coreset.
class Chooser {
 public:
  Chooser(const Routing& routing, int64_t experts)
      : routing_(routing),
        experts_(experts),
        groups_(routing.topk_group),
        kept_(routing.n_group),
        best_group_(routing.topk_group, groups_.data()) {}

  // Fills ids[top_k]; -1 marks a slot for which the coreset has no member left.
  void run(const float* candidates, int32_t* ids) {
    std::fill(ids, ids + routing_.top_k, -1);
    std::fill(kept_.begin(), kept_.end(), 1);
    if (routing_.n_group > 1) keep_groups(candidates);
    const int64_t inside = take(candidates, true, ids, routing_.top_k);
    if (inside < routing_.top_k) take(candidates, false, ids + inside, routing_.top_k - inside);
  }

 private:
  void keep_groups(const float* candidates) {
    const int64_t size = experts_ / routing_.n_group;
    std::fill(kept_.begin(), kept_.end(), 0);
    best_group_.clear();
    for (int64_t g = 0; g < routing_.n_group; ++g) {
      float first = kOut, second = kOut;
      for (int64_t e = g * size; e < (g + 1) * size; ++e) {
        if (candidates[e] > first) {
          second = first;
          first = candidates[e];
        } else if (candidates[e] > second) {
          second = candidates[e];
        }
      }
      best_group_.offer(first + second, static_cast<int32_t>(g));
    }
    for (int64_t i = 0; i < best_group_.size(); ++i) kept_[groups_[i]] = 1;
    // Groups with fewer than two candidates rank last, the lower first.
    int64_t free = routing_.topk_group - best_group_.size();
    for (int64_t g = 0; g < routing_.n_group && free > 0; ++g) {
      if (!kept_[g]) {
        kept_[g] = 1;
        --free;
      }
    }
  }

  int64_t take(const float* candidates, bool kept, int32_t* ids, int64_t k) {
    Best best(k, ids);
    const int64_t size = experts_ / routing_.n_group;
    for (int64_t g = 0; g < routing_.n_group; ++g) {
      if (static_cast<bool>(kept_[g]) != kept) continue;
      for (int64_t e = g * size; e < (g + 1) * size; ++e) best.offer(candidates[e], static_cast<int32_t>(e));
    }
    return best.size();
  }

  const Routing& routing_;
  int64_t experts_;
  std::vector<int32_t> groups_;
  std::vector<uint8_t> kept_;
  Best best_group_;
};

void weigh(const Routing& routing, const float* score, const int32_t* ids, float* weights) {
  double sum = 0;
  for (int64_t j = 0; j < routing.top_k; ++j) {
    weights[j] = ids[j] < 0 ? 0 : score[ids[j]];
    sum += weights[j];
  }
  const float norm = static_cast<float>(sum) + kEps;
  for (int64_t j = 0; j < routing.top_k; ++j) {
    if (routing.norm_topk_prob) weights[j] /= norm;
    weights[j] *= routing.routed_scaling_factor;
  }
}

// First row of every block, and the end: [n_blocks + 1].
std::vector<int64_t> block_begins(const BlockRoute& args, int64_t block_size) {
  std::vector<int64_t> begins;
  begins.reserve(args.n_blocks + 1);
  if (args.block_offsets) {
    begins.assign(args.block_offsets, args.block_offsets + args.n_blocks);
  } else {
    for (int64_t sequence = 0; sequence < args.tokens; sequence += args.seq_len) {
      for (int64_t row = 0; row < args.seq_len; row += block_size) begins.push_back(sequence + row);
    }
  }
  begins.push_back(args.tokens);
  return begins;
}

void write_coreset(const BlockRoute& args, int64_t block, const uint8_t* member) {
  int32_t* ids = args.coreset_ids + block * args.coreset_width;
  int32_t size = 0;
  for (int64_t e = 0; e < args.experts; ++e) {
    if (member[e]) ids[size++] = static_cast<int32_t>(e);
  }
  std::fill(ids + size, ids + args.coreset_width, -1);
  args.coreset_sizes[block] = size;
}

// Stages 1 and 2: fills member [n_blocks, experts], zeros at first, and the coresets of args.
void coresets(const BlockRoute& args, const Routing& routing, const std::vector<int64_t>& begins, const float* score,
              const float* selection, uint8_t* member, const ParallelFor& parallel) {
  const int64_t experts = args.experts;
  if (args.given) {
    const int32_t* id = args.given;
    for (int64_t b = 0; b < args.n_blocks; ++b, member += experts) {
      for (int64_t i = 0; i < args.coreset_width; ++i, ++id) {
        if (0 <= *id && *id < experts) member[*id] = 1;
      }
      write_coreset(args, b, member);
    }
    return;
  }
  const bool shared = args.domain_offsets != nullptr, votes = routing.select != Select::all || args.pool_capacity;
  const std::vector<int32_t> all = all_of(experts);
  std::vector<float> values(shared ? args.n_blocks * experts : 0);
  parallel(args.n_blocks, 1, [&](int64_t begin, int64_t end) {
    Aggregator aggregator(routing, experts);
    std::vector<float> own(experts);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t row = begins[b] * experts;
      float* value = shared ? &values[b * experts] : own.data();
      if (votes) aggregator.run(score + row, selection + row, begins[b + 1] - begins[b], value);
      if (shared) continue;
      select_coreset(routing, value, all, experts, member + b * experts);
      write_coreset(args, b, member + b * experts);
    }
  });
  if (!shared) return;
  parallel(args.n_domains, 1, [&](int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; ++d) {
      const int64_t first = args.domain_offsets[d], blocks = args.domain_offsets[d + 1] - first;
      share_pool(args, routing, values.data() + first * experts, blocks, member + first * experts);
      for (int64_t b = first; b < first + blocks; ++b) write_coreset(args, b, member + b * experts);
    }
  });
}

}  // namespace

void block_route(const BlockRoute& args, const Routing& routing, const ParallelFor& parallel) {
  const int64_t experts = args.experts;
  const std::vector<int64_t> begins = block_begins(args, routing.block_size);
  std::vector<float> score(args.tokens * experts), selection(args.tokens * experts);
  std::vector<uint8_t> member(args.n_blocks * experts);

  parallel(args.tokens, 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t * experts;
      score_row(args.logits + row, args.expert_bias, experts, routing.score, &score[row], &selection[row]);
    }
  });

  coresets(args, routing, begins, score.data(), selection.data(), member.data(), parallel);

  parallel(args.tokens, 4, [&](int64_t begin, int64_t end) {
    Chooser chooser(routing, experts);
    std::vector<float> candidates(experts);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t block = std::upper_bound(begins.begin(), begins.end(), t) - begins.begin() - 1;
      const uint8_t* in = &member[block * experts];
      for (int64_t e = 0; e < experts; ++e) candidates[e] = in[e] ? selection[t * experts + e] : kOut;
      int32_t* ids = args.topk_ids + t * routing.top_k;
      chooser.run(candidates.data(), ids);
      weigh(routing, &score[t * experts], ids, args.topk_weights + t * routing.top_k);
    }
  });
}

}  // namespace dmoe::cpu
