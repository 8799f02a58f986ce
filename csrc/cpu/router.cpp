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

// Stage 2: marks the coreset of one block in member[experts].
void select_coreset(const Routing& routing, const float* value, int64_t experts, uint8_t* member) {
  if (routing.select == Select::all || routing.select == Select::nonzero) {
    for (int64_t e = 0; e < experts; ++e) member[e] = routing.select == Select::all || value[e] > 0;
    return;
  }
  std::vector<int32_t> order(experts);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return value[a] > value[b]; });  // none is NaN
  int64_t size = routing.capacity;
  if (routing.select == Select::top_p) {
    const float sum = static_cast<float>(std::accumulate(value, value + experts, 0.0));
    double covered = 0;
    size = 1;
    for (int32_t e : order) {
      covered += value[e] / (sum + kEps);
      size += static_cast<float>(covered) <= routing.top_p;
    }
    size = std::min(std::max(size, routing.min_experts), routing.max_experts);
  }
  std::fill(member, member + experts, 0);
  for (int64_t i = 0; i < std::min(size, experts); ++i) member[order[i]] = 1;
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

  parallel(args.n_blocks, 1, [&](int64_t begin, int64_t end) {
    Aggregator aggregator(routing, experts);
    std::vector<float> value(experts);
    for (int64_t b = begin; b < end; ++b) {
      uint8_t* in = &member[b * experts];
      if (routing.select != Select::all) {
        const int64_t row = begins[b] * experts;
        aggregator.run(&score[row], &selection[row], begins[b + 1] - begins[b], value.data());
      }
      select_coreset(routing, value.data(), experts, in);
      int32_t* ids = args.coreset_ids + b * args.coreset_width;
      int32_t size = 0;
      for (int64_t e = 0; e < experts; ++e) {
        if (in[e]) ids[size++] = static_cast<int32_t>(e);
      }
      std::fill(ids + size, ids + args.coreset_width, -1);
      args.coreset_sizes[b] = size;
    }
  });

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
