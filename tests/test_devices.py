import pytest
import torch

from fastroute import _devices


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


def test_devices_by_name(two_gpus):
    assert _devices.resolve_device(None) == torch.device("cuda")
    for name in ("cpu", "cuda", "cuda:1", torch.device("cuda", 0)):
        assert _devices.resolve_device(name) == torch.device(name)
    for name in ("tpu", "meta", 1.5):
        with pytest.raises(ValueError, match=f"device is '{name}'; it must be cpu, cuda, or one GPU, such as cuda:1"):
            _devices.resolve_device(name)
    with pytest.raises(ValueError, match="device is 'cuda:2'; this machine has 2 GPUs"):
        _devices.resolve_device("cuda:2")


def test_an_index_is_that_of_the_current_gpu(two_gpus):
    assert _devices.indexed(torch.device("cuda")) == torch.device("cuda", 1)
    assert _devices.indexed(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert _devices.indexed(torch.device("cpu")) == torch.device("cpu")


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _devices.resolve_device(None) == torch.device("cpu")
    with pytest.raises(ValueError, match="device is 'cuda'; this machine has no GPU that PyTorch can use"):
        _devices.resolve_device("cuda")
