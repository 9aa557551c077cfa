// The mixture-EM loss of one or m mixtures (Eq. 4.11 to 4.23), and its gradient with the posteriors held constant.

#include "cuda/tensors.h"
#include "mixture.h"

#include <torch/library.h>

namespace fastroute::cuda {
namespace {

MixtureSizes sizes_of(const Mixtures& g) {
  return {g.samples, static_cast<int>(g.mixtures), static_cast<int>(g.clusters), static_cast<int>(g.statistics[0])};
}

MixtureResult mixture_em_loss(
    const at::Tensor& scores, const OptionalTensor& scores_aug, const OptionalTensor& prior, const OptionalTensor& mean,
    const OptionalTensor& std, double gamma) {
  const Mixtures g(scores, scores_aug, prior, mean, std);
  const c10::cuda::CUDAGuard guard(scores.device());
  MixtureResult result = empty_mixture(g, scores);
  auto& [loss, posterior, means, scales] = result;
  dispatch(scores.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const MixtureForward<T> args{
        {scores.const_data_ptr<T>(), data<T>(scores_aug)}, data<A>(prior), data<A>(mean), data<A>(std), sizes_of(g),
        1 / gamma, loss.mutable_data_ptr<A>(), posterior.mutable_data_ptr<A>(), means.mutable_data_ptr<A>(),
        scales.mutable_data_ptr<A>()};
    C10_CUDA_CHECK(mixture_em_forward<T>(args, c10::cuda::getCurrentCUDAStream()));
  });
  return result;
}

std::tuple<at::Tensor, at::Tensor> mixture_em_loss_backward(
    const at::Tensor& scores, const OptionalTensor& scores_aug, const at::Tensor& posterior, const at::Tensor& means,
    const at::Tensor& scales, const at::Tensor& grad_loss, double gamma, bool batch_statistics) {
  const Mixtures g(scores, scores_aug);
  check_mixture(posterior, scores, scores.sizes(), g.type);
  check_mixture(means, scores, g.statistics, g.type);
  check_mixture(scales, scores, g.statistics, g.type);
  check_mixture(grad_loss, scores, g.losses(), g.type);
  const c10::cuda::CUDAGuard guard(scores.device());
  auto result = empty_mixture_grads(scores, scores_aug);
  auto& [grad, grad_aug] = result;
  dispatch(scores.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const MixtureBackward<T> args{
        {scores.const_data_ptr<T>(), data<T>(scores_aug)}, data<A>(posterior), data<A>(means), data<A>(scales),
        data<A>(grad_loss), sizes_of(g), 1 / gamma, batch_statistics,
        {grad.mutable_data_ptr<T>(), grad_aug.mutable_data_ptr<T>()}};
    C10_CUDA_CHECK(mixture_em_backward<T>(args, c10::cuda::getCurrentCUDAStream()));
  });
  return result;
}

}  // namespace
}  // namespace fastroute::cuda

TORCH_LIBRARY_IMPL(fastroute_native, CUDA, m) {
  m.impl("mixture_em_loss", &fastroute::cuda::mixture_em_loss);
  m.impl("mixture_em_loss_backward", &fastroute::cuda::mixture_em_loss_backward);
}
