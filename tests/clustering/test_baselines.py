import math

import pytest
import torch

from fastroute.clustering.dec import DEC, student_t, target_distribution
from fastroute.clustering.iic import IIC, ManyHeadedIIC, iic_loss
from fastroute.clustering.run import Batches
from tests.clustering.test_two_fold import digits, trainer_of


def test_mutual_information_by_hand():
    p, q = torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    # Σ p qᵀ / 2 = [[.42, .13], [.23, .22]], and symmetric [[.42, .18], [.18, .22]] with margins .6 and .4.
    information = 0.42 * math.log(0.42 / 0.36) + 2 * 0.18 * math.log(0.18 / 0.24) + 0.22 * math.log(0.22 / 0.16)
    assert iic_loss(p, q).item() == pytest.approx(-information, rel=1e-5)


def test_extremes_of_mutual_information():
    certain = torch.eye(4).repeat(3, 1)
    assert iic_loss(certain, certain).item() == pytest.approx(-math.log(4))
    assert iic_loss(torch.full((8, 4), 0.25), certain[:8]).item() == pytest.approx(0, abs=1e-6)
    p = certain.clone().requires_grad_()
    iic_loss(p, certain).backward()
    assert p.grad.isfinite().all()


def test_heads_are_trained_in_turn_by_all_copies():
    torch.manual_seed(0)
    network, moved = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2 * 4 * 3)), iter((1, 2) * 3)
    module = ManyHeadedIIC(network, 3, heads=2, over=3, copies=2, augmentation=lambda x: x.roll(next(moved), -1))
    images, _ = digits(40)
    p, q = network(images), [network(images.roll(by, -1)) for by in (1, 2)]
    for step, (start, width) in ((0, (0, 3)), (1, (6, 9)), (2, (0, 3))):
        type(module).global_step = step
        losses = []
        for place in (start, start + width):
            posteriors = [scores[:, place : place + width].softmax(1) for scores in (p, *q)]
            losses.append(iic_loss(posteriors[0].repeat(2, 1), torch.cat(posteriors[1:])))
        torch.testing.assert_close(module.step(images, None), sum(losses) / 2)
    del type(module).global_step


def test_an_epoch_trains_the_main_heads():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4 * 2 * 3))
    module = ManyHeadedIIC(network, 3, heads=4, over=1, copies=1, augmentation=lambda x: x.roll(1, -1), lr=1e-2)
    before = network[1].weight.clone()
    images, labels = digits(60)
    trainer_of(1).fit(module, Batches(images, labels, 30, 0), Batches(images, labels, 40))
    moved = (network[1].weight != before).any(1).tensor_split([4 * 3])
    assert all(heads.all() for heads in moved)  # the main ones in the first step, and the auxiliary ones in the second


def test_the_main_head_of_the_lowest_loss_is_chosen():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4 * 2 * 3))
    module = ManyHeadedIIC(network, 3, heads=4, over=1, copies=1, augmentation=lambda x: x.roll(1, -1), lr=1e-9)
    images, labels = digits(60)
    trainer_of(1).fit(module, Batches(images, labels, 30, 0), Batches(images, labels, 40))
    p, q = (network(x)[:, :12].unflatten(1, (4, 3)) for x in (images, images.roll(1, -1)))
    losses = [iic_loss(p[:, h].softmax(1), q[:, h].softmax(1)).item() for h in range(4)]
    best = min(range(4), key=losses.__getitem__)
    assert module.head == best != 0
    torch.testing.assert_close(module.responses(images), p[:, best])


def test_assignments_and_targets_by_hand():
    q = student_t(torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]]))
    # Kernels 1/2 and 1/10; 1/11 and 1.
    torch.testing.assert_close(q, torch.tensor([[5 / 6, 1 / 6], [1 / 12, 11 / 12]]))
    p = target_distribution(q)
    first = torch.tensor([25 / 36 / (11 / 12), 1 / 36 / (13 / 12)])
    torch.testing.assert_close(p[0], first / first.sum())
    assert p[0, 0] > q[0, 0] and p[1, 1] > q[1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IIC(torch.nn.Linear(2, 3), 3, lr=0), "lr is 0; it must be greater than 0"),
        (lambda: ManyHeadedIIC(torch.nn.Linear(2, 3), 3, copies=0), "copies is 0; it must be greater than 0"),
        (lambda: DEC(4, 3, pretrain_epochs=1, lr=-1), "lr is -1; it must be greater than 0"),
        (lambda: DEC(4, 3, pretrain_epochs=0), "pretrain_epochs is 0; it must be at least 1"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_autocast_leaves_the_joint_distribution_in_float32():
    torch.manual_seed(0)
    p, q = torch.randn(2, 300, 6).softmax(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = iic_loss(p, q)
    assert torch.equal(found, iic_loss(p, q))
