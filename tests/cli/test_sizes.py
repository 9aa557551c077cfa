"""What does not fit in memory is refused before it is read."""

from types import SimpleNamespace

import pytest
import torch

from fastroute.cli.sizes import check_batch
from tests.cli.commands import run


def test_what_is_checked_is_the_device_of_the_run(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def properties(device):
        asked.append(device)
        return SimpleNamespace(total_memory=1000 if device == torch.device("cuda", 1) else 2**40)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    done = run("train", "resnet20", "--device", "cpu", "--sync-bn")
    assert done.exit_code == 2 and "sync_bn is True; PyTorch's synchronised batch norm needs GPUs" in done.output
    check_batch("resnet20", 8, 3, 32, training=False, device=torch.device("cpu"))
    check_batch("resnet20", 8, 3, 32, training=False, device=torch.device("cuda", 0))
    assert asked == [torch.device("cuda", 0)]
    with pytest.raises(ValueError, match="batch_size is 8 and img_size 32; a batch would take"):
        check_batch("resnet20", 8, 3, 32, training=False, device=torch.device("cuda", 1))
