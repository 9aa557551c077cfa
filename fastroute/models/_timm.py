"""Register the networks with timm."""

import contextlib
from collections.abc import Sequence

import torch
from torch import nn

from fastroute._extras import extra
from fastroute.models.features import FeatureMaps
from fastroute.models.registry import create_model, list_models, model_info


def register_timm() -> list[str]:
    """Register every network with timm, so that `timm.create_model("resnet20_cc2")` builds it.

    Names that timm has itself, such as `resnet18`, stay timm's; timm then has the network as `fastroute_resnet18`.
    fastroute calls this function itself if timm was imported first. Call it again after `register_model`.

    Returns:
        the names of all registered networks, as timm has them.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    with extra("timm", "register_timm"):
        from timm.models import is_model, model_entrypoint, register_model

    names = []
    for name in list_models():
        for candidate in (name, f"fastroute_{name}"):
            if not is_model(candidate):
                register_model(_entrypoint(name, candidate))
            if getattr(model_entrypoint(candidate), "fastroute_name", None) == name:
                names.append(candidate)
                break
    return names


def _entrypoint(name: str, timm_name: str):
    info = model_info(name)

    def build(
        pretrained: bool = False,
        *,
        num_classes: int | None = None,
        in_chans: int = 3,
        img_size: int | None = None,
        drop_rate: float = 0.0,
        pretrained_cfg=None,
        pretrained_cfg_overlay=None,
        cache_dir=None,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        **options,
    ) -> nn.Module:
        if pretrained:
            raise ValueError(f"pretrained is {pretrained}; there are no pretrained weights of {name}")
        if drop_rate:
            raise ValueError(f"drop_rate is {drop_rate}; {name} has no dropout")
        model, size = create_model(name, num_classes, in_chans, img_size, **options), img_size or info.img_size
        if features_only:
            from timm.models._features import FeatureInfo

            model = FeatureMaps(model, (in_chans, size, size), out_indices)
            model.feature_info = FeatureInfo(model.info, tuple(range(len(model.info))))
            return model
        if not hasattr(model, "num_classes"):
            model.num_classes = info.num_classes if num_classes is None else num_classes
        model.pretrained_cfg = model.default_cfg = {
            "architecture": timm_name,
            "input_size": (in_chans, size, size),
            "num_classes": model.num_classes,
            "classifier": tuple(_classifiers(model)),
            "first_conv": tuple(_first_layers(model, name, in_chans, img_size, options)),
        }
        return model

    build.__name__ = build.__qualname__ = timm_name
    build.fastroute_name = name
    return build


def _classifiers(model: nn.Module) -> list[str]:
    """Return the names of the dense layers that give logits, if the network knows them."""
    if not hasattr(model, "get_classifier") or model.num_classes is None:
        return []
    layers = model.get_classifier()
    layers = layers if isinstance(layers, nn.ModuleList) else [layers]
    names = {module: name for name, module in model.named_modules()}
    return [names[layer] for layer in layers]


def _first_layers(model: nn.Module, name: str, in_chans: int, img_size: int | None, options: dict) -> list[str]:
    """Return the names of the convolutions that take images: of all layers, they alone have 3 channels for RGB."""
    if in_chans != 3:
        own = {key: value for key, value in options.items() if key not in ("checkpoints", "pretrained_path")}
        # A user's builder may refuse three channels, or need values, which meta tensors do not have.
        with contextlib.suppress(Exception), torch.device("meta"):
            model, in_chans = create_model(name, None, 3, img_size, **own), 3
    first = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == in_chans]
    return first or [n.rpartition(".")[0] for n, _ in model.named_parameters()][:1]
