// The passes around the convolutions of cross-prediction (Alg. 1).

#include "cuda/tensors.h"

#include <torch/library.h>

#include <algorithm>

namespace fastroute::cuda {
namespace {

// Checks joined tensors of `parts` paths like x, and returns x's sizes and the format of all. Where x has one channel it has
// both formats, and the joined tensors, with more channels, tell which.
Shape joined_shape(at::TensorList joined, const at::Tensor& x, int64_t parts) {
  TORCH_CHECK(static_cast<int64_t>(joined.size()) <= kMaxPaths, "up to 8 joined paths are served");
  const auto all = [&](bool channels_last) {
    return sample_is_dense(x, channels_last) && std::all_of(joined.begin(), joined.end(), [&](const at::Tensor& t) {
      return t.size(0) == 0 || sample_is_dense(t, channels_last);
    });
  };
  for (const auto& t : joined) {
    TORCH_CHECK(
        t.dim() == x.dim() && t.size(0) == x.size(0) && t.size(1) == parts * x.size(1) &&
            t.sizes().slice(2) == x.sizes().slice(2) && t.scalar_type() == x.scalar_type() && t.device() == x.device(),
        "joined paths must have the sizes, type and device of the others and ", parts, " times the channels");
  }
  Shape shape = shape_of(x);
  if (shape.samples == 0 || all(false)) return shape;
  TORCH_CHECK(all(true), "joined paths must have the format of the others");
  shape.channels_last = true;
  return shape;
}

at::Tensor checked(const OptionalTensor& t, at::IntArrayRef shape, const at::Tensor& x) {
  return parameter(t, accumulate_type(x.scalar_type()), shape, x);
}

// out = Σ over the first dimension of partial (slices, …), in order.
template <typename A>
void sum_slices(const at::Tensor& partial, at::Tensor& out, cudaStream_t stream) {
  C10_CUDA_CHECK(outer_sums<A>(
      {{{data<A>(partial), nullptr, 1, out.numel(), 1, out.mutable_data_ptr<A>()}}, 1}, partial.size(0), stream));
}

void sum_predictions_op(
    at::TensorList predictions, const at::Tensor& gates_, const OptionalTensor& offsets_, bool relu,
    at::TensorList ys) {
  const at::Tensor& y = aligned_path(ys);
  const auto m = static_cast<int64_t>(predictions.size()), n = static_cast<int64_t>(ys.size());
  const Shape shape = joined_shape(predictions, y, n);
  const c10::cuda::CUDAGuard guard(y.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor gates = checked(gates_, {shape.samples, m, n}, y);
  const at::Tensor offsets = checked(offsets_, {shape.samples, n, shape.channels}, y);
  dispatch(y.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    C10_CUDA_CHECK(sum_predictions<T>(
        inputs<T>(predictions), data<A>(gates), data<A>(offsets), relu, shape, outputs<T>(ys), stream));
  });
}

at::Tensor scale_paths_op(
    at::TensorList paths, at::TensorList masks, const at::Tensor& weights_, bool sums, at::TensorList masked,
    at::TensorList scaled) {
  const at::Tensor& x = aligned_path(paths);
  const auto parts = static_cast<int64_t>(paths.size()), count = weights_.size(-1);
  TORCH_CHECK(masks.empty() || masks.size() == paths.size(), "as many masks as paths are needed");
  TORCH_CHECK(masked.empty() || masked.size() == paths.size(), "as many masked paths as paths are needed");
  TORCH_CHECK(!sums || !masked.empty(), "sums are taken of masked paths");
  TORCH_CHECK(static_cast<int64_t>(scaled.size()) == count, "one joined path for each weight is needed");
  if (!masks.empty()) check_aligned(masks, x);
  if (!masked.empty()) check_aligned(masked, x);
  const Shape shape = joined_shape(scaled, x, parts);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor weights = checked(weights_, {shape.samples, parts, count}, x);
  at::Tensor totals = at::empty({sums ? shape.samples : 0, parts, shape.channels}, weights.options());
  dispatch(x.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    C10_CUDA_CHECK(scale_paths<T>(
        inputs<T>(paths), inputs<T>(masks), data<A>(weights), shape, outputs<T>(masked), outputs<T>(scaled), stream));
    if (sums) sum_slices<A>(sums_over_space<T>(inputs<T>(masked), shape, weights.options(), stream), totals, stream);
  });
  return totals;
}

at::Tensor sum_gradients_op(
    at::TensorList terms, at::TensorList xs, const at::Tensor& gates_, at::TensorList grad_xs) {
  const at::Tensor& x = aligned_path(xs);
  const auto m = static_cast<int64_t>(xs.size()), n = static_cast<int64_t>(terms.size());
  const Shape shape = joined_shape(terms, x, m);
  if (!grad_xs.empty()) check_aligned(grad_xs, x);
  TORCH_CHECK(grad_xs.empty() || grad_xs.size() == xs.size(), "as many gradients as paths are needed");
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor gates = checked(gates_, {shape.samples, m, n}, x);
  at::Tensor products = at::empty({shape.samples, m, n}, gates.options());
  dispatch(x.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const int64_t slices = product_slices<T>(shape);
    at::Tensor partial = at::empty({slices, shape.samples, m, n}, gates.options());
    C10_CUDA_CHECK(sum_gradients<T>(
        inputs<T>(terms), inputs<T>(xs), data<A>(gates), shape, slices, partial.mutable_data_ptr<A>(),
        outputs<T>(grad_xs), stream));
    sum_slices<A>(partial, products, stream);
  });
  return products;
}

}  // namespace
}  // namespace fastroute::cuda

TORCH_LIBRARY_IMPL(fastroute_native, CUDA, m) {
  m.impl("sum_predictions", &fastroute::cuda::sum_predictions_op);
  m.impl("scale_paths", &fastroute::cuda::scale_paths_op);
  m.impl("sum_gradients", &fastroute::cuda::sum_gradients_op);
}
