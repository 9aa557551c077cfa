import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from fastroute import visualize
from fastroute.visualize import Gate, Layer, RoutingData, report
from fastroute.visualize.page import Images, Report
from fastroute.visualize.report import verdict
from fastroute.visualize.routing import distinct_classes, gate_rows, most_distinct, tint
from fastroute.visualize.style import save

CLASSES = ("ant", "bee", "cat", "dog", "eel")
GATE = Gate("a_router", 0, 0)


@pytest.fixture
def data():
    """Return the gates of 100 images: one router follows their class, another has a dead gate."""
    torch.manual_seed(0)
    labels = torch.arange(100) % 5
    first = (0.1 + 0.15 * labels + 0.01 * torch.rand(100))[:, None, None]
    dead = torch.full((100, 1, 2), 0.01)
    dead[..., 1] = 0.99
    return RoutingData({"a_router": torch.cat([first, 1 - first], 2), "b_router": dead}, labels, torch.rand(100, 3))


def words(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def pictures(figure: Figure) -> int:
    return sum(len(axes.images) for axes in figure.findobj(matplotlib.axes.Axes))


def test_variance_explained(data):
    values = data.values(GATE)
    assert visualize.variance_explained(values, data.labels) > 0.99
    assert visualize.variance_explained(values, data.labels[torch.randperm(100)]) < 0.2
    pairs, noise = torch.arange(400) // 2, torch.randn(20, 400, generator=torch.Generator().manual_seed(0))
    assert sum(visualize.variance_explained(each, pairs) for each in noise) / 20 < 0.1  # η² is 0.5
    colours = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    assert sum(visualize.colour_explained(each[:8], colours) for each in noise) / 20 < 0.3  # R² is 0.43
    assert visualize.variance_explained(torch.ones(100), data.labels) == 0
    assert visualize.colour_explained(data.colours @ torch.tensor([1.0, 2, 3]) + 5, data.colours) == pytest.approx(1)
    assert visualize.colour_explained(values, data.colours) < 0.2
    assert visualize.colour_explained(torch.ones(100), data.colours) == 0


def test_distinct_classes_are_the_lowest_and_the_highest(data):
    assert distinct_classes(data.values(GATE), data.labels) == [0, 1, 3, 4]
    assert distinct_classes(data.values(GATE), data.labels % 2) == [0, 1]


def test_class_histograms(data):
    figure = visualize.class_histograms(data, [GATE, Gate("b_router", 0, 0)], CLASSES, ["cat", "ant"])
    panel = figure.axes[0]
    assert panel.get_title() == "a g₁₁" and [t.get_text() for t in panel.get_legend().texts] == ["cat", "ant"]
    heights = [patch.get_xy()[:, 1].max() for patch in panel.patches]
    assert len(heights) == 2 and all(0 < height <= 100 for height in heights)
    assert "cat" not in words(visualize.class_histograms(data, [GATE], CLASSES))
    with pytest.raises(ValueError, match="classes names 'yak'; there is no such class: ant, bee"):
        visualize.class_histograms(data, [GATE], CLASSES, ["yak"])
    with pytest.raises(ValueError, match="'fox', of which there are no images"):
        visualize.class_histograms(data, [GATE], (*CLASSES, "fox"), ["fox"])


def test_gate_health_names_dead_and_skewed_gates(data):
    figure = visualize.gate_health(data, data)
    assert words(figure).count("dead") == 2 and "skewed" not in words(figure) and "before" in words(figure)
    row = gate_rows(data)[1]
    assert row["router"] == "b" and row["mean gates"] == "0.01  0.99" and row["remarks"] == "dead to 1"
    assert gate_rows(data)[0]["remarks"] == "–"
    other = RoutingData({"a_router": data.gates["a_router"]}, data.labels, data.colours)
    with pytest.raises(ValueError, match=r"before has the routers \['a_router'\]"):
        visualize.gate_health(data, other)


def test_a_gating_vector_is_called_skewed_once():
    halves = 0.5 + 0.4 * torch.rand(100)
    two = torch.stack([1 - halves, halves], 1)[:, None]  # g₁₁ never above 0.5, and g₁₂ never below
    four = torch.rand(100, 1, 4).add(0.5).softmax(2)  # all four never above 0.5
    even = torch.full((100, 1, 2), 0.5)
    data = RoutingData({"a": two, "b": four, "c": even}, torch.zeros(100), torch.rand(100, 3))
    assert [row["remarks"] for row in gate_rows(data)] == ["skewed to 2", "–", "skewed to 1"]
    assert words(visualize.gate_health(data)).count("skewed") == 2


def test_grey_images_have_no_colour():
    grey = torch.rand(50, 1)
    assert tint(grey) == tint(grey.expand(-1, 3) / torch.tensor([0.2, 0.3, 0.4]) - 0.5) == "brightness"
    assert tint(torch.rand(50, 3)) == "colour" and tint(torch.ones(50, 3)) == "colour"


def test_gate_context(data):
    figure = visualize.gate_context(data)
    colour, by_class = figure.axes[0].lines
    assert by_class.get_xdata()[0] > 0.99 and colour.get_xdata()[0] < 0.2 and len(by_class.get_xdata()) == 2


def test_routing_flow():
    layers = [Layer("a_router", torch.tensor([[0.9, 0.1]]), None, torch.tensor([0.8, 0.2]))]
    figure = visualize.routing_flow([layers] * 2, torch.rand(2, 3, 100, 50), ["one", "two\n→ three"])
    assert len(figure.axes) == 4 and {"one", "two", "three", "a", "0.90"} <= set(words(figure).split())
    strong, weak = figure.axes[2].lines[:2]
    assert strong.get_linewidth() > weak.get_linewidth() and strong.get_alpha() > weak.get_alpha()
    assert figure.axes[0].images[0].get_array().shape == (64, 32, 3)  # scaled to a thumbnail


def test_pictures_of_gates_and_clusters():
    images = torch.rand(3, 1, 8, 8)
    figure = visualize.gate_maximization(images, images, images[0], "a gate")
    assert sum(len(axes.images) for axes in figure.axes) == 7 and "a gate" in words(figure)
    shown = figure.axes[1].images[0].get_array()
    np.testing.assert_array_equal(shown, (images[0, 0] * 255).round().byte().numpy())
    figure = visualize.cluster_images({"1": images, "2": images}, images[:2])
    assert pictures(figure) == 8
    assert pictures(visualize.filter_images({"first": images})) == 3


def test_flat_images_made_by_ascent_are_left_out():
    images, flat = torch.rand(2, 1, 8, 8), torch.full((1, 1, 8, 8), 0.5)
    figure = visualize.cluster_images({"1": images, "2": images}, torch.cat([flat, images[:1]]))
    assert pictures(figure) == 5 and words(figure).count("made") == 1
    figure = visualize.filter_images({"first": torch.cat([images, flat]), "last": flat})
    assert pictures(figure) == 2 and words(figure).count("all images stayed flat") == 1


def test_confusion_counts_each_class():
    labels, clusters = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1, 0, 0])
    axes = visualize.confusion(labels, clusters, ["ant", "bee"]).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[200 / 3, 100 / 3], [0, 100]], rtol=1e-5)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "0"]


def test_response_map_has_every_cluster():
    torch.manual_seed(0)
    scores = 10 * torch.eye(3)[torch.arange(30) % 3] + torch.rand(30, 3)
    assert {"0", "1", "2"} <= set(words(visualize.response_map({"trained": scores})).split())


ROUNDED = -5e5 + 0.03125 * torch.randint(2, (30, 3), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "scores",
    [torch.randn(30, 1), torch.ones(30, 3), ROUNDED],
    ids=["one cluster", "equal responses", "equal but for rounding"],
)
def test_response_map_without_two_components(scores):
    figure = visualize.response_map({"trained": scores})
    places = np.concatenate([cluster.get_offsets() for cluster in figure.axes[0].collections])
    assert places.shape == (30, 2) and np.isfinite(places).all() and "0" in words(figure)


def test_paths():
    figure = visualize.weight_histograms({"conv": [torch.randn(50), torch.randn(50) + 9]})
    assert "σ" in words(figure) and "path 2" in words(figure)
    figure = visualize.similarity_matrices({"conv": torch.tensor([[1, 0.25], [0.25, 1]])})
    panel, scale = figure.axes
    assert "0.25" in words(figure) and panel.get_xlabel() == panel.get_ylabel() == "path"
    assert scale.get_ylabel() == "CKA" and scale.get_ylim() == (0, 1)


def test_runs(tmp_path):
    path = tmp_path / "summary.csv"
    path.write_text("epoch,val_error,train_error\n1,50,60\n2,40,\n")
    error, training = visualize.learning_curves({"a": path}).axes[0].lines
    assert error.get_ydata().tolist() == [50, 40] and training.get_ydata().tolist() == [60]
    assert error.get_color() != training.get_color()
    curves = visualize.learning_curves({"a": path, "b": path}).axes[0].lines
    assert len({(curve.get_color(), curve.get_linestyle()) for curve in curves}) == 4
    figure = visualize.accuracy_against_parameters({"resnet20": (270_000, 91.0), "resnet20_cc2": (550_000, 92.0)})
    assert "resnet20_cc2" in words(figure)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        visualize.learning_curves({"a": tmp_path / "none.csv"})
    path.write_text("epoch,speed\n1,2\n")
    with pytest.raises(ValueError, match="it must have rows with a column of val_error"):
        visualize.learning_curves({"a": path})


def test_equal_figures_are_equal_files_and_leave_the_style_alone(tmp_path, data):
    before = dict(matplotlib.rcParams)
    texts = [save(visualize.gate_context(data), tmp_path, "context") for _ in range(2)]
    assert texts[0] == texts[1] == (tmp_path / "context.svg").read_text() and (tmp_path / "context.png").is_file()
    assert before == dict(matplotlib.rcParams)


def test_names_of_classes_are_drawn_as_they_are(tmp_path):
    names = ["$\\frac{$", "\udcff", "_x", "y" * 300, "\x1b[31m"]
    data = RoutingData({"a_router": torch.rand(50, 2, 2)}, torch.arange(50) % 5, torch.rand(50, 3))
    svg = save(visualize.class_histograms(data, [Gate("a_router", 0, 0)], names, names), tmp_path, "histograms")
    svg += save(visualize.confusion(torch.arange(50) % 5, torch.arange(50) % 3, names), tmp_path, "confusion")
    for text in ("$\\frac{$", "\\udcff", " _x", "y" * 39 + "…", "\\x1b[31m"):
        assert svg.count(f">{text}<") >= 2, text


def test_a_notebook_shows_figures_whatever_the_backend(data):
    figure = visualize.class_histograms(data, [GATE], CLASSES)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert len(repr(data)) < 200 and "100 images; gates: a_router 1×2, b_router 1×2" in repr(data)
    assert len(repr(data.statistics()["a_router"])) < 200


def test_the_verdict(data):
    alike, apart = torch.ones(2, 2), torch.tensor([[1.0, 0.3], [0.3, 1.0]])
    text = verdict(data, {"stack1": alike, "head": apart})
    assert "paths have not collapsed: the CKA between their features in head is 0.30" in text
    assert "The last router, b, gives nearly the same gates to all images." in text
    one = RoutingData({"a_router": data.gates["a_router"]}, data.labels, data.colours)
    text = verdict(one, {"head": alike})
    assert "The paths have collapsed" in text and "The last router, a, follows class: " in text
    grey = RoutingData({"a_router": torch.rand(100, 1, 2)}, data.labels, torch.rand(100, 1))
    assert verdict(grey, {}).startswith("The last router, a, follows neither class nor brightness: ")


def test_captions_and_legends():
    images = torch.rand(3, 3, 8, 8)
    captions = [["ant", "bee\n→ cat", "a very long name"], ["dog", "dog", "dog"]]
    text = words(visualize.gate_maximization(images, images, images[0], "a gate", captions))
    assert "bee\n→ cat" in text and "a very l…" in text and "made by ascent" in text
    scores = torch.randn(30, 3)
    text = words(visualize.response_map({"trained": scores}, names=["ant", "bee", "empty"]))
    assert "0: ant" in text and "2: empty" in text


def test_gate_health_shows_the_mean_the_middle_and_the_range():
    values = torch.linspace(0, 1, 11).square()  # whose median is not their mean
    gates = torch.stack([values, 1 - values], 1)[:, None]
    axes = visualize.gate_health(RoutingData({"a": gates}, torch.zeros(11), torch.rand(11, 3))).axes[0]
    found = [lines.get_segments()[0][:, 0].tolist() for lines in axes.collections[:2]]
    assert found == [pytest.approx([0, 1]), pytest.approx([0.01, 0.81])]
    assert axes.lines[0].get_xdata()[0] == pytest.approx(values.mean().item())


def test_histograms_of_classes_are_shares_of_each_class():
    gates, labels = torch.tensor([0.1, 0.1, 0.1, 0.9]), torch.tensor([0, 0, 0, 1])
    data = RoutingData({"a_router": torch.stack([gates, 1 - gates], 1)[:, None]}, labels, torch.rand(4, 3))
    panel = visualize.class_histograms(data, [GATE], CLASSES).axes[0]
    assert [patch.get_xy()[:, 1].max() for patch in panel.patches] == pytest.approx([100, 100])


def test_the_table_of_gates_has_each_path_s_largest_gates_and_entropy():
    first = torch.tensor([0.4, 0.4, 0.4, 0.4])
    second = torch.tensor([1.0, 1.0, 0.0, 1.0])
    gates = torch.stack([torch.stack([path, 1 - path], 1) for path in (first, second)], 1)
    rows = gate_rows(RoutingData({"a_router": gates}, torch.zeros(4), torch.rand(4, 3)))
    assert [row["largest, % of images"] for row in rows] == ["0  100", "75  25"]
    assert [row["entropy"] for row in rows] == ["0.97", "0.00"]
    assert [row["mean gates"] for row in rows] == ["0.40  0.60", "0.75  0.25"]


def test_the_most_distinct_gate_is_that_which_follows_the_classes():
    labels = torch.arange(40) % 2
    first, second = torch.linspace(0, 1, 40), 0.3 + 0.4 * labels
    gates = torch.stack([torch.stack([path, 1 - path], 1) for path in (first, second)], 1)
    (gate,) = most_distinct(RoutingData({"a_router": gates}, labels, torch.rand(40, 3)))
    assert (gate.router, gate.i) == ("a_router", 1)


def test_images_of_the_highest_gate_are_drawn_as_such():
    highest, lowest = torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8)
    axes = visualize.gate_maximization(highest, lowest).axes
    found = {name.texts[0].get_text(): image.images[0].get_array().max() for name, image in (axes[:2], axes[3:5])}
    assert found == {"highest": 0, "lowest": 255}


def test_edges_lead_from_incoming_to_outgoing_nodes_of_their_own_magnitudes():
    layer = Layer("a_router", torch.tensor([[0.2, 0.3, 0.5]]), torch.tensor([1.0]), torch.tensor([0.5, 0.3, 0.2]))
    edges, nodes = (
        visualize.routing_flow([[layer]], torch.rand(1, 3, 8, 8)).axes[1].lines[part]
        for part in (slice(3), slice(3, None))
    )
    assert [(start, *edge.get_ydata()) for edge in edges for start in edge.get_xdata()[:1]] == [(0, 0, -1)] * 3
    assert [edge.get_xdata()[1] for edge in edges] == pytest.approx([-0.45, 0, 0.45])
    redness = [node.get_markerfacecolor()[1] for node in nodes[1::2]]
    assert redness == pytest.approx([0.5, 0.75, 0.45, 0.3]) and [node.get_ydata()[0] for node in nodes[1::2]] == [
        0,
        -1,
        -1,
        -1,
    ]


def test_a_response_map_has_the_clusters_of_the_highest_responses():
    scores = 10 * torch.eye(3)[torch.tensor([0] * 20 + [1] * 10)] + torch.rand(30, 3)
    axes = visualize.response_map({"trained": scores}).axes[0]
    assert [len(cluster.get_offsets()) for cluster in axes.collections] == [20, 10]
    assert [text.get_text() for text in axes.texts] == ["0", "1"]


def test_accuracies_are_drawn_above_millions_of_parameters():
    (point,) = visualize.accuracy_against_parameters({"resnet20": (270_000, 91.0)}).axes[0].lines
    assert (point.get_xdata().item(), point.get_ydata().item()) == pytest.approx((0.27, 91))


def test_a_report_of_a_clustering_shows_the_clearest_images_and_the_main_classes(tmp_path, monkeypatch):
    labels = torch.tensor([0] * 14 + [1] * 6 + [2] * 10 + [1] * 10)
    responses = torch.stack([torch.arange(40.0), torch.full((40,), 9.0)], 1)
    responses[30:, 0], responses[:30, 0] = 0, responses[:30, 0] + 10

    class Responses(torch.nn.Module):
        def forward(self, x):
            return responses[x[:, 0, 0, 0].round().long()]

    seen = {}
    monkeypatch.setattr(report.clusters, "cluster_images", lambda highest, made: seen.update(highest) or Figure())
    monkeypatch.setattr(report.clusters, "response_map", lambda maps, names: Figure())
    monkeypatch.setattr(report, "synthesize_outputs", lambda *_, **options: None)
    numbers = torch.arange(40)[:, None, None, None].expand(-1, 1, 4, 4).float()  # the image of each place is its number
    images = Images(
        lambda: [(numbers, labels)],
        lambda places: numbers[places].permute(0, 2, 3, 1).byte(),
        CLASSES,
        torch.zeros(1),
        torch.full((1,), 1 / 255),
    )
    page = Report(tmp_path, "title", {})
    report.clustering_report(page, Responses(), images)
    (table,) = [section["table"] for section in page.sections if "table" in section]
    assert [list(row.values()) for row in table] == [["0", "30", "ant", "47%"], ["1", "10", "bee", "100%"]]
    assert (255 * seen["0: ant"][:, 0, 0, 0]).round().tolist() == list(range(29, 19, -1))
    assert page.facts["ACC"] == "0.600" and "The largest cluster has 30 images and the smallest 10" in page.verdict
