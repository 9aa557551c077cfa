"""The named networks of the thesis, and any network made multi-path."""

import sys

from fastroute.models._cost import count_macs
from fastroute.models._timm import register_timm
from fastroute.models.blockdrop import blockdrop110
from fastroute.models.capsules import capsnet
from fastroute.models.cifar_resnet import (
    resnet20,
    resnet20_cc2,
    resnet20_cc3,
    resnet20_cc4,
    resnet20_cp2,
    resnet20_cp3,
    resnet20_cp4,
    resnet20_x2,
    resnet20_x3,
    resnet20_x4,
    resnet32,
    resnet32_cc2,
    resnet32_cc3,
    resnet32_cc4,
    resnet32_x2,
    resnet32_x3,
    resnet32_x4,
    resnet110,
    resnet164,
    se_resnet110,
    wrn_40_2,
)
from fastroute.models.cnn import (
    base_cnn,
    base_cnn_cc2,
    base_cnn_cc3,
    base_cnn_cc4,
    base_cnn_cp2,
    base_cnn_cp3,
    base_cnn_cp4,
    base_cnn_x3,
    cross_stitch_base_cnn2,
    deep_cnn,
    se_base_cnn,
    se_deep_cnn,
    vgg13_cc2,
    vgg16,
    wide_cnn,
)
from fastroute.models.conversion import multipath
from fastroute.models.convnet_aig import convnet_aig110
from fastroute.models.ensemble import Ensemble, all_ensemble, base_cnn_ensemble
from fastroute.models.highway import highway
from fastroute.models.hypernetwork import hyper_wrn_40_2
from fastroute.models.imagenet_resnet import (
    resnet18,
    resnet18_cc2,
    resnet34,
    resnet50,
    resnet50_cc2,
    resnet101,
    resnext50_2x64d,
    wide_resnet50_2,
    wrn_18_1_5,
)
from fastroute.models.registry import ModelInfo, create_model, list_models, model_info, register_model
from fastroute.models.skipnet import skipnet110
from fastroute.models.skippable_resnet import executed_blocks
from fastroute.models.sparse_resnet import resnet20_sparse4_top1, resnet20_sparse4_top2
from fastroute.models.specification import Specification, specification_of

__all__ = [
    "Ensemble",
    "ModelInfo",
    "Specification",
    "all_ensemble",
    "base_cnn",
    "base_cnn_cc2",
    "base_cnn_cc3",
    "base_cnn_cc4",
    "base_cnn_cp2",
    "base_cnn_cp3",
    "base_cnn_cp4",
    "base_cnn_ensemble",
    "base_cnn_x3",
    "blockdrop110",
    "capsnet",
    "convnet_aig110",
    "count_macs",
    "create_model",
    "cross_stitch_base_cnn2",
    "deep_cnn",
    "executed_blocks",
    "highway",
    "hyper_wrn_40_2",
    "list_models",
    "model_info",
    "multipath",
    "register_model",
    "register_timm",
    "resnet18",
    "resnet18_cc2",
    "resnet20",
    "resnet20_cc2",
    "resnet20_cc3",
    "resnet20_cc4",
    "resnet20_cp2",
    "resnet20_cp3",
    "resnet20_cp4",
    "resnet20_sparse4_top1",
    "resnet20_sparse4_top2",
    "resnet20_x2",
    "resnet20_x3",
    "resnet20_x4",
    "resnet32",
    "resnet32_cc2",
    "resnet32_cc3",
    "resnet32_cc4",
    "resnet32_x2",
    "resnet32_x3",
    "resnet32_x4",
    "resnet34",
    "resnet50",
    "resnet50_cc2",
    "resnet101",
    "resnet110",
    "resnet164",
    "resnext50_2x64d",
    "se_base_cnn",
    "se_deep_cnn",
    "se_resnet110",
    "skipnet110",
    "specification_of",
    "vgg13_cc2",
    "vgg16",
    "wide_cnn",
    "wide_resnet50_2",
    "wrn_18_1_5",
    "wrn_40_2",
]

if "timm" in sys.modules:
    register_timm()
