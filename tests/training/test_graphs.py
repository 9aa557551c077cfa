"""Recorded training: by a stand-in for CUDA graphs on the CPU, and by CUDA graphs with `-m gpu`."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import nn

from fastroute.backends import BACKENDS
from fastroute.data.loaders import Draws
from fastroute.nn import GateClusteringLoss, SparseRouter, blocks
from fastroute.training import ImageDataModule, RoutingClassifier, fit
from fastroute.training import classifier as classifiers
from fastroute.training.capturable import CAPTURABLE
from fastroute.training.graphs import CUDAGraph, NotRecordable, RecordedStep, check_recording, settings
from tests.training.networks import Noisy
from tests.training.recorder import Recorder

CUDA = torch.cuda.is_available()
on_card = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
CLOCKS = {"seconds", "images_per_s", "data_wait"}


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=on_card)])
def accelerator(request, monkeypatch):
    Recorder.made.clear()
    # Under the recorder, a dispatch mode, blocks end in PyTorch's layers, as on a GPU; so do those of eager runs.
    monkeypatch.setattr(blocks, "native_serves_cpu", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return request.param


class StopAt(pl.Callback):
    def __init__(self, epoch, batch):
        self.place = (epoch, batch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.place:
            raise RuntimeError("killed")


def classifier(accelerator="cpu", callback=None, network=Noisy, cuda_graphs=True, **options):
    class Classifier(RoutingClassifier):
        graph = CUDAGraph if accelerator == "gpu" else Recorder

        def configure_callbacks(self):
            return [callback] if callback else []

    pl.seed_everything(0, verbose=False)
    options = {"sched": "multistep", "decay_milestones": (1,), "lr": 0.05} | options
    return Classifier(network(), 3, cuda_graphs=cuda_graphs, **options)


def run(module, folder, output, accelerator="cpu", epochs=2, data_options=None, **options):
    options = {"console": Console(quiet=True), "log_interval": 2} | options
    data = ImageDataModule(
        data_dir=folder, seed=3, **{"dataset": "imagefolder", "batch_size": 5} | (data_options or {})
    )
    return fit(module, data, epochs=epochs, output=output, accelerator=accelerator, **options)


SETTINGS = {  # of the classifier, and of the run
    "sgd": ({}, {}),
    "nesterov, one cycle, average": ({"opt": "nesterov", "sched": "onecycle"}, {"model_ema_decay": 0.9}),
    "adamw, average, clipped": (
        {"opt": "adamw", "lr": 1e-3, "sched": "cosine"},
        {"model_ema_decay": 0.9, "clip_grad": 1},
    ),
    "rmsprop, gates apart": ({"opt": "rmsprop", "lr": 1e-3, "gate_lr_mult": 2.0, "sched": "onecycle"}, {}),
    "bfloat16": ({"channels_last": True, "smoothing": 0.1}, {"amp_dtype": "bfloat16", "model_ema_decay": 0.9}),
    "mixed and erased": ({}, {"data_options": {"mixup": 0.4, "cutmix": 1.0, "reprob": 0.5, "aa": "rand-m5-n1"}}),
    "gate clustering": ({"aux_loss": GateClusteringLoss, "aux_weight": 0.1}, {}),
    "streamed": ({}, {"data_options": {"in_memory": False, "img_size": 8, "num_workers": 2}}),
}


def made(setting):
    options, run_options = SETTINGS[setting]
    return {name: value() if name == "aux_loss" else value for name, value in options.items()}, run_options


def assert_same(accelerator, expected, actual):
    """Compare bit for bit on the CPU; on a GPU, libraries may choose other kernels within a graph."""
    tolerance = {"rtol": 0, "atol": 0} if accelerator == "cpu" else {"rtol": 1e-3, "atol": 1e-4}
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_recorded_run_matches_the_eager_one(accelerator, image_folder, tmp_path, monkeypatch, setting):
    options, run_options = made(setting)
    if (
        accelerator == "cpu"
        and "amp_dtype" in run_options
        and (reason := BACKENDS["native"].reason_against(torch.device("cpu"), torch.float32))
    ):
        pytest.skip(f"operators in Python see autocast, which a replay does not; {reason}")
    recorded = classifier(accelerator, **options)
    rows = run(recorded, image_folder, tmp_path / "recorded", accelerator, **run_options)

    monkeypatch.setattr(classifiers, "OPTIMIZERS", CAPTURABLE)  # the same arithmetic, step by step from Python
    options, _ = made(setting)
    plain = classifier(accelerator, cuda_graphs=False, **options)
    expected_rows = run(plain, image_folder, tmp_path / "plain", accelerator, **run_options)

    assert_same(accelerator, plain.state_dict(), recorded.state_dict())
    for expected, actual in zip(expected_rows, rows, strict=True):
        assert actual.keys() == expected.keys()
        for name in expected.keys() - CLOCKS:
            assert actual[name] == pytest.approx(expected[name], rel=0 if accelerator == "cpu" else 1e-3), name
    last = [torch.load(tmp_path / name / "last.ckpt") for name in ("plain", "recorded")]
    assert last[0]["global_step"] == last[1]["global_step"] == 10
    assert last[0]["lr_schedulers"] == last[1]["lr_schedulers"]
    for name in ("state_dict", "current_model_state"):
        assert (name in last[0]) == (name in last[1])
        assert_same(accelerator, last[0].get(name, {}), last[1].get(name, {}))
    if accelerator == "cpu":
        (graph,) = Recorder.made  # of 10 batches 2 are smaller, and 3 of the others run before the recording
        assert graph.replays == 8 - 3 and graph.warmups == 3


def test_a_recorded_run_is_near_one_with_pytorch_s_optimiser(accelerator, image_folder, tmp_path):
    modules = [classifier(accelerator, cuda_graphs=recorded, lr=1e-3) for recorded in (False, True)]
    for module in modules:
        run(module, image_folder, tmp_path, accelerator)
    for expected, actual in zip(*(module.parameters() for module in modules), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("setting", ["sgd", "adamw, average, clipped"])
def test_resumes_a_killed_recorded_run_to_the_same_end(accelerator, image_folder, tmp_path, setting):
    options, run_options = SETTINGS[setting]
    whole = classifier(accelerator, **options)
    rows = run(whole, image_folder, tmp_path / "whole", accelerator, epochs=3, **run_options)
    with pytest.raises(RuntimeError, match="killed"):
        killed = classifier(accelerator, StopAt(1, 4), **options)
        run(killed, image_folder, tmp_path / "run", accelerator, epochs=3, recovery_interval=1, **run_options)
    resumed = classifier(accelerator, **options)
    nn.init.zeros_(resumed.model.network.stem_router.w1)  # the initial weights must not matter
    last = tmp_path / "run" / "last.ckpt"
    again = run(resumed, image_folder, tmp_path / "run", accelerator, epochs=3, resume=last, **run_options)
    assert_same(accelerator, whole.state_dict(), resumed.state_dict())
    for expected, actual in zip(rows, again, strict=True):
        assert {k: actual[k] for k in actual.keys() - CLOCKS} == pytest.approx(
            {k: expected[k] for k in expected.keys() - CLOCKS}, rel=0 if accelerator == "cpu" else 1e-3
        )


def test_frees_the_recording_and_loads_its_checkpoint_in_an_eager_run(accelerator, image_folder, tmp_path):
    module = classifier(accelerator, opt="adamw", lr=1e-3)
    run(module, image_folder, tmp_path, accelerator)
    assert module.recorded is None and module.replayed is None
    hyperparameters = torch.load(tmp_path / "last.ckpt")["hyper_parameters"]
    assert hyperparameters["cuda_graphs"] is True and hyperparameters["compile_mode"] is None
    plain = classifier(cuda_graphs=False, opt="adamw", lr=1e-3)
    rows = run(plain, image_folder, tmp_path, "cpu", epochs=3, resume=tmp_path / "last.ckpt")
    assert [row["epoch"] for row in rows] == [1, 2, 3]


def test_records_the_augmentation_of_images_in_memory(image_folder, tmp_path):
    batches = []

    class Seen(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batches.append(batch)

    Recorder.made.clear()
    run(classifier(callback=Seen()), image_folder, tmp_path, epochs=1)
    assert all(isinstance(batch, Draws) for batch in batches) and len(batches) == 5
    (graph,) = Recorder.made
    assert torch.ops.aten.index_select.default in {call[0] for call in graph.calls}  # of `shift_and_flip`


def test_a_nan_loss_stops_a_recorded_run(accelerator, image_folder, tmp_path):
    class Broken(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 1):
                with torch.no_grad():
                    pl_module.model.network.stem_router.w1.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match="the loss is nan at epoch 2, step 2, with learning rate"):
        run(classifier(accelerator, Broken()), image_folder, tmp_path, accelerator)


def test_a_network_that_reads_on_the_host_is_not_recordable(image_folder, tmp_path):
    """On the CPU only: after a failed recording, a process cannot draw random numbers on its GPU."""

    class Reading(Noisy):
        def forward(self, x, return_routing=False):
            return super().forward(x / x.abs().max().item(), return_routing)

    with pytest.raises(
        NotRecordable, match="cannot be recorded in a CUDA graph: it must not read a tensor on the host"
    ):
        run(classifier(network=Reading), image_folder, tmp_path)


class Doubling:
    """A step that counts in its own memory."""

    def __init__(self):
        self.total, self.ran = torch.zeros(()), 0

    def __call__(self, x, y):
        self.ran += 1
        self.total += (x * y).sum()
        return 2 * x, None


def steps(recorded, batches):
    for batch in batches:
        if recorded.takes(batch):
            outputs = recorded(batch)
        else:
            with recorded.plainly():
                outputs = recorded.step(*batch)
        yield outputs[0].clone()


def test_runs_steps_eagerly_then_records_and_replays_them():
    step = Doubling()
    recorded = RecordedStep(step, Recorder, warmup=2)
    batches = [(torch.full((3 if i % 4 == 3 else 5,), float(i)), torch.tensor(2.0)) for i in range(12)]
    for (x, _), output in zip(batches, steps(recorded, batches), strict=True):
        assert torch.equal(output, 2 * x)
    assert step.total == sum((x * y).sum() for x, y in batches)
    assert step.ran == 2 + 1 + 3 and recorded.graph.replays == 7  # eager, recorded, and the three smaller ones
    assert recorded.graph.warmups == 2
    assert all(kept is not given for kept, given in zip(recorded.inputs, batches[2], strict=True))


def test_does_not_take_a_batch_of_another_type():
    recorded = RecordedStep(lambda x: (x.float(),), Recorder, warmup=1)
    batches = [(torch.ones(2),), (torch.ones(2),), (torch.ones(2, dtype=torch.int64),)]
    assert [recorded.takes(batch) and bool(recorded(batch)) for batch in batches] == [False, True, False]


def test_refuses_wrong_arguments_and_batches():
    with pytest.raises(ValueError, match="warmup is 0; it must be at least 1"):
        RecordedStep(lambda x: (x,), Recorder, warmup=0)
    with pytest.raises(TypeError, match="a batch is a dict; with cuda_graphs, expected a tuple of tensors"):
        RecordedStep(lambda x: (x,), Recorder).takes({"x": torch.ones(1)})
    assert copy.deepcopy({"recorded": RecordedStep(lambda x: (x,), Recorder)}) == {"recorded": None}


def test_the_recorder_keeps_the_numbers_of_the_recording():
    rate, x, graph = [1.0], torch.zeros(()), Recorder()
    graph.record(lambda: (x.add_(rate[0]),))
    graph.replay()
    rate[0] = 100.0
    graph.replay()
    assert x == 2
    with pytest.raises(RuntimeError, match="not permitted"):
        graph.record(lambda: (x.item(),))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device_type": "cpu"}, "it needs a CUDA device, and "),
        ({"processes": 2}, "it trains in one process, and this run has 2"),
        ({"grad_accum_steps": 4}, "a recorded step takes one batch, so grad_accum_steps must be 1, not 4"),
        ({"amp_dtype": "float16"}, "float16's loss scaling reads the gradients on the host; use amp_dtype 'bfloat16'"),
        ({"compile_mode": "max-autotune"}, "compile_mode 'max-autotune' records CUDA graphs of its own; use 'default'"),
        (
            {"varying": True},
            "batches must be of one size, but on_bad_image 'skip' leaves streamed images out; use 'stop'",
        ),
        ({"anomaly": True}, "anomaly detection looks at every gradient on the host; turn it off"),
        ({"model": nn.Sequential(SparseRouter(4, 2))}, "a SparseRouter reads on the host how many samples each path"),
    ],
)
def test_refuses_runs_that_cannot_be_recorded(options, message):
    with pytest.raises(ValueError, match=f"^cuda_graphs is True; {message}"):
        check_recording(**{"device_type": "cuda"} | options)
    check_recording(device_type="cuda", compile_mode="max-autotune-no-cudagraphs", amp_dtype="bfloat16")


def test_fit_and_lightning_s_trainer_refuse_before_they_train(image_folder, tmp_path):
    data = ImageDataModule("imagefolder", tmp_path / "none")
    for options, message in (
        ({"grad_accum_steps": 2}, "grad_accum_steps must be 1, not 2"),
        ({"amp_dtype": "float16"}, "amp_dtype is 'float16'; on a CPU it must be 'bfloat16'"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(classifier(), data, epochs=1, output=tmp_path / "run", accelerator="cpu", **options)
    stream = ImageDataModule("imagefolder", tmp_path / "none", in_memory=False, on_bad_image="skip")
    with pytest.raises(ValueError, match="on_bad_image 'skip'"):
        fit(classifier(), stream, epochs=1, output=tmp_path / "run", accelerator="cpu")
    module = RoutingClassifier("resnet20", cuda_graphs=True)
    with pytest.raises(ValueError, match="it needs a CUDA device, and "):
        fit(module, data, epochs=1, output=tmp_path / "run", accelerator="cpu")
    assert not (tmp_path / "run").exists()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, accumulate_grad_batches=2, **quiet)
    with pytest.raises(ValueError, match="grad_accum_steps must be 1, not 2"):
        trainer.fit(classifier(), ImageDataModule("imagefolder", image_folder))
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, detect_anomaly=True, **quiet)
    with pytest.raises(ValueError, match="anomaly detection looks at every gradient"):
        trainer.fit(classifier(), ImageDataModule("imagefolder", image_folder))


def test_data_of_a_recorded_run_serve_other_loops(image_folder, tmp_path):
    module, data = classifier(), ImageDataModule("imagefolder", image_folder, batch_size=5, seed=3)
    fit(module, data, epochs=1, output=tmp_path, accelerator="cpu", console=Console(quiet=True))
    assert not data.deferred
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (5, 3, 32, 32) and len(labels) == 5


class Annealed(pl.Callback):
    """Change at a batch of each epoch what a recorded step would keep."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            pl_module.model.network.stem_router.temperature = 3.0 - trainer.current_epoch
            trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.1 * trainer.current_epoch


def test_what_changes_in_python_is_recorded_anew(accelerator, image_folder, tmp_path, monkeypatch):
    recorded = classifier(accelerator, Annealed())
    run(recorded, image_folder, tmp_path / "recorded", accelerator, data_options={"batch_size": 2})
    monkeypatch.setattr(classifiers, "OPTIMIZERS", CAPTURABLE)
    plain = classifier(accelerator, Annealed(), cuda_graphs=False)
    run(plain, image_folder, tmp_path / "plain", accelerator, data_options={"batch_size": 2})
    assert_same(accelerator, plain.state_dict(), recorded.state_dict())
    if accelerator == "cpu":
        assert [graph.replays > 0 for graph in Recorder.made] == [False, True, True]


def test_settings_that_a_recorded_step_keeps():
    network = Noisy()
    (weight, *_), router = network.parameters(), network.network.stem_router
    groups = [{"params": [weight], "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "betas": (0.9, 0.999)}]

    def now():
        return settings(list(network.modules()), list(network.parameters()), groups)

    first = now()
    groups[0] |= {"lr": 0.2, "momentum": 0.8, "betas": (0.8, 0.999)}
    assert now() == first
    for change, back in (
        (lambda: setattr(router, "temperature", 2.0), lambda: setattr(router, "temperature", 1.0)),
        (network.network.eval, network.network.train),
        (lambda: weight.requires_grad_(False), weight.requires_grad_),
        (lambda: groups[0].update(weight_decay=0.1), lambda: groups[0].update(weight_decay=0.0)),
        (lambda: groups[0].update(betas=(0.8, 0.5)), lambda: groups[0].update(betas=(0.8, 0.999))),
    ):
        change()
        assert now() != first
        back()
        assert now() == first
