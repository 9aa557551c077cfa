// Cross-connection routing (Alg. 2) and its backward (Eq. 3.10 to 3.15): one read by clusters if the sample fits, else two
// passes. With relu, max(x, 0) is applied at each read of a path.

#include "build.h"
#include "cuda/tensors.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>

namespace fastroute::cuda {

const Device& device() {
  static std::mutex mutex;
  static std::map<int, Device> devices;
  int index;
  C10_CUDA_CHECK(cudaGetDevice(&index));
  const std::lock_guard lock(mutex);
  if (const auto known = devices.find(index); known != devices.end()) return known->second;
  const auto attribute = [&](cudaDeviceAttr which) {
    int value;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
    return value;
  };
  int architecture;
  C10_CUDA_CHECK(code_architecture(&architecture));
  return devices[index] = {
             architecture, attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
             attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

namespace {

std::atomic<int64_t> forced_cluster = -1, last_cluster = 0;

// The plan for these sizes, or the cluster size forced by a test. `aligned`: all paths can be accessed in vectors.
template <typename T>
int64_t cluster_for(int64_t paths, const Shape& shape, int64_t extra, bool aligned, int64_t masks = 0) {
  const int64_t path_bytes = shape.elements() * sizeof(T), forced = forced_cluster;
  int64_t cluster = aligned ? choose_cluster(paths, path_bytes, extra, shape.samples, device(), masks) : 0;
  if (forced > 0) {
    TORCH_CHECK(
        aligned && device().architecture >= 90 &&
            block_bytes(paths, path_bytes, extra, forced, masks) <= device().shared_per_block,
        "a cluster of ", forced, " blocks cannot hold these paths");
  }
  return last_cluster = forced < 0 ? cluster : forced;
}

Forward cross_connect(
    at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1, const at::Tensor& w2,
    const OptionalTensor& b2, bool relu) {
  const at::Tensor& x = aligned_path(xs);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Shape shape = shape_of(x);
  const Parameters p(xs, w1, b1, w2, b2);
  const auto options = x.options().dtype(accumulate_type(x.scalar_type()));
  std::vector<at::Tensor> ys = empty_paths(x, p.n);
  at::Tensor gates = at::empty({shape.samples, p.m, p.n}, options), scores = at::empty_like(gates);
  at::Tensor pooled = at::empty({shape.samples, p.m, p.channels}, options);
  at::Tensor hidden = at::empty({shape.samples, p.m, p.hidden}, options);

  last_cluster = 0;  // unless a plan says otherwise: float64 has none
  dispatch(x.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Paths<const T> from = inputs<T>(xs, relu);
    const Paths<T> to = outputs<T>(ys);
    const Gate<A> gate = gate_of<A>(p);
    A *z = pooled.mutable_data_ptr<A>(), *h = hidden.mutable_data_ptr<A>();
    A *a = scores.mutable_data_ptr<A>(), *g = gates.mutable_data_ptr<A>();
    if constexpr (kVector<T> > 1) {
      const bool aligned = fits_vectors(from, shape.elements()) && fits_vectors(to, shape.elements());
      const int64_t extra = cluster_forward_extra(shape, p.m, p.n, p.hidden, kVector<T>);
      if (const int64_t cluster = cluster_for<T>(p.m, shape, extra, aligned)) {
        C10_CUDA_CHECK(cluster_forward<T>({from, to, shape, gate, z, h, a, g}, static_cast<int>(cluster), stream));
        return;
      }
    }
    const at::Tensor sums = sums_over_space<T>(from, shape, options, stream);
    C10_CUDA_CHECK(gates_forward<A>(gate, shape, sums.size(0), data<A>(sums), z, h, a, g, stream));
    C10_CUDA_CHECK(weighted_sums<T>(from, {g, p.m * p.n, static_cast<int>(p.n), 1}, nullptr, shape, {}, to, stream));
  });
  return {std::move(ys), gates, scores, pooled, hidden};
}

Backward cross_connect_backward(
    at::TensorList grad_outputs, const OptionalTensor& grad_gates, const OptionalTensor& grad_scores,
    at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1, const at::Tensor& w2,
    const OptionalTensor& b2, const at::Tensor& gates_, const at::Tensor& pooled_, const at::Tensor& hidden_,
    bool relu, bool grad_inputs) {
  const at::Tensor& x = aligned_path(xs);
  check_aligned(grad_outputs, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Shape shape = shape_of(x);
  const Parameters p(xs, w1, b1, w2, b2);
  const auto type = accumulate_type(x.scalar_type());
  const auto options = x.options().dtype(type);
  TORCH_CHECK(static_cast<int64_t>(grad_outputs.size()) == p.n, "as many gradients as outputs are needed");
  const at::Tensor dg = parameter(grad_gates, type, {shape.samples, p.m, p.n}, x);
  const at::Tensor da = parameter(grad_scores, type, {shape.samples, p.m, p.n}, x);
  const at::Tensor gates = parameter(gates_, type, {shape.samples, p.m, p.n}, x);
  const at::Tensor pooled = parameter(pooled_, type, {shape.samples, p.m, p.channels}, x);
  const at::Tensor hidden = parameter(hidden_, type, {shape.samples, p.m, p.hidden}, x);

  std::vector<at::Tensor> grad_xs = empty_paths(x, grad_inputs ? p.m : 0);
  at::Tensor d_scores = at::empty_like(gates), d_hidden = at::empty_like(hidden);
  ParameterGradients grads(p);

  last_cluster = 0;  // as in the forward; without dX there is no plan either
  dispatch(x.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Gate<A> gate = gate_of<A>(p);
    const Paths<T> to = outputs<T>(grad_xs);
    A *dA = d_scores.mutable_data_ptr<A>(), *dH = d_hidden.mutable_data_ptr<A>();
    int64_t cluster = 0;
    if constexpr (kVector<T> > 1) {
      const Paths<const T> from = inputs<T>(xs, relu), dys = inputs<T>(grad_outputs);
      const int64_t elements = shape.elements();
      const bool aligned = fits_vectors(from, elements) && fits_vectors(dys, elements) && fits_vectors(to, elements);
      const int64_t extra = cluster_backward_extra(shape, p.m, p.n, p.hidden);
      // Without dX, the two-pass version reads only once.
      if (grad_inputs && (cluster = cluster_for<T>(p.n, shape, extra, aligned, relu ? p.m : 0))) {
        C10_CUDA_CHECK(cluster_backward<T>(
            {from, dys, to, shape, gate, data<A>(dg), data<A>(da), data<A>(gates), data<A>(hidden), dA, dH},
            static_cast<int>(cluster), stream));
      }
    }
    if (!cluster) {
      const Weights<A> weights{data<A>(gates), p.m * p.n, 1, static_cast<int>(p.n)};
      const at::Tensor products = inner_products<T>(xs, relu, grad_outputs, weights, nullptr, stream);
      at::Tensor shares = grad_inputs ? at::empty({shape.samples, p.m, p.channels}, options) : at::Tensor();
      C10_CUDA_CHECK(gates_backward<A>(
          gate, shape, products.size(0), data<A>(products), data<A>(dg), data<A>(da), data<A>(gates), data<A>(hidden),
          dA, dH, grad_inputs ? shares.mutable_data_ptr<A>() : nullptr, stream));
      if (grad_inputs) {
        const Paths<const T> masks = relu ? inputs<T>(xs) : Paths<const T>();
        C10_CUDA_CHECK(weighted_sums<T>(inputs<T>(grad_outputs), weights, data<A>(shares), shape, masks, to, stream));
      }
    }
    grads.compute<A>(d_scores, d_hidden, pooled, hidden, stream);
  });
  return {std::move(grad_xs), grads.w1, grads.b1, grads.w2, grads.b2};
}

}  // namespace
}  // namespace fastroute::cuda

TORCH_LIBRARY_IMPL(fastroute_native, CUDA, m) {
  m.impl("cross_connect", &fastroute::cuda::cross_connect);
  m.impl("cross_connect_backward", &fastroute::cuda::cross_connect_backward);
}

// For tests: the plan as plain arithmetic, a cluster size that overrides the plan (0: two passes, -1: follow the plan), and the
// one used by the latest cross_connect or its backward.
TORCH_LIBRARY_FRAGMENT(fastroute_native, m) {
  m.def(
      "cuda_plan(int paths, int path_bytes, int extra, int samples, int architecture, int multiprocessors,"
      " int shared_per_block, int shared_per_multiprocessor) -> int",
      [](int64_t paths, int64_t path_bytes, int64_t extra, int64_t samples, int64_t architecture,
         int64_t multiprocessors, int64_t shared_per_block, int64_t shared_per_multiprocessor) {
        return fastroute::cuda::choose_cluster(
            paths, path_bytes, extra, samples,
            {architecture, multiprocessors, shared_per_block, shared_per_multiprocessor});
      });
  m.def("cuda_force_cluster(int size) -> ()", [](int64_t size) { fastroute::cuda::forced_cluster = size; });
  m.def("cuda_last_cluster() -> int", [] { return fastroute::cuda::last_cluster.load(); });
}
