import subprocess
import sys

import pytest
import torch

from fastroute import models

timm = pytest.importorskip("timm")


def test_every_network_has_a_name_that_timm_did_not_have():
    names = models.register_timm()
    assert names == models.register_timm()
    assert [name.removeprefix("fastroute_") for name in names] == models.list_models()
    assert {"resnet20_cc2", "fastroute_resnet18", "resnet18_cc2", "fastroute_vgg16"} <= set(names)
    assert set(names) <= set(timm.list_models())
    assert type(timm.create_model("resnet18")).__module__ == "timm.models.resnet"


def test_timm_builds_them():
    models.register_timm()
    model = timm.create_model("resnet20_cc2", num_classes=7, in_chans=1, drop_rate=0.0)
    assert model.num_classes == 7 and model(torch.randn(2, 1, 8, 8)).shape == (2, 7)
    assert timm.data.resolve_data_config({}, model=model)["input_size"] == (1, 32, 32)
    assert timm.create_model("resnet20").num_classes == 10
    with pytest.raises(ValueError, match="pretrained is True; there are no pretrained weights of resnet20"):
        timm.create_model("resnet20", pretrained=True)
    with pytest.raises(ValueError, match=r"drop_rate is 0.1; resnet20 has no dropout"):
        timm.create_model("resnet20", drop_rate=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("imports", ["timm, fastroute", "fastroute, timm; fastroute.models.register_timm()"])
def test_registered_at_import_or_on_request(imports):
    code = f"import {imports}; print(timm.is_model('resnet20_cc2'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "True", result.stderr
