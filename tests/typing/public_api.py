"""Types of the public interface, as a user's type checker sees them. mypy checks this file; it is never run."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fastroute
from fastroute.models import (
    ModelInfo,
    count_macs,
    create_model,
    list_models,
    model_info,
    multipath,
    register_model,
    resnet20_cc2,
)
from fastroute.nn import (
    ConsistencyLoss,
    CrossConnection,
    GateClusteringLoss,
    MixtureEMLoss,
    MultiPathNetwork,
    ParallelPaths,
    RelevanceNorm,
    Routing,
    SparseRouter,
    SparseRouting,
    leave_spread_paths,
)
from fastroute.ops import Gates, MixtureEM, Routed, cross_connect, cross_predict, gate, mix, mixture_em_loss

x, parameters = torch.zeros(()), torch.zeros(())

# Operators
assert_type(cross_connect([x], x, x, x, x), Routed)
assert_type(cross_connect([x], None, None, x, None, activation="relu").outputs, list[Tensor])
assert_type(gate([x], x, x, x, x), Gates)
assert_type(mix((x, x), x), list[Tensor])
assert_type(cross_predict([x], x, None, x), list[Tensor])
assert_type(mixture_em_loss(x, gamma=5.0, prior=x), MixtureEM)
assert_type(mixture_em_loss(x).loss, Tensor)
cross_connect(x, x, x, x, 1.0)  # type: ignore[arg-type]

# Layers
router = CrossConnection(64, in_paths=2, out_paths=2, gate_channels=None, temperature=0.5)
assert_type(router.forward([x]), list[Tensor] | tuple[list[Tensor], Routing])
assert_type(SparseRouter(16, 4).divide(x), tuple[list[Tensor], SparseRouting])
assert_type(leave_spread_paths(nn.ReLU()), nn.Module)
assert_type(GateClusteringLoss().forward({"router": Routing(x, x)}), Tensor)
assert_type(MixtureEMLoss(norm=RelevanceNorm(10)).forward(x), MixtureEM)
assert_type(ConsistencyLoss().forward(x, x), Tensor)
assert_type(ParallelPaths([nn.ReLU()]).execution, str)
CrossConnection(64, in_paths="2", out_paths=2)  # type: ignore[arg-type]

# Networks
assert_type(create_model("resnet20_cc2", num_classes=10), nn.Module)
assert_type(resnet20_cc2(num_classes=10), nn.Module)
assert_type(list_models("*cc*"), list[str])
assert_type(model_info("resnet20"), ModelInfo)
assert_type(count_macs(nn.ReLU(), (3, 32, 32)), int)
assert_type(multipath(nn.ReLU(), 2, ["relu"], init="copy"), MultiPathNetwork)
create_model()  # type: ignore[call-arg]


@register_model(num_classes=5)
def own(*, num_classes: int, in_chans: int, img_size: int) -> nn.Linear:
    return nn.Linear(in_chans * img_size**2, num_classes)


assert_type(own(num_classes=5, in_chans=3, img_size=32), nn.Linear)
own(classes=5)  # type: ignore[call-arg]

# Backends
assert_type(fastroute.__version__, str)
manager: AbstractContextManager[None] = fastroute.use_backend("reference")
