"""Benchmarks of the thesis's networks: with routing, without, with plain PyTorch routing, and compiled."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.backends import use_backend
from fastroute.bench.cases import DTYPES, LAYOUTS, Case, compiled
from fastroute.bench.contest import Contest
from fastroute.bench.plain import PlainCrossConnection, PlainCrossPrediction2d
from fastroute.bench.results import OURS
from fastroute.bench.sparse import spread
from fastroute.models import create_model, list_models
from fastroute.nn import CrossConnection, CrossPrediction2d, SparseRouter
from fastroute.ops._compile_form import compile_form

FORWARD, STEP = "forward", "forward+backward+optimiser"

# Network → (paths, batch sizes, classes, image size). Networks that are not registered are skipped.
CIFAR = {
    f"resnet20{suffix}": (paths, (128, 64), 10, 32) for paths, suffix in enumerate(("", "_cc2", "_cc3", "_cc4"), 1)
}
CIFAR |= {"base_cnn_cc2": (2, (64,), 10, 32), "resnet20_cp2": (2, (64,), 10, 32)}
IMAGENET = {"resnet18_cc2": (2, (32,), 1000, 224), "resnet50_cc2": (2, (32,), 100, 224)}

STEPS = ("resnet20_cc2", "resnet20_cc3", "resnet20_cc4", "base_cnn_cc2", "resnet18_cc2", "resnet20_cp2")
"""Networks whose steps are compared with plain PyTorch's, both eager and compiled, in every dtype and layout."""

SPARSE = ("resnet20_sparse4_top1", "resnet20_sparse4_top2")
CIFAR |= dict.fromkeys(SPARSE, (4, (64,), 10, 32))
DENSE = ("resnet20", "resnet20_cc2", "resnet20_cc4")
"""Networks that a sparse one is compared with: of one path, of two, and of as many as it has."""

PLAIN = {CrossConnection: PlainCrossConnection, CrossPrediction2d: PlainCrossPrediction2d}


def without_kernels(model: nn.Module) -> nn.Module:
    """Return a copy of the network with its routers in plain PyTorch."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return model


def plainly(call: Callable) -> Callable:
    """Return the call of a network that runs PyTorch's own modules, even where a kernel could fuse them."""

    def plain_call(images: Tensor) -> Tensor:
        with use_backend("reference"):
            return call(images)

    return plain_call


def contest(
    labels: dict, num_classes: int, img_size: int, compile: bool, device: torch.device, fused: bool = True
) -> Contest:
    """Build a contest of a network against itself without routers, with plain ones and, if `compile`, both compiled.

    A sparse network, whose images are spread over its paths, is compared with those of `DENSE` instead.

    Ours is compiled in the form that `compile_form("auto")` takes and, if `fused`, in the fused form as well.
    """
    training = labels["direction"] == STEP
    batch, memory_format, dtype = labels["batch"], LAYOUTS[labels["layout"]], DTYPES[labels["dtype"]]
    torch.manual_seed(0)
    images = torch.randn(batch, 3, img_size, img_size, device=device).contiguous(memory_format=memory_format)
    targets = torch.randint(num_classes, (batch,), device=device)

    def create(name: str = labels["network"], **options):
        model = create_model(name, num_classes, img_size=img_size, **options)
        return model.to(device, memory_format=memory_format).train(training)

    def autocast():
        half = dtype != torch.float32
        return torch.autocast(device.type, dtype) if half else contextlib.nullcontext()

    def job(model, call):
        """Return a step of `model`, computed by `call`: the module, or its compiled version."""
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step():
            if not training:
                with torch.no_grad(), autocast():
                    return call(images)
            optimizer.zero_grad()
            with autocast():
                logits = call(images)
                loss = F.cross_entropy(logits, targets)
            loss.backward()
            optimizer.step()
            return logits

        return step

    model = create()
    routers = [module for module in model.modules() if isinstance(module, tuple(PLAIN))]
    for router in routers:
        nn.init.normal_(router.w2)  # gates that differ between samples, so that the comparison is meaningful
    models = {OURS: model}
    if routers:
        if all(isinstance(router, CrossConnection) for router in routers):  # other networks have none to leave out
            models["no routing"] = create(routing=None)
        models["eager"] = without_kernels(model)
    loads = spread_over_paths(model, images)
    if loads:
        models |= {name: create(name) for name in DENSE}
    torch._dynamo.reset()
    calls = {name: plainly(network) if name == "eager" else network for name, network in models.items()}
    if compile:
        for name, source in (("compile", "eager"), ("fastroute compiled", OURS)):
            if source in models:
                models[name] = copy.deepcopy(models[source])
                calls[name] = compiled(models[name], device)
                calls[name] = plainly(calls[name]) if source == "eager" else calls[name]
        if fused and routers:
            models["fastroute fused"] = copy.deepcopy(model)
            calls["fastroute fused"] = partial(_call_fused, compiled(models["fastroute fused"], device))
    contenders = {name: job(models[name], calls[name]) for name in models}

    def check():
        if "eager" not in models:
            return
        # Rounding errors grow through the layers: two correct bfloat16 gradients differed by 0.18 of their norm, so
        # gradients are compared in float32 only; those of resnet18_cc2 in plain PyTorch, compiled and not, by 0.014.
        half = dtype != torch.float32
        logits = {name: contenders[name]().detach().float() for name in models if name != "no routing"}
        for name in logits.keys() - {"eager"}:
            try:
                _assert_near("logits", logits[name], logits["eager"], 5e-2 if half else 1e-3)
                if training and not half:
                    grads = (torch.cat([p.grad.flatten() for p in models[n].parameters()]) for n in (name, "eager"))
                    _assert_near("gradients", *grads, 3e-2)
            except AssertionError as error:
                timed.refuse(name, error)

    facts = {"loads": loads} if loads else {}
    if training and not loads:
        facts["routing_share"] = _routing_share(model, images, targets, autocast())
    timed = Contest(contenders, check, device, facts=facts)
    return timed


@torch.no_grad()
def spread_over_paths(model: nn.Module, images: Tensor) -> list[list[int]]:
    """Let the images take all paths of each sparse router, one router after another, as an untrained one does not.

    Returns:
        the number of images of each path, for each router.
    """
    loads = []

    def pre_hook(router, args):
        spread(router, args[0])
        loads.append(router.divide(args[0])[1].load.tolist())

    routers = [module for module in model.modules() if isinstance(module, SparseRouter)]
    hooks = [router.register_forward_pre_hook(pre_hook) for router in routers]
    if routers:
        model(images)
    for hook in hooks:
        hook.remove()
    return loads


def _call_fused(model, images: Tensor) -> Tensor:
    """Call a compiled network, whose operators are traced in the fused form."""
    with compile_form("fused"):
        return model(images)


def _assert_near(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    off = float((ours - theirs).norm() / theirs.norm())
    assert off <= tolerance, f"{what} are off by {off:.2g} of their norm; at most {tolerance} is allowed"


def _routing_share(model, images, targets, context) -> float:
    from fastroute.diagnostics.routing import routing_share

    with context:
        return routing_share(model, (images, targets))


def cases(device: torch.device) -> Iterator[Case]:
    """Yield network × direction × dtype × layout × batch size; only cases that are not quick have compiled peers.

    Those of `STEPS` have both layouts of both dtypes at their least batch size.
    """
    registered = set(list_models())
    for network, (paths, batches, classes, img_size) in {**CIFAR, **IMAGENET}.items():
        if network not in registered:
            continue
        if device.type == "cuda" and network in IMAGENET:
            batches = (256,)
        for batch, dtype, layout, direction in itertools.product(
            batches, ("bfloat16", "float32"), LAYOUTS, (STEP, FORWARD)
        ):
            step = network in STEPS and batch == batches[-1]
            usual = layout == ("channels_last" if dtype == "bfloat16" else "contiguous")
            if not (step or usual):
                continue
            labels = {
                "network": network,
                "direction": direction,
                "dtype": dtype,
                "layout": layout,
                "batch": batch,
                "paths": paths,
            }
            first = network in CIFAR and batch == 128 and dtype == "bfloat16" and direction == STEP
            default = network == "resnet20_cc2" and step and dtype == "float32" and usual and direction == STEP
            # On a CPU the fused form has lost in every step that was measured, and takes a minute more to compile.
            compile = not first and network not in SPARSE  # a sparse network breaks the graph
            build = partial(contest, labels, classes, img_size, compile, device, fused=device.type == "cuda")
            yield Case("networks", labels, build, quick=first or default, step=step)
