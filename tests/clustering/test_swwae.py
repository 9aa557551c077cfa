import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastroute.clustering.swwae import WhatWhere


@pytest.mark.parametrize("architecture", ["C4 M C8 M F6", "M C3", "M M F6", "C4 C4 M", "C4 F8"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7)])
def test_maps_are_put_back_to_where_they_were(architecture, shape):
    torch.manual_seed(0)
    module = WhatWhere(architecture, torch.Size(shape), 3, batch_norm=False)
    images, seen = torch.rand(5, *shape), []
    for layer in module.decoder:
        if isinstance(layer, nn.MaxUnpool2d):
            layer.register_forward_hook(lambda layer, given, made: seen.append((*given, made)))
    module.step(images, None).backward()
    assert len(seen) == architecture.split().count("M")
    for x, where, size, made in seen:
        assert made.shape == size
        torch.testing.assert_close(made.flatten(2).gather(2, where.flatten(2)), x.flatten(2))
        assert made.count_nonzero() == x.count_nonzero()
    assert all(p.grad is not None for p in module.parameters())


def test_the_loss_is_of_pixels_and_of_the_maps_between():
    torch.manual_seed(0)
    module = WhatWhere("C4 M F6", torch.Size((1, 8, 8)), 3, batch_norm=False)
    images = torch.rand(6, 1, 8, 8)
    convolved = module.encoder[:2](images)
    what, where = F.max_pool2d(convolved, 2, return_indices=True)
    code = module.encoder[3:](what)
    unpool = next(place for place, layer in enumerate(module.decoder) if isinstance(layer, nn.MaxUnpool2d))
    middle = module.decoder[:unpool](code)
    made = module.decoder[unpool + 1 :](F.max_unpool2d(middle, where, 2))
    expected = (made - images).square().mean() + 0.2 * (middle - what).square().mean()
    torch.testing.assert_close(module.step(images, None), expected)
    torch.testing.assert_close(module.features(images), code)


def test_bad_input():
    shape = torch.Size((1, 8, 8))
    with pytest.raises(ValueError, match="img_size is 8; it is too small for the pools of 'M M M M'"):
        WhatWhere("M M M M", shape, 3)
    with pytest.raises(ValueError, match="lr is 0; it must be greater than 0"):
        WhatWhere("M", shape, 3, lr=0)
