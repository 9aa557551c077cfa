import copy
import warnings

import pytest
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import mutual_info_score
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fastroute.clustering.networks import clustering_network
from fastroute.clustering.two_fold import TwoFoldClustering


def digits(count=1797):
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X[:count] / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y[:count])


def trainer_of(epochs, **options):
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def fit(module, images, labels, epochs, **options):
    trainer = trainer_of(epochs, **options)
    data = TensorDataset(images, labels)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        trainer.fit(module, DataLoader(data, 128, shuffle=True, drop_last=True), DataLoader(data, 500))
    return trainer.callback_metrics


@pytest.mark.parametrize("method", ["two-fold", "em", "consistency"])
def test_a_step_is_algorithm_3(method):
    torch.manual_seed(0)
    images, labels = digits(64)
    network = clustering_network("F8", 3, 8)
    by_hand = copy.deepcopy(network)
    module = TwoFoldClustering(
        network,
        3,
        method=method,
        training_statistics="batch",
        augmentation=lambda x: x.flip(-1),
        lr_em=0.01,
        lr_consistency=0.02,
    )
    trainer = pl.Trainer(
        max_steps=9,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, DataLoader(TensorDataset(images, labels), 64))

    def normalized(x):
        a = by_hand(x)
        return (a - a.mean(0)) / a.std(0, correction=0)

    em, consistency = (torch.optim.Adam(by_hand.parameters(), lr=lr) for lr in (0.01, 0.02))
    x, x_tr = images, images.flip(-1)
    if method != "consistency":
        a, a_tr = normalized(x), normalized(x_tr)
        p = a.softmax(1).detach()
        loss = -(p * (F.logsigmoid(a / 5) + F.logsigmoid(a_tr / 5))).sum(1).mean()  # Eq. 4.23
        em.zero_grad()
        loss.backward()
        em.step()
    if method != "em":
        p, q = normalized(x).softmax(1).detach(), normalized(x_tr).softmax(1)
        consistency.zero_grad()
        (p * (p / q).log()).sum(1).mean().backward()  # Eq. 4.24
        consistency.step()
    # The last bias shifts a whole column, which changes nothing: its gradient is noise, which Adam scales up.
    for ours, theirs in zip([*network.parameters()][:-1], [*by_hand.parameters()][:-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_learns_digits_and_does_not_collapse_without_batch_norm():
    pl.seed_everything(0, verbose=False)
    images, labels = digits()
    network = clustering_network("C16 M C32 F32", 10, 8, batch_norm=False)
    module = TwoFoldClustering(network, 10, lr_em=1e-3, lr_consistency=2e-3)
    metrics = fit(module, images, labels, epochs=6, check_val_every_n_epoch=6)
    assert metrics["acc"] > 0.5 and metrics["empty"] == 0 and metrics["entropy"] < 0.9
    assert metrics["em_loss"] < 1.25  # 2 log 2 is 1.386


def test_heads_cluster_independently_and_the_steadiest_is_chosen():
    images, labels = digits(300)
    torch.manual_seed(0)
    rates = {"lr_em": 1e-9, "lr_consistency": 1e-9}
    module = TwoFoldClustering(
        clustering_network("F32", 3 * 10, 8), 10, heads=3, augmentation=lambda x: x.roll(1, -1), **rates
    )
    fit(module, images, labels, epochs=1, limit_train_batches=2)
    module.eval()
    scores = module.scores(images)
    assert scores.shape == (300, 3, 10)
    normalized = (scores - module.normalize.running_mean) / module.normalize.running_std
    moved = (module.scores(images.roll(1, -1)) - module.normalize.running_mean) / module.normalize.running_std
    shared = [mutual_info_score(normalized[:, h].argmax(1), moved[:, h].argmax(1)) for h in range(3)]
    best = max(range(3), key=shared.__getitem__)
    assert module.head == best and sorted(shared)[-1] - sorted(shared)[-2] > 0.01
    torch.testing.assert_close(module(images), normalized[:, best].softmax(1))


def test_heads_do_not_mix():
    """A step of one head's rows is what it is beside others."""
    images, labels = digits(64)
    torch.manual_seed(0)
    both = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 6))
    alone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    alone[1].load_state_dict({name: value[3:].clone() for name, value in both[1].state_dict().items()})
    for network, heads in ((both, 2), (alone, 1)):
        module = TwoFoldClustering(network, 3, heads=heads, augmentation=lambda x: x.flip(-1), lr_em=0.01)
        fit(module, images, labels, epochs=1)
    torch.testing.assert_close(both[1].weight[3:], alone[1].weight, rtol=1e-3, atol=1e-5)


def test_one_cluster_has_no_entropy():
    module = TwoFoldClustering(torch.nn.Linear(4, 1), 1)
    logged = {}
    module.log_dict = logged.update
    module._seen.append((torch.ones(6, 1), torch.arange(6) % 2))
    module.on_validation_epoch_end()
    assert logged["entropy"] == 0 and logged["acc"] == 0.5


def test_warns_of_a_collapse():
    images, labels = digits(200)
    module = TwoFoldClustering(clustering_network("F8", 10, 8), 10, lr_em=1e-9, lr_consistency=1e-9)
    torch.nn.init.zeros_(module.network[-1].weight)
    with pytest.warns(UserWarning, match="has collapsed: 9 of 10 clusters are empty, .* 100%"):
        fit(module, images, labels, epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads is 0; it must be at least 1"),
        ({"method": "one-fold"}, "method is 'one-fold'"),
        ({"lr_em": 0}, "lr_em is 0; it must be greater than 0"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        TwoFoldClustering(torch.nn.Linear(2, 3), 3, **options)


@pytest.mark.parametrize("method", ["two-fold", "em", "consistency"])
def test_each_method_counts_a_batch_once_in_the_statistics(method):
    images, labels = digits(256)
    module = TwoFoldClustering(clustering_network("F8", 3, 8), 3, method=method, augmentation=lambda x: x.flip(-1))
    fit(module, images, labels, epochs=1)
    assert module.normalize.num_batches_tracked == 2
