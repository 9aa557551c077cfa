import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastroute.nn import CrossConnection, GateClusteringLoss
from fastroute.training import ImageDataModule, RoutingClassifier

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|LeafSpec)")  # Lightning's own


class TwoPaths(nn.Module):
    """A user's own network, with one router in it."""

    def __init__(self):
        super().__init__()
        self.router = CrossConnection(4, 1, 2)
        self.heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x):
        return sum(head(y) for head, y in zip(self.heads, self.router([x.flatten(1)]), strict=True))


def train(module, epochs=4, batches=5, **options):
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    rates = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer.callbacks.append(Rates())
    data = DataLoader(TensorDataset(torch.randn(6 * batches, 4, 1, 1), torch.arange(6 * batches) % 3), batch_size=6)
    trainer.fit(module, data, data)
    return trainer, rates


def test_trains_a_user_s_network():
    torch.manual_seed(0)
    module = RoutingClassifier(TwoPaths(), num_classes=3)
    before, losses = module.model.router.w1.clone(), []
    for _ in range(2):  # over the same images
        trainer, _ = train(module)
        losses.append(trainer.callback_metrics["train_loss"])
    assert not torch.equal(module.model.router.w1, before)
    assert losses[1] < losses[0]
    assert module.hparams.model == "TwoPaths"


def test_sgd_is_the_thesis_s():
    trainer, _ = train(RoutingClassifier(TwoPaths(), num_classes=3))
    group = trainer.optimizers[0].param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, False)


def test_milestones():
    _, rates = train(RoutingClassifier(TwoPaths(), 3, lr=1.0, decay_milestones=(1, 3)), batches=2)
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_schedules_of_a_run_that_ends_by_its_steps():
    step = RoutingClassifier(TwoPaths(), 3, lr=1.0, sched="step", decay_epochs=1)
    for epochs in (-1, 10):
        assert train(step, epochs, 2, max_steps=6)[1] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    _, rates = train(RoutingClassifier(TwoPaths(), 3, lr=1.0), -1, max_steps=10)  # milestones at 4 and 7.5 steps
    assert rates == pytest.approx([1] * 4 + [0.1] * 4 + [0.01] * 2)


def test_mixed_images_of_fewer_classes_than_logits():
    images, shares = torch.randn(6, 4, 1, 1), torch.rand(6, 2).softmax(1)
    module = RoutingClassifier(TwoPaths(), 3)
    expected = nn.functional.cross_entropy(module.model(images), nn.functional.pad(shares, (0, 1)))
    torch.testing.assert_close(module.training_step((images, shares), 0), expected)


def test_one_cycle_schedule():
    _, rates = train(RoutingClassifier(TwoPaths(), 3, lr=1.0, sched="onecycle"))
    assert len(rates) == 20 and max(rates) == pytest.approx(1.0, rel=0.05)
    assert rates.index(max(rates)) == 5 and rates[0] < 0.1 and rates[-1] < 1e-4


def test_named_network_is_built_and_computes_in_channels_last():
    module = RoutingClassifier("resnet20_cc2", num_classes=7, in_chans=1, channels_last=True)
    assert module.model.stack2[0][1].residual[0].weight.is_contiguous(memory_format=torch.channels_last)
    logits, routing = module(torch.randn(2, 1, 8, 8), return_routing=True)
    assert logits.shape == (2, 7) and len(routing) == 4


def test_trains_a_user_s_network_in_ten_lines_of_lightning():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), TwoPaths())
    data = ImageDataModule("digits", batch_size=256, first_classes=3)
    module = RoutingClassifier(network, num_classes=3, lr=0.05, sched="onecycle")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, **quiet)
    before = network[2].router.w1.clone()
    trainer.fit(module, data)
    assert not torch.equal(network[2].router.w1, before)


def test_fewer_logits_than_classes_are_refused():
    module = RoutingClassifier("resnet20", num_classes=3, in_chans=1, img_size=8)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, **quiet)
    with pytest.raises(ValueError, match="num_classes is 3; the data have 10 classes"):
        trainer.fit(module, ImageDataModule("digits"))


def evenness(routing):
    """A loss on the relevance scores of every router."""
    return sum(r.scores.square().mean() for r in routing.values())


def step(module, images, labels):
    module.trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False)
    module.log = lambda name, value, **_: module.logged.update({name: value})
    module.logged = {}
    return module.training_step((images, labels), 0)


def test_an_auxiliary_loss_reaches_the_gates_through_the_scores():
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    plain = RoutingClassifier("resnet20_cc2")
    routed = RoutingClassifier("resnet20_cc2", aux_loss=evenness, aux_weight=0.5)
    routed.load_state_dict(plain.state_dict())
    for module in (plain, routed):
        torch.nn.init.normal_(module.model.stack1_router.w2, generator=torch.Generator().manual_seed(1))
    loss, with_aux = step(plain, images, labels), step(routed, images, labels)
    _, routing = plain.model(images, return_routing=True)
    torch.testing.assert_close(with_aux - loss, 0.5 * evenness(routing))
    torch.testing.assert_close(routed.logged["train_aux"], evenness(routing).detach())
    (with_aux - loss).backward()
    router = routed.model.stack1_router
    (expected,) = torch.autograd.grad(0.5 * evenness(routing), plain.model.stack1_router.w2)
    torch.testing.assert_close(router.w2.grad + plain.model.stack1_router.w2.grad, expected, rtol=1e-3, atol=1e-5)
    assert expected.abs().max() > 0.01


def test_an_auxiliary_loss_module_is_trained_and_saved():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, routing):
            return self.scale * evenness(routing)

    module = RoutingClassifier("resnet20_cc2", aux_loss=Scaled())
    assert "aux_loss.scale" in module.state_dict()
    with pytest.raises(
        ValueError, match="model is TwoPaths; its forward takes no return_routing, which aux_loss needs"
    ):
        RoutingClassifier(TwoPaths(), 3, aux_loss=evenness)


def test_resumes_a_run_without_an_auxiliary_loss_with_one():
    plain, clustered = (
        RoutingClassifier("resnet20_cc2"),
        RoutingClassifier("resnet20_cc2", aux_loss=GateClusteringLoss()),
    )
    saved = {"state_dict": plain.state_dict()}
    clustered.on_load_checkpoint(saved)
    clustered.load_state_dict(saved["state_dict"])
    assert torch.equal(clustered.model.stem_router.w1, plain.model.stem_router.w1)


def test_compiling_keeps_the_names_of_weights():
    module = RoutingClassifier("resnet20_cc2", compile=True)
    assert module.state_dict().keys() == RoutingClassifier("resnet20_cc2").state_dict().keys()
    assert module.model._compiled_call_impl is not None


def test_passes_the_mode_to_the_compiler(monkeypatch):
    modes = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode=None: modes.append(mode))
    for mode in (None, "max-autotune-no-cudagraphs"):
        assert RoutingClassifier("resnet20", compile=True, compile_mode=mode).hparams.compile_mode == mode
    assert modes == [None, "max-autotune-no-cudagraphs"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"lr": 0}, "lr is 0; it must be above 0"),
        ({"sched": "poly"}, "sched is 'poly'; it must be one of 'step', 'multistep', 'cosine', 'onecycle'"),
        ({"opt": "lion"}, "opt is 'lion'; it must be one of 'sgd', 'nesterov', 'rmsprop', 'adam', 'adamw'"),
        ({"smoothing": 1}, "smoothing is 1; it must be at least 0 and below 1"),
        ({"weight_decay": -1}, "weight_decay is -1; it must be at least 0"),
        ({"gate_wd": -0.1}, "gate_wd is -0.1; it must be at least 0"),
        ({"gate_lr_mult": 0}, "gate_lr_mult is 0; it must be above 0"),
        ({"warmup_epochs": -1}, "warmup_epochs is -1; it must be at least 0"),
        ({"decay_epochs": 0}, "decay_epochs is 0; it must be above 0"),
        (
            {"compile": True, "compile_mode": "fast"},
            "compile_mode is 'fast'; it must be None or one of 'default', 'reduce",
        ),
        ({"compile_mode": "default"}, "compile_mode is 'default', but compile is False; set compile"),
        ({"decay_rate": -1}, "decay_rate is -1; it must be above 0 and at most 1"),
        ({"opt": "nesterov", "momentum": 0}, "momentum is 0; with opt='nesterov' it must be above 0"),
        ({"model": "resnet21"}, "name is 'resnet21'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RoutingClassifier(**{"model": "resnet20", **arguments})


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.fc, self.what = nn.Linear(3, 3), what

    def forward(self, x):
        return self.what(self.fc(x.mean((2, 3))))


def fitted(network, batches, **options):
    module = RoutingClassifier(network, 3, **{"sched": "step"} | options)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module


IMAGES = torch.rand(4, 3, 8, 8)


@pytest.mark.parametrize(
    "batch, what, message",
    [
        ((IMAGES, torch.tensor([0, 1, -1, 2])), nn.Identity(), r"labels have -1; they must be the numbers"),
        ((IMAGES, torch.tensor([0, 1, -100, 2])), nn.Identity(), r"labels have -100"),
        (
            (IMAGES, torch.tensor([[1.0, 1, 0]] * 4)),
            nn.Identity(),
            r"a row that begins with \[1.0, 1.0, 0.0\]; .* is 1",
        ),
        ((IMAGES, torch.tensor([[1.0, 0, 0], [1.5, -0.5, 0]] * 2)), nn.Identity(), r"begins with \[1.5, -0.5, 0.0\]"),
        ({"images": IMAGES, "labels": torch.arange(4)}, nn.Identity(), r"a batch is a dict; it must be a pair of"),
        ((IMAGES, torch.arange(4), torch.arange(4)), nn.Identity(), r"a batch is a \w+ of Tensor, Tensor, Tensor; it"),
        (([IMAGES], torch.arange(4)), nn.Identity(), r"a batch is a \w+ of list, Tensor; it must be"),
        ((IMAGES, torch.arange(4) % 3), lambda x: {"logits": x}, r"it returns a dict, expected logits"),
        ((IMAGES, torch.arange(4) % 3), lambda x: (x, x), r"it returns a tuple, expected logits"),
        ((IMAGES, torch.arange(4) % 3), lambda x: x[:, 0], r"it returns \(4,\), expected logits"),
    ],
)
def test_batches_and_outputs_of_other_tasks_are_refused(batch, what, message):
    with pytest.raises(ValueError, match=message):
        fitted(Returns(what), [batch])


def test_shares_of_classes_are_rounded():
    fitted(Returns(nn.Identity()), [(IMAGES, torch.tensor([[0.333, 0.333, 0.333]] * 4))])


def test_images_that_are_not_square_are_told():
    with pytest.warns(UserWarning, match="images are 8×12, and predictors .* crop squares of img_size, 32"):
        module = fitted(Returns(nn.Identity()), [(torch.rand(4, 3, 8, 12), torch.arange(4) % 3)], img_size=32)
    assert module.hparams.in_chans == 3 and module.hparams.img_size == 32


@pytest.mark.parametrize("dims", [1, 3])
def test_channels_last_is_for_maps_alone(dims):
    conv, pool = getattr(nn, f"Conv{dims}d"), getattr(nn, f"AdaptiveAvgPool{dims}d")
    network = nn.Sequential(conv(3, 4, 3), pool(1), nn.Flatten(), nn.Linear(4, 3))
    batch = torch.rand(4, 3, *[8] * dims), torch.arange(4) % 3
    fitted(network, [batch], channels_last=True)


def test_a_loss_of_the_network_s_own_takes_several_labels_of_an_image():
    class Several(Returns):
        def training_loss(self, images, targets, progress):
            logits = self(images)
            return nn.functional.binary_cross_entropy_with_logits(logits, targets), logits

    fitted(Several(nn.Identity()), [(IMAGES, torch.tensor([[1.0, 1, 0], [0, 0, 0]] * 2))])


def test_the_network_and_the_rates_must_be_of_their_types():
    with pytest.raises(TypeError, match="model is the class ReLU; it must be a network"):
        RoutingClassifier(nn.ReLU, 3)
    with pytest.raises(TypeError, match="model is a int; it must be a network"):
        RoutingClassifier(3, 3)
    with pytest.raises(TypeError, match=r"lr is '0\.1'; it must be a number"):
        RoutingClassifier("resnet20", 3, lr="0.1")


def test_a_run_may_end_by_its_steps_within_an_epoch():
    module = RoutingClassifier(TwoPaths(), 3, lr=1.0, sched="step", decay_epochs=1)
    assert train(module, -1, 2, max_steps=5)[1] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
