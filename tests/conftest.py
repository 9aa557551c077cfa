import sys

import pytest
import torch

# The bounds of float32 are those of float32: on a card, convolutions would round their inputs to TF32.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

# Tests that take over two seconds of a processor, each or together: those whose ids begin so, and those of THOROUGH.
LONG = tuple(
    f"tests/{name}"
    for name in (
        "backends/cuda_kernels/",
        "backends/test_recordings.py",
        "backends/test_triton_aot.py",
        "backends/triton_kernels/test_cross_",
        "backends/triton_kernels/test_gate.py",
        "backends/triton_kernels/test_mix",
        "bench/test_commands.py::test_pytest_measures_the_same_cases",
        "bench/test_gpu_check.py::test_it_",
        "bench/test_report.py::test_figures_are_drawn",
        "bench/test_suites.py::test_networks_are_checked_and_timed",
        "bench/test_suites.py::test_operators_are_checked_and_timed",
        "cli/test_train.py::test_accepts_args_yaml",
        "cli/test_train.py::test_block_is",
        "cli/test_cli.py::test_a_missing_package",
        "cli/test_cli.py::test_help",
        "cli/test_train.py::test_gates_are_clustered",
        "cli/test_train.py::test_overwrites_a_finished_run",
        "cli/test_train.py::test_reads_",
        "cli/test_train.py::test_reports_a_full_disk",
        "cli/test_cli.py::test_reports_ctrl_c",
        "cli/test_train.py::test_resume_auto",
        "cli/test_train.py::test_saves_at_ctrl_c",
        "cli/test_train.py::test_starts_from_weights",
        "cli/test_train.py::test_trains",
        "cli/test_validate.py::test_validates",
        "clustering/test_emerging.py::test_clusters_come",
        "clustering/test_command.py::test_every_method",
        "clustering/test_neural_mixture.py::test_reads_a_file_by_the_batch",
        "clustering/test_neural_mixture.py::test_scikit_learns_own_checks",
        "clustering/test_neural_mixture.py::test_uneven_groups",
        "clustering/test_neural_mixture.py::test_without_scikit_learn",
        "clustering/test_two_fold.py::test_learns_digits",
        "models/test_conversion.py::test_copies_pickles",
        "models/test_networks.py::test_export",
        "models/test_networks.py::test_torchvision_weights",
        "models/test_sparse_resnet.py",
        "nn/test_cross_connection.py::test_annealing",
        "nn/test_exact_convolutions.py::test_a_network",
        "nn/test_sparse.py::test_clustered_routing_under_compile",
        "nn/test_sparse.py::test_exports",
        "nn/test_spread_paths.py",
        "ops/test_compile_form.py::test_a_fused_graph_computes",
        "ops/test_cross_connect.py::test_compiles",
        "ops/test_cross_connect.py::test_gradcheck",
        "ops/test_cross_connect.py::test_nothing_is_mutated",
        "ops/test_cross_connect.py::test_one_",
        "ops/test_cross_connect.py::test_outputs_and_every_gradient[default-s",
        "ops/test_cross_connect.py::test_outputs_and_every_gradient[python",
        "ops/test_cross_connect.py::test_outputs_and_every_gradient[reference",
        "ops/test_cross_predict.py::test_compiles",
        "ops/test_cross_predict.py::test_gradcheck",
        "ops/test_cross_predict.py::test_large_maps",
        "ops/test_cross_predict.py::test_nothing_is_mutated",
        "ops/test_cross_predict.py::test_outputs_and_every_gradient[python",
        "ops/test_cross_predict.py::test_outputs_and_every_gradient[reference",
        "ops/test_gate.py::test_gradcheck",
        "ops/test_mix.py::test_gradcheck",
        "ops/test_mixture_em.py::test_opcheck",
        "test_examples.py",
        "training/test_distributed.py",
        "training/test_graphs.py",
        "training/test_own_loss.py",
        "training/test_resume.py",
        "training/test_saved_fields.py::test_names_",
        "training/test_trainer.py",
        "visualize/",
    )
)

# Tests that take several seconds of a processor, where `make test` has shorter ones of the same kind.
THOROUGH = tuple(
    f"tests/{name}"
    for name in (
        "backends/cuda_kernels/test_compilation.py::test_compiles_without_spills",
        "backends/test_choice.py::test_everything_works_where_nothing_is_compiled",
        "backends/test_native_cpu.py",
        "backends/test_native_memory.py::test_no_more_than_256_mib_is_kept",
        "bench/test_gpu_check.py::test_the_full_run_writes_a_result",
        "cli/test_cli.py::test_demo",
        "cli/test_cli.py::test_lists_networks_where_torchvision_is_not_installed",
        "cli/test_train.py::test_trains_a_routed_network_in_a_new_process",
        "clustering/test_command.py::test_clusters_and_reports_a_flat_folder",
        "clustering/test_command.py::test_dec_trains",
        "clustering/test_neural_mixture.py::test_scikit_learns_own_checks[NeuralMixture(max_clusters",
        "clustering/test_neural_mixture.py::test_scikit_learns_own_checks[NeuralMixture(n_init",
        "clustering/test_neural_mixture.py::test_the_number_of_clusters",
        "clustering/test_two_dimensional.py",
        "data/test_transforms.py::test_rkrc",
        "inference/test_export.py::test_onnx_runs_with_its_classes_and_preprocessing[True",
        "inference/test_export.py::test_programs_need_only",
        "models/test_cifar_resnet.py::test_compiles",
        "models/test_networks.py::test_compiles",
        "models/test_networks.py::test_export_keeps",
        "models/test_networks.py::test_onnx",
        "models/test_networks.py::test_trains_compiled",
        "models/test_sparse_resnet.py::test_compiles",
        "nn/test_gate_norm.py::test_processes_share_statistics",
        "nn/test_mixture_em.py::test_constant_statistics",
        "nn/test_mixture_em.py::test_running_statistics_are_those_of_all_processes",
        "nn/test_sparse.py::test_other_loads_under_compile",
        "ops/test_compile_form.py::test_a_fused_graph_computes_what_the_operator_does[gate",
        "ops/test_compile_form.py::test_a_fused_graph_computes_what_the_operator_does[mix",
        "training/test_checkpoints.py::test_a_checkpoint_of_another_run",
        "training/test_checkpoints.py::test_leaves_an_intact_checkpoint_if_killed",
        "training/test_distributed.py::test_reports_a_lost_process",
        "training/test_distributed.py::test_resumes_within_an_epoch",
        "training/test_distributed.py::test_validation_counts",
        "training/test_graphs.py::test_a_recorded_run_matches_the_eager_one",
        "training/test_resume.py::test_resumes_within_an_epoch_bit_for_bit[accumulated",
        "training/test_resume.py::test_resumes_within_an_epoch_bit_for_bit[streamed",
        "training/test_roll_call.py",
        "training/test_trainer.py::test_a_resumed_run_matches_the_uninterrupted_one",
        "visualize/test_command.py::test_clusterings[method1",
        "visualize/test_command.py::test_clusterings[method2",
        "visualize/test_command.py::test_images_of_the_user_s_own",
    )
)


OWN_NETWORK = """
from torch import nn

def build(num_classes, width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(width, num_classes))

number = 3
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(LONG):
            item.add_marker(pytest.mark.long)
        if item.nodeid.startswith(THOROUGH) and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.thorough)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """What one test compiled does not count against the next one's limit of recompilations."""
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write a user's module that builds a network into the working folder, and return its name."""
    (tmp_path / "own_nets.py").write_text(OWN_NETWORK)
    monkeypatch.chdir(tmp_path)
    yield "own_nets:build"
    sys.modules.pop("own_nets", None)
