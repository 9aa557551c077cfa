// The operators called from C++, against the equations in nested loops.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdio>
#include <vector>

namespace {

using Outputs = std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Forward = Outputs(
    at::TensorList, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, const at::Tensor&,
    const std::optional<at::Tensor>&, bool);

auto cross_connect() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastroute::cross_connect", "").typed<Forward>();
  return op;
}

int failures = 0;

void expect(bool right, const char* what) {
  std::printf("%s: %s\n", right ? "ok" : "WRONG", what);
  failures += !right;
}

void routes_as_the_equations_say(at::MemoryFormat format) {
  const int64_t batch = 3, channels = 5, hidden = 4, m = 2, n = 3;
  std::vector<at::Tensor> xs;
  for (int64_t i = 0; i < m; ++i) xs.push_back(at::randn({batch, channels, 7, 6}).contiguous(format));
  const at::Tensor w1 = at::randn({m, hidden, channels}), b1 = at::randn({m, hidden});
  const at::Tensor w2 = at::randn({m, n, hidden}), b2 = at::randn({m, n});
  const auto [outputs, gates, scores, pooled, hiddens] = cross_connect().call(xs, w1, b1, w2, b2, /*relu=*/false);

  double worst = 0;
  for (int64_t s = 0; s < batch; ++s) {
    std::vector<at::Tensor> g;
    for (int64_t i = 0; i < m; ++i) {
      const at::Tensor z = xs[i][s].to(at::kDouble).mean({1, 2});                                   // Eq. 3.3
      const at::Tensor h = (at::mv(w1[i].to(at::kDouble), z) + b1[i]).relu();                       // Eq. 3.4
      g.push_back(at::softmax(at::mv(w2[i].to(at::kDouble), h) + b2[i], 0));                        // Eq. 3.5
      worst = std::max(worst, (gates[s][i] - g[i]).abs().max().item<double>());
    }
    for (int64_t j = 0; j < n; ++j) {
      at::Tensor y = at::zeros_like(xs[0][s], at::kDouble);
      for (int64_t i = 0; i < m; ++i) y += g[i][j] * xs[i][s];                                      // Eq. 3.7
      worst = std::max(worst, (outputs[j][s] - y).abs().max().item<double>());
    }
  }
  expect(worst < 1e-5, format == at::MemoryFormat::ChannelsLast ? "channels_last" : "contiguous");
  expect(outputs[0].is_contiguous(format), "the outputs have the format of the inputs");
}

void refuses_what_it_cannot_read() {
  bool refused = false;
  try {
    cross_connect().call(
        std::vector<at::Tensor>{at::randn({2, 3, 4, 4}), at::randn({2, 3, 5, 4})}, std::nullopt, std::nullopt,
        at::randn({2, 2, 3}), std::nullopt, /*relu=*/false);
  } catch (const c10::Error&) {
    refused = true;
  }
  expect(refused, "paths that differ in shape are refused");
}

}  // namespace

int main() {
  at::manual_seed(0);
  routes_as_the_equations_say(at::MemoryFormat::Contiguous);
  routes_as_the_equations_say(at::MemoryFormat::ChannelsLast);
  refuses_what_it_cannot_read();
  return failures != 0;
}
