// Cross-prediction (Alg. 1) from PyTorch's convolutions and the compiled passes between them.
//
// The backward is the same for both forms of the forward. With dP_j the gradient before the ReLU:
//
//     T_ij = W_ijᵀ dP_j, for all i at once
//     dg_ij = <T_ij, X_i> + <b_ij, Σ dP_j>, since <dP_j, W_ij X_i> = <W_ijᵀ dP_j, X_i>
//     dX_i = Σ_j g_ij T_ij
//     dW_ij, from X_i and g_ij dP_j
//     db_ij = Σ_s g_ij Σ dP_j
//
// so that the m·n predictions need not be saved in the forward. A joined tensor holds several paths concatenated along its
// channels. fastroute/backends/_cross_predict.py does the same with Triton's passes.

#include "ops/route.h"
#include "paths.h"

#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <utility>

namespace fastroute {
namespace {

using Tensors = std::vector<at::Tensor>;

// outputs_j = ReLU(Σ_i g_ij U_ij + offsets_j). predictions[i] joins U_ij over j.
void sum_predictions(
    at::TensorList predictions, const at::Tensor& gates, const OptionalTensor& offsets, bool relu,
    at::TensorList outputs) {
  static const auto op =
      find_operator<void(at::TensorList, const at::Tensor&, const OptionalTensor&, bool, at::TensorList)>(
          "fastroute_native::sum_predictions");
  op.call(predictions, gates, offsets, relu, outputs);
}

// masked_p = paths_p where masks_p > 0, else 0; without masks, masked_p = paths_p. scaled[q] joins w_pq masked_p over p. With
// `sums`, returns the sums (N, P, C) of masked over space.
at::Tensor scale_paths(
    at::TensorList paths, at::TensorList masks, const at::Tensor& weights, bool sums, at::TensorList masked,
    at::TensorList scaled) {
  static const auto op = find_operator<at::Tensor(
      at::TensorList, at::TensorList, const at::Tensor&, bool, at::TensorList, at::TensorList)>(
      "fastroute_native::scale_paths");
  return op.call(paths, masks, weights, sums, masked, scaled);
}

// products_ij = <T_ij, X_i>, and grad_xs_i = Σ_j g_ij T_ij unless grad_xs is empty. terms[j] joins T_ij over i. xs have the
// memory format of the convolutions, grad_xs that of the paths.
at::Tensor sum_gradients(
    at::TensorList terms, at::TensorList xs, const at::Tensor& gates, at::TensorList grad_xs) {
  static const auto op = find_operator<at::Tensor(at::TensorList, at::TensorList, const at::Tensor&, at::TensorList)>(
      "fastroute_native::sum_gradients");
  return op.call(terms, xs, gates, grad_xs);
}

// Returns whether each kernel position reads the map itself, not only padding, and the kernel fits in the map. Otherwise,
// PyTorch's convolutions on a CPU crash or are wrong, in float32 too.
bool kernel_fits(
    const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation) {
  for (size_t d = 0; d < stride.size(); ++d) {
    const auto dim = static_cast<int64_t>(d);
    const int64_t size = x.size(2 + dim), k = weight.size(4 + dim), reach = dilation[d] * (k - 1);
    if (reach >= size) return false;
    const int64_t last = (size + 2 * padding[d] - reach - 1) / stride[d];
    for (int64_t position = 0; position < k; ++position) {
      const int64_t at = position * dilation[d] - padding[d];  // for the first output
      const int64_t output = at < 0 ? (stride[d] - 1 - at) / stride[d] : 0;  // the first that reads the map
      if (output > last || output * stride[d] + at >= size) return false;
    }
  }
  return true;
}

// The geometry with which PyTorch's convolution is right, and the map that it needs; see fastroute/ops/_convolution.py.
struct Geometry {
  std::vector<int64_t> stride, padding, dilation;
  std::vector<int64_t> sides;  // zeros to add on both sides of each spatial size of the map
  std::vector<int64_t> kept;   // positions to keep then, from the first; kAll keeps all
  static constexpr int64_t kAll = -1;

  at::Tensor prepare(at::Tensor x) const {
    if (std::any_of(sides.begin(), sides.end(), [](int64_t side) { return side != 0; })) {
      std::vector<int64_t> pads;
      for (size_t d = sides.size(); d-- > 0;) pads.insert(pads.end(), 2, sides[d]);
      x = at::constant_pad_nd(x, pads);
    }
    for (size_t d = 0; d < kept.size(); ++d) {
      if (kept[d] != kAll) x = x.narrow(static_cast<int64_t>(d) + 2, 0, kept[d]);
    }
    return x;
  }

  // Returns the gradient of a map of the shape of `like` from that of the prepared one.
  at::Tensor restore(at::Tensor grad, const at::Tensor& like) const {
    for (size_t d = 0; d < sides.size(); ++d) {
      if (sides[d] == 0 && kept[d] == kAll) continue;
      const auto dim = static_cast<int64_t>(d) + 2;
      if (const int64_t cut = like.size(dim) + 2 * sides[d] - grad.size(dim)) {
        std::vector<int64_t> pads(2 * (sides.size() - d));
        pads.back() = cut;
        grad = at::constant_pad_nd(grad, pads);
      }
      grad = grad.narrow(dim, sides[d], like.size(dim));
    }
    return grad;
  }
};

// Returns the geometry with which PyTorch is right for a map and a weight. On a CPU
// - the map is padded first where the kernel does not fit it;
// - the dilation is 1 along a kernel of size 1, where it has no effect and bfloat16 convolutions crash with other values;
// - the stride is 1 along a size with a single output, where it has no effect and bfloat16 convolutions are wrong on
//   processors with AMX: the map is cut to the positions that the kernel reads.
Geometry correct_geometry(
    const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation) {
  const size_t dims = stride.size();
  Geometry g{stride.vec(), padding.vec(), dilation.vec(), std::vector<int64_t>(dims),
             std::vector<int64_t>(dims, Geometry::kAll)};
  for (size_t d = 0; d < dims; ++d) {
    if (weight.size(4 + static_cast<int64_t>(d)) == 1) g.dilation[d] = 1;
  }
  if (!x.is_cpu()) return g;
  const bool fits = kernel_fits(x, weight, stride, padding, g.dilation);
  for (size_t d = 0; d < dims; ++d) {
    const auto dim = static_cast<int64_t>(d);
    const int64_t read = g.dilation[d] * (weight.size(4 + dim) - 1) + 1;
    const bool single = stride[d] > 1 && (x.size(2 + dim) + 2 * padding[d] - read) / stride[d] == 0;
    if (single) g.stride[d] = 1, g.kept[d] = read;
    if (single || !fits) g.sides[d] = std::exchange(g.padding[d], 0);
  }
  return g;
}

// Returns a map of one channel with the strides of [C, *S]; with one channel, both formats are the same in memory. PyTorch's
// float32 convolutions on a CPU are wrong for some geometries if the strides are those of [*S, C].
at::Tensor plain(const at::Tensor& x) { return x.size(1) == 1 ? x.squeeze(1).unsqueeze(1) : x; }

// A convolution of x (N, C, *S) with weight (C', C, *k), or a dense layer without spatial dimensions. Results are [*S, C] in
// memory with `channels_last`, else [C, *S]. PyTorch gets all tensors in `type`; maps are converted back, the weight's gradient
// is not.
struct Convolution {
  Geometry geometry;
  bool channels_last;
  at::ScalarType type;

  at::Tensor arrange(const at::Tensor& x) const { return channels_last ? to_channels_last(x) : x.contiguous(); }

  at::Tensor forward(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) const {
    const OptionalTensor b = bias ? OptionalTensor(bias->to(type)) : bias;
    if (x.dim() == 2) return at::linear(x.to(type), weight.to(type), b).to(x.scalar_type());
    const at::Tensor y = at::convolution(
        map(x), plain(weight.to(type)), b, geometry.stride, geometry.padding, geometry.dilation, false, none(), 1);
    return arrange(y).to(x.scalar_type());
  }

  // Returns the gradient of the inputs; `like` gives their shape, and its values are not read.
  at::Tensor to_inputs(const at::Tensor& grad, const at::Tensor& like, const at::Tensor& weight) const {
    if (grad.dim() == 2) return grad.to(type).matmul(weight.to(type)).to(grad.scalar_type());
    const at::Tensor grad_x = std::get<0>(backward(grad, like, weight, {true, false, false}));
    return arrange(geometry.restore(grad_x, like)).to(grad.scalar_type());
  }

  // Returns the gradient of the weight; `weight` gives its shape, and its values are not read.
  at::Tensor to_weight(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight) const {
    if (grad.dim() == 2) return grad.to(type).mT().matmul(x.to(type));
    return std::get<1>(backward(grad, x, weight, {false, true, false}));
  }

 private:
  std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
      const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, std::array<bool, 3> mask) const {
    return at::convolution_backward(
        grad.to(type), map(x), plain(weight.to(type)), std::nullopt, geometry.stride, geometry.padding,
        geometry.dilation, false, none(), 1, mask);
  }

  std::vector<int64_t> none() const { return std::vector<int64_t>(geometry.stride.size()); }
  at::Tensor map(const at::Tensor& x) const { return plain(geometry.prepare(x.to(type))); }
};

std::vector<int64_t> output_shape(
    const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation) {
  std::vector<int64_t> shape = {x.size(0), weight.size(2)};
  for (int64_t d = 0; d < x.dim() - 2; ++d) {
    shape.push_back((x.size(2 + d) + 2 * padding[d] - dilation[d] * (weight.size(4 + d) - 1) - 1) / stride[d] + 1);
  }
  return shape;
}

std::atomic<int64_t> forced_chunk_bytes = 0;  // set by tests, for several chunks of a small case

// Memory format, type and chunk size of the convolutions and passes.
//
// On a CPU PyTorch's convolutions are fastest in channels_last, to which they convert other formats internally: the passes
// convert paths of another format. With few samples per chunk, the output of a convolution or pass stays in cache for the
// next, but the weight is converted to the convolutions' internal format each time. Float16 convolutions are 20 times slower
// than float32, and accumulate their inputs' gradients in float16.
class Layer {
 public:
  Layer(
      at::TensorList xs, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
      at::IntArrayRef dilation)
      : cpu_(xs[0].is_cpu()), paths_last_(!sample_is_dense(xs[0], false)),
        convolution_{correct_geometry(xs[0], weight, stride, padding, dilation), cpu_ || paths_last_,
                     cpu_ && xs[0].scalar_type() == at::kHalf ? at::kFloat : xs[0].scalar_type()} {
    const int64_t bytes = static_cast<int64_t>(weight.nbytes());
    chunk_bytes_ = cpu_ ? std::min(std::max(int64_t{1} << 20, bytes), int64_t{8} << 20) : int64_t{64} << 20;
    if (forced_chunk_bytes) chunk_bytes_ = forced_chunk_bytes;
    least_samples_ = cpu_ ? at::get_num_threads() : 1;
  }

  const Convolution& convolution() const { return convolution_; }
  int64_t chunk_bytes() const { return chunk_bytes_; }
  bool paths_last() const { return paths_last_; }

  at::Tensor empty(const at::Tensor& x, at::IntArrayRef shape, at::IntArrayRef strides) const {
    static const auto kept = find_operator<at::Tensor(const at::Tensor&, at::IntArrayRef, at::IntArrayRef)>(
        "fastroute_native::new_empty_strided");
    return cpu_ ? kept.call(x, shape, strides) : at::empty_strided(shape, strides, x.options());
  }

  // Returns uninitialised tensors with x's samples and space, in the memory format of the convolutions.
  Tensors empty_arranged(const at::Tensor& x, int64_t channels, size_t count) const {
    std::vector<int64_t> shape = x.sizes().vec();
    shape[1] = channels;
    Tensors tensors;
    for (size_t i = 0; i < count; ++i) {
      tensors.push_back(empty(x, shape, dense_strides(shape, convolution_.channels_last)));
    }
    return tensors;
  }

  // Returns the paths in the memory format of the convolutions.
  Tensors arranged(at::TensorList xs) const {
    if (!cpu_ || sample_is_dense(xs[0], true)) {
      Tensors tensors;
      for (const auto& x : xs) tensors.push_back(convolution_.arrange(x));
      return tensors;
    }
    Tensors tensors = empty_arranged(xs[0], xs[0].size(1), xs.size());
    const auto options = xs[0].options().dtype(accumulate_type(xs[0].scalar_type()));
    scale_paths(xs, {}, at::empty({xs[0].size(0), static_cast<int64_t>(xs.size()), 0}, options), false, tensors, {});
    return tensors;
  }

  // Returns the number of samples per chunk of such a path.
  int64_t chunk_samples(const at::Tensor& path) const {
    const int64_t bytes = path.numel() * static_cast<int64_t>(path.element_size());
    const int64_t count = std::max<int64_t>(1, (bytes + chunk_bytes_ - 1) / chunk_bytes_);
    return std::max(least_samples_, (path.size(0) + count - 1) / count);
  }

  // Calls f(first, end) for chunks of about equal numbers of samples.
  template <typename F>
  void for_chunks(const at::Tensor& a, const at::Tensor& b, F f) const {
    const int64_t samples = a.size(0), size = chunk_samples(a.numel() >= b.numel() ? a : b);
    for (int64_t first = 0; first < samples; first += size) f(first, std::min(first + size, samples));
  }

  // Returns for each i the W_ij of all j (n·C_out, C_in, *k), in the memory format of the convolutions.
  Tensors by_input(const at::Tensor& weight) const {
    Tensors joined;
    for (const auto& w : weight.unbind(0)) joined.push_back(convolution_.arrange(w.flatten(0, 1)));
    return joined;
  }

  // Returns for each j the W_ij of all i (C_out, m·C_in, *k), in the memory format of the convolutions.
  Tensors by_output(const at::Tensor& weight) const {
    Tensors joined;
    for (const auto& w : weight.unbind(1)) joined.push_back(convolution_.arrange(w.transpose(0, 1).flatten(1, 2)));
    return joined;
  }

 private:
  bool cpu_, paths_last_;
  Convolution convolution_;
  int64_t chunk_bytes_, least_samples_;
};

// Checks the sizes used here; PyTorch's convolutions and the passes check the rest.
void check_weights(
    at::TensorList xs, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation) {
  const at::Tensor& x = xs[0];
  TORCH_CHECK(
      weight.defined() && weight.dim() == 2 + x.dim() && weight.size(0) == static_cast<int64_t>(xs.size()) &&
          weight.size(1) >= 1 && weight.size(1) <= kMaxPaths,
      "weight must be (m, n, C_out, C_in, *k), from m paths to n = 1 to 8");
  check_geometry(x.dim() - 2, stride, padding, dilation);
}

// Checks outputs and their gradients.
void check_results(at::TensorList ys, at::IntArrayRef shape, int64_t count) {
  TORCH_CHECK(
      aligned_path(ys).sizes() == shape && static_cast<int64_t>(ys.size()) == count,
      "as many gradients and outputs as the layer has, of their shape, are needed");
}

Tensors narrowed(at::TensorList tensors, int64_t first, int64_t end) {
  Tensors parts;
  for (const auto& t : tensors) parts.push_back(t.narrow(0, first, end - first));
  return parts;
}

// Computes outputs from the joined predictions of each input.
void predict(
    const Layer& layer, at::TensorList paths, const Tensors& weights, const OptionalTensor& bias,
    const at::Tensor& gates, bool relu, at::TensorList outputs) {
  const Tensors xs = layer.arranged(paths);
  Tensors predictions;
  for (size_t i = 0; i < xs.size(); ++i) {
    const auto b = bias ? OptionalTensor(bias->select(0, static_cast<int64_t>(i)).flatten()) : bias;
    predictions.push_back(layer.convolution().forward(xs[i], weights[i], b));
  }
  sum_predictions(predictions, gates, std::nullopt, relu, outputs);
}

// Computes outputs with one prediction for each output, from the joined gated inputs.
void gate_first(
    const Layer& layer, at::TensorList paths, const Tensors& weights, const OptionalTensor& bias,
    const at::Tensor& gates, bool relu, at::TensorList outputs) {
  const at::Tensor& x = paths[0];
  OptionalTensor offsets;
  if (bias) offsets = gates.unsqueeze(-1).mul(bias->to(gates.scalar_type())).sum(1);
  const Tensors gated = layer.empty_arranged(x, static_cast<int64_t>(paths.size()) * x.size(1), 1);
  const at::Tensor ones = gates.new_ones({gates.size(0), 1, 1});
  for (size_t j = 0; j < outputs.size(); ++j) {
    const auto at_j = static_cast<int64_t>(j);
    scale_paths(paths, {}, gates.select(2, at_j).unsqueeze(-1), false, {}, gated);
    const at::Tensor prediction = layer.convolution().forward(gated[0], weights[j], std::nullopt);
    const auto offset = offsets ? OptionalTensor(offsets->narrow(1, at_j, 1)) : offsets;
    sum_predictions({prediction}, ones, offset, relu, {outputs[j]});
  }
}

Tensors cross_predict(
    at::TensorList xs, const at::Tensor& weight_, const OptionalTensor& bias, const at::Tensor& gates_,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool relu, c10::string_view form) {
  const at::Tensor& x = aligned_path(xs);
  check_weights(xs, weight_, stride, padding, dilation);
  const Layer layer(xs, weight_, stride, padding, dilation);
  const auto shape = output_shape(x, weight_, stride, padding, dilation);
  const auto strides = dense_strides(shape, layer.paths_last());
  Tensors outputs;
  for (int64_t j = 0; j < weight_.size(1); ++j) outputs.push_back(layer.empty(x, shape, strides));
  const at::Tensor weight = weight_.to(x.scalar_type()), gates = gates_.to(accumulate_type(x.scalar_type()));
  const OptionalTensor b = bias ? OptionalTensor(bias->to(x.scalar_type())) : bias;
  const bool gates_first = form == "gate";
  const Tensors weights = gates_first ? layer.by_output(weight) : layer.by_input(weight);
  layer.for_chunks(x, outputs[0], [&](int64_t first, int64_t end) {
    const Tensors part = narrowed(xs, first, end), ys = narrowed(outputs, first, end);
    const at::Tensor g = gates.narrow(0, first, end - first);
    if (gates_first) {
      gate_first(layer, part, weights, bias, g, relu, ys);
    } else {
      predict(layer, part, weights, b, g, relu, ys);
    }
  });
  return outputs;
}

// Returns dP_j in the memory format of the convolutions and, with `sums`, their sums over space.
std::tuple<Tensors, at::Tensor> grads_of_sums(
    const Layer& layer, at::TensorList grad_outputs, at::TensorList outputs, const at::Tensor& gates, bool sums) {
  if (outputs.empty() && !sums) return {layer.arranged(grad_outputs), at::Tensor()};  // dY_j itself
  const at::Tensor& grad = grad_outputs[0];
  Tensors grads = layer.empty_arranged(grad, grad.size(1), grad_outputs.size());
  const at::Tensor none = gates.new_empty({gates.size(0), static_cast<int64_t>(grads.size()), 0});
  at::Tensor totals = scale_paths(grad_outputs, outputs, none, sums, grads, {});
  return {std::move(grads), std::move(totals)};
}

// Adds dW of these samples, input by input, so that only n of the m·n terms g_ij dP_j exist at a time.
void add_grad_weight(
    const Layer& layer, const Tensors& grads, const Tensors& xs, const at::Tensor& weight, const at::Tensor& gates,
    Tensors& grad_weight) {
  const Tensors scaled = layer.empty_arranged(grads[0], weight.size(1) * weight.size(2), 1);
  for (size_t i = 0; i < xs.size(); ++i) {
    const auto at_i = static_cast<int64_t>(i);
    scale_paths(grads, {}, gates.select(1, at_i).unsqueeze(-1), false, {}, scaled);
    grad_weight[i] += layer.convolution().to_weight(scaled[0], xs[i], weight.select(0, at_i).flatten(0, 1));
  }
}

std::tuple<Tensors, at::Tensor, at::Tensor, at::Tensor> cross_predict_backward(
    at::TensorList grad_outputs, at::TensorList outputs, at::TensorList xs, const at::Tensor& weight_,
    const OptionalTensor& bias, const at::Tensor& gates_, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool grad_inputs) {
  const at::Tensor& x = aligned_path(xs);
  check_weights(xs, weight_, stride, padding, dilation);
  const auto shape = output_shape(x, weight_, stride, padding, dilation);
  check_results(grad_outputs, shape, weight_.size(1));
  if (!outputs.empty()) check_results(outputs, shape, weight_.size(1));
  const auto type = accumulate_type(x.scalar_type());
  const Layer layer(xs, weight_, stride, padding, dilation);
  const at::Tensor weight = weight_.to(x.scalar_type()), gates = gates_.to(type);
  const int64_t m = weight.size(0), n = weight.size(1);
  Tensors grad_xs;
  for (int64_t i = 0; grad_inputs && i < m; ++i) grad_xs.push_back(layer.empty(x, x.sizes(), path_strides(x)));
  const Tensors weights = layer.by_output(weight);
  Tensors grad_weight = layer.by_input(gates.new_zeros(weight.sizes()));
  Tensors products{gates.new_empty({0, m, n})}, totals{gates.new_empty({0, n, weight.size(2)})};
  layer.for_chunks(x, grad_outputs[0], [&](int64_t first, int64_t end) {
    const Tensors part = layer.arranged(narrowed(xs, first, end));
    const at::Tensor g = gates.narrow(0, first, end - first);
    const auto [grads, total] = grads_of_sums(
        layer, narrowed(grad_outputs, first, end), narrowed(outputs, first, end), g, bias.has_value());
    if (bias) totals.push_back(total);
    add_grad_weight(layer, grads, part, weight, g, grad_weight);
    const Tensors like = layer.empty_arranged(part[0], weights[0].size(1), 1);
    Tensors terms;
    for (size_t j = 0; j < grads.size(); ++j) {
      terms.push_back(layer.convolution().to_inputs(grads[j], like[0], weights[j]));
    }
    products.push_back(sum_gradients(terms, part, g, narrowed(grad_xs, first, end)));
  });
  const at::Tensor to_weight = at::stack(grad_weight).view(weight.sizes()).contiguous();
  at::Tensor to_gates = at::cat(products);
  if (!bias) return {std::move(grad_xs), to_weight, gates.new_empty({0}), to_gates};
  const at::Tensor all_totals = at::cat(totals).unsqueeze(1);
  to_gates += all_totals.mul(bias->to(type)).sum(-1);
  return {std::move(grad_xs), to_weight, gates.unsqueeze(-1).mul(all_totals).sum(0), to_gates};
}

}  // namespace
}  // namespace fastroute

TORCH_LIBRARY_IMPL(fastroute_native, CompositeExplicitAutograd, m) {
  m.impl("cross_predict", &fastroute::cross_predict);
  m.impl("cross_predict_backward", &fastroute::cross_predict_backward);
}

// For tests: the plan for paths x and a weight, and the bytes of a path per chunk, which override the plan (0: follow the
// plan).
TORCH_LIBRARY_FRAGMENT(fastroute_native, m) {
  m.def(
      "cross_predict_plan(Tensor x, Tensor weight) -> (bool channels_last, bool converted, int bytes, int samples)",
      [](const at::Tensor& x, const at::Tensor& weight) {
        const fastroute::Layer layer({x}, weight, {}, {}, {});
        const auto& convolution = layer.convolution();
        return std::make_tuple(
            convolution.channels_last, convolution.type != x.scalar_type(), layer.chunk_bytes(),
            layer.chunk_samples(x));
      });
  m.def("cross_predict_force_chunk(int bytes) -> ()", [](int64_t bytes) { fastroute::forced_chunk_bytes = bytes; });
}
