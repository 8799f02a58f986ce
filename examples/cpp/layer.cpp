// A block of tokens through routing and experts without Python: on a Hopper GPU if there is one, else on the CPU.
#include <dmoe/cpu/experts.h>
#include <dmoe/cpu/router.h>

#include <cmath>
#include <cstdio>

#include "layer_cuda.h"

int main() {
  const int64_t T = 32, H = 64, I = 32, E = 16, k = 4;
  const dmoe::Routing routing{.top_k = k,
                              .block_size = T,
                              .n_group = 4,
                              .topk_group = 2,
                              .score = dmoe::Score::sigmoid,
                              .aggregate = dmoe::Aggregate::topk_sum,
                              .select = dmoe::Select::top_p,
                              .min_experts = 6,
                              .max_experts = E,
                              .capacity = 0,
                              .union_k = 0,
                              .norm_topk_prob = true,
                              .top_p = 0.6f,
                              .routed_scaling_factor = 2.5f};
  const auto wave = [](int64_t n, double step) {
    std::vector<float> values(n);
    for (int64_t i = 0; i < n; ++i) values[i] = static_cast<float>(std::sin(step * i));
    return values;
  };
  Layer layer{
      wave(T * H, 0.7), wave(E * H, 1.3), wave(E * 2 * I * H, 0.9), wave(E * H * I, 1.1), {}, {}, {}, {}, {}, {}};
  layer.logits.resize(T * E), layer.ids.resize(T * k), layer.weights.resize(T * k);
  layer.coreset.resize(E), layer.size.resize(1), layer.y.resize(T * H);

  if (!run_on_gpu(layer, routing)) {
    using namespace dmoe::cpu;
    const ParallelFor serial = [](int64_t n, int64_t, const auto& body) { body(0, n); };
    linear_f32(layer.x.data(), Dtype::f32, layer.gate.data(), Dtype::f32, T, H, E, layer.logits.data(), serial);
    block_route({T, E, 1, E, layer.logits.data(), nullptr, nullptr, T, layer.ids.data(), layer.weights.data(),
                 layer.coreset.data(), layer.size.data()},
                routing, serial);
    experts_forward({T, H, I, E, k, Dtype::f32, layer.x.data(), layer.w13.data(), layer.w2.data(), layer.ids.data(),
                     layer.weights.data(), 0, nullptr, nullptr, layer.y.data()},
                    serial);
  }
  std::printf("coreset:");
  for (int i = 0; i < layer.size[0]; ++i) std::printf(" %d", layer.coreset[i]);
  double sum = 0;
  for (float value : layer.y) sum += std::fabs(value);
  std::printf("\nmean |y|: %.5f\n", sum / layer.y.size());
}
