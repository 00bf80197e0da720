"""The serving graph and `python -m export.onnx_file`: values, batches, precisions, the gate, what is left on failure.

Tracing takes seconds, so one tiny tower is traced once per tower and served to every test that needs a graph.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import make_tower

import export.onnx_file
import export.source
import export.text_graph
from export.config import ExportConfig, check
from export.onnx_file import export as export_files
from export.operators import count_operators
from export.parity import Limits, Parity, ParityError, compare, failures, limits_of
from export.precision import PRECISIONS
from export.reference import forced, reference
from export.runtimes import Runner, open_session
from export.serving import Classes, ServingGraph, kept_positions
from export.source import Pictures
from export.tracing import trace
from patchrank import cli
from patchrank.checkpoints.saved import save_clip
from patchrank.errors import UserError
from patchrank.loading import load_clip
from patchrank.macs import pruned_macs
from patchrank.preprocess import Preprocess
from patchrank.pruned import PrunedTower, size_with_prefix
from patchrank.salient import Salient
from patchrank.scorers import SCORERS
from patchrank.spec import PruneSpec
from patchrank.text import TextConfig, TextTower

SPEC = PruneSpec(cuts=((1, 0.5),), rest="fold", select="suppress")
PREPROCESS = Preprocess(image_size=(32, 32), resize=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


def small_tower(**changes):
    return make_tower(num_layers=2, mlp_width=32, **changes)


def small_graph(spec: PruneSpec = SPEC, scorer: str = "token-norm", classes: Classes | None = None) -> ServingGraph:
    tower = small_tower()
    return ServingGraph(PrunedTower(tower, spec, SCORERS[scorer](tower.config.grid)), PREPROCESS, classes).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A saved CLIP of two blocks and 16 patches with random weights."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    text = TextTower(TextConfig(width=16, num_layers=1, num_heads=2, mlp_width=16, output_dim=24))
    save_clip(folder, small_tower(), text, PREPROCESS, 20.0, name="tiny", dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def traced() -> dict:
    return {}


@pytest.fixture
def one_trace(traced: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal modules are traced once in this file; every caller gets a copy."""

    def cached(module, example, input_name, output_names, opset):
        spec = module.pruned.spec if isinstance(module, ServingGraph) else "text"
        key = (spec, tuple(output_names), opset)
        if key not in traced:
            traced[key] = trace(module, example, input_name, output_names, opset)
        copy = onnx.ModelProto()
        copy.CopyFrom(traced[key])
        return copy

    monkeypatch.setattr(export.onnx_file, "trace", cached)


@pytest.fixture
def config(model: Path, one_trace: None, tmp_path: Path) -> ExportConfig:
    return ExportConfig(model=str(model), keep=(0.5,), images=12, scorer="token-norm", out=tmp_path / "out")


def outputs_of(path: Path, image: np.ndarray) -> dict[str, np.ndarray]:
    session = open_session(path)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": image})))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("pool", ["class", "mean", "attention"])
@pytest.mark.parametrize("cuts", [(), ((0, 0.5),), ((0, 0.75), (1, 0.5))])
def test_features_and_cuts_are_those_of_the_whole_walk(pool: str, cuts, images: torch.Tensor) -> None:
    tower = small_tower(pool=pool)
    pruned = PrunedTower(tower, replace(SPEC, cuts=cuts), SCORERS["token-norm"](tower.config.grid)).eval()
    feature_BD, records = pruned.features_and_cuts(pruned.tower.embed(images), 0)
    state, _ = pruned.tokens(images)
    whole_BD = tower.head(state.x_BLC, size_with_prefix(state), state.num_prefix)
    torch.testing.assert_close(feature_BD, whole_BD, rtol=1e-4, atol=1e-5)
    assert not cuts or torch.equal(kept_positions(records)[-1], state.position_BN)


def test_answers_over_baked_classes() -> None:
    weight_DY = torch.nn.functional.normalize(torch.randn(24, 3, generator=torch.Generator().manual_seed(0)), dim=0)
    graph = small_graph(classes=Classes(names=("a", "b", "c"), weight_DY=weight_DY, scale=20.0))
    image = graph.example(4)
    outputs = dict(zip(graph.output_names, graph(image)))
    pixels = image.permute(0, 3, 1, 2).float().div(255)
    mean, std = (torch.tensor(value)[:, None, None] for value in (PREPROCESS.mean, PREPROCESS.std))
    feature = torch.nn.functional.normalize(graph.pruned((pixels - mean) / std), dim=-1)
    torch.testing.assert_close(outputs["feature"], feature)
    torch.testing.assert_close(outputs["logits"], 20 * feature @ weight_DY)
    torch.testing.assert_close(outputs["probabilities"], (20 * feature @ weight_DY).softmax(-1))
    assert outputs["top5_index"].shape == (4, 3), "no more than there are classes"
    assert torch.equal(outputs["top5_index"][:, 0], outputs["logits"].argmax(-1))


def test_a_classifier_head_reads_features_as_they_are() -> None:
    weight_DY, bias_Y = torch.eye(24)[:, :5], torch.arange(5.0)
    graph = small_graph(classes=Classes(names=tuple("abcde"), weight_DY=weight_DY, bias_Y=bias_Y, unit_features=False))
    feature_BD = graph.pruned(graph.pixels(graph.example()))
    torch.testing.assert_close(graph(graph.example())[1], feature_BD[:, :5] + bias_Y)


@pytest.mark.parametrize("select", ["suppress", "cover"])
def test_forced_sets_reproduce_the_free_walk_and_change_it(select: str) -> None:
    graph = small_graph(replace(SPEC, cuts=((0, 0.75), (1, 0.5)), select=select))
    if select == "cover":
        graph.pruned.scorer = Salient()
    image = graph.example(5)
    known = reference(graph, image)
    again, _ = forced(graph, image, known.kept)
    torch.testing.assert_close(again, known.feature_BD, atol=1e-6, rtol=0)
    others = [torch.arange(kept.shape[1]).expand_as(kept) for kept in known.kept]
    assert (forced(graph, image, others)[0] - known.feature_BD).abs().max() > 1e-3
    half, _ = forced(graph, image, known.kept, half=True)
    assert 0 < (half - known.feature_BD).abs().max() < 0.02


def test_margin_is_zero_at_a_tie_and_infinite_without_a_cut() -> None:
    graph = small_graph(replace(SPEC, select="topk"))
    graph.pruned.scorer = lambda state: torch.zeros(state.patches_BNC.shape[:2])
    assert reference(graph, graph.example(2)).margin_B.tolist() == [0.0, 0.0]
    dense = small_graph(replace(SPEC, cuts=()))
    assert reference(dense, dense.example(2)).margin_B.isinf().all()


def test_export_in_every_precision(config: ExportConfig) -> None:
    config = replace(config, precision=PRECISIONS, calibration=8)
    manifest = export_files(config)
    stored = json.loads((config.out / "image.json").read_text())
    named = {name for entry in stored["models"] for name in entry["files"]}
    assert {path.name for path in config.out.iterdir()} == named | {"image.json"}
    assert [entry["precision"] for entry in stored["models"]] == list(PRECISIONS)
    clip = load_clip(config.model)
    assert stored["backbone"]["weights_hash"] == clip.weights_hash
    assert stored["preprocess"] == PREPROCESS.to_dict()
    assert stored["classes"]["names"][:3] == ["zero", "one", "two"] or len(stored["classes"]["names"]) == 10
    graph = ServingGraph(PrunedTower(clip.tower, SPEC, SCORERS["token-norm"]((4, 4))), PREPROCESS).eval()
    for entry, atol in zip(stored["models"], (1e-5, 5e-3, 0.2, 0.2), strict=True):
        for batch in (1, 3):
            image = graph.example(batch)
            found = outputs_of(config.out / entry["graph"], image.numpy())
            np.testing.assert_allclose(found["feature"], graph(image)[0], atol=atol)
            assert list(found) == [value["name"] for value in entry["outputs"]]
            assert found["kept"].shape == (batch, 8)
        assert entry["image_macs"] == pruned_macs(clip.tower.config, SPEC)
    float32 = manifest["models"][0]["parity"]
    assert (float32["kept_agreement"], float32["num_images"], float32["batches"]) == (1.0, 12, [1, 5, 16])
    written = (config.out / "image.json").read_text()
    assert not [folder for folder in (config.out, config.model) if str(folder) in written], "no folder of this machine"


def test_fold_has_one_top_k_a_cut_and_no_scatter(config: ExportConfig) -> None:
    export_files(replace(config, classes="none"))
    (path,) = config.out.glob("*.onnx")
    counts = count_operators(onnx.load(path, load_external_data=False))
    assert (counts["TopK"], counts["ArgMax"]) == (1, 1)
    assert counts["GatherElements"] <= 3, "sizes and positions; tokens are gathered by whole rows"
    assert not {"ScatterElements", "ScatterND", "If", "Loop", "NonZero", "Scan"} & set(counts)


def damage(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Every graph written from now on has the weights of its last product scaled."""
    honest = export.onnx_file.convert

    def convert(model: onnx.ModelProto, precision: str, *given) -> onnx.ModelProto:
        model = honest(model, precision, *given)
        (weight,) = (tensor for tensor in model.graph.initializer if sorted(tensor.dims) == [24, 32])
        value = onnx.numpy_helper.to_array(weight).copy()
        value.reshape(-1)[:40] *= factor
        weight.CopyFrom(onnx.numpy_helper.from_array(value, weight.name))
        return model

    monkeypatch.setattr(export.onnx_file, "convert", convert)


def test_a_graph_that_differs_is_not_published(config: ExportConfig, monkeypatch, capsys) -> None:
    export_files(config)
    before = content(config.out)
    damage(monkeypatch, 1.01)
    with pytest.raises(SystemExit) as leaving:
        cli.run(export.onnx_file.main, ExportConfig, prog="x", args=arguments(config))
    assert leaving.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "max-abs" in message and "nothing was published" in message
    assert any(f"worst image {id}" in message for id in ids(config))
    assert content(config.out) == before


def arguments(config: ExportConfig) -> list[str]:
    return [
        "--model",
        config.model,
        "--keep",
        "0.5",
        "--images",
        "12",
        "--scorer",
        config.scorer,
        "--out",
        str(config.out),
    ]


def ids(config: ExportConfig) -> list[str]:
    return export.source.load_images(config, PREPROCESS)[1].ids


def test_a_failed_first_export_leaves_no_folder(config: ExportConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, 2.0)
    with pytest.raises(ParityError):
        export_files(config)
    assert not config.out.exists()


def test_a_new_export_replaces_the_files_of_the_old_one(config: ExportConfig) -> None:
    export_files(config)
    (config.out / "mine.txt").write_text("kept")
    first = content(config.out)
    export_files(replace(config, precision=("float16",)))
    second = content(config.out)
    assert "mine.txt" in second
    assert not [name for name in second if "float32" in name]
    assert [name for name in first if "float32" in name]


def test_text_tower(config: ExportConfig) -> None:
    config = replace(config, keep=(), tower="text", precision=("float32", "float16"))
    manifest = export_files(config)
    clip = load_clip(config.model)
    token_BL = export.text_graph.tokens_of(clip, ["a photo of a cat", "é", "x" * 200])
    session = open_session(config.out / "text-float32.onnx")
    (found,) = session.run(None, {"token": token_BL.numpy()})
    np.testing.assert_allclose(found, clip.text(["a photo of a cat", "é", "x" * 200]), atol=1e-5)
    assert manifest["tokenizer"]["context"] == token_BL.shape[1]
    assert manifest["logit_scale"] == pytest.approx(20.0)


def outputs_as_of(known, kept: torch.Tensor, feature: torch.Tensor) -> Runner:
    """A runtime that answers with PyTorch's features and the given kept set."""

    def run(image: np.ndarray, names: tuple[str, ...]) -> list[np.ndarray]:
        rows = run.rows[: len(image)]
        run.rows = run.rows[len(image) :] or list(range(len(known.feature_BD)))
        return [{"feature": feature, "kept": kept}[name][rows].numpy() for name in names]

    run.rows = list(range(len(known.feature_BD)))
    return Runner("fake", ("feature", "kept"), run)


def test_a_near_tie_is_excused_only_where_the_kept_set_differs() -> None:
    graph = small_graph(replace(SPEC, select="topk", rest="drop"))
    pictures = Pictures(list("abcd"), graph.example(4))
    known = reference(graph, pictures.image_BHW3)
    known.margin_B[:] = torch.tensor([1e-7, 1e-7, 1.0, 1.0])
    same = compare(outputs_as_of(known, known.kept[0], known.feature_BD), graph, pictures, "float32", known)
    assert (same.num_near_ties, same.num_excused, same.num_forced, same.kept_agreement) == (2, 0, 0, 1.0)
    others = known.kept[0].clone()
    others[0] = torch.tensor([n for n in range(16) if n not in others[0].tolist()])
    forced_BD, _ = forced(graph, pictures.image_BHW3[:1], [others[:1]])
    feature = torch.cat([forced_BD, known.feature_BD[1:]])
    tied = compare(outputs_as_of(known, others, feature), graph, pictures, "float32", known)
    assert (tied.num_excused, tied.num_forced, tied.kept_agreement) == (1, 1, 1.0)
    assert tied.max_abs < 1e-6, "compared with the graph's own kept set"
    known.margin_B[0] = 1.0
    wrong = compare(outputs_as_of(known, others, feature), graph, pictures, "float32", known)
    assert (wrong.num_excused, wrong.kept_agreement) == (0, 0.75)
    assert failures(wrong, limits_of("float32")), "other patches without a tie are a fault"


def test_host_margin_is_zero_at_a_tie_and_infinite_under_drop() -> None:
    graph = small_graph()
    free = reference(graph, graph.example(3)).host_margin_B
    assert (free > 0).all() and (free < 2).all()
    graph.pruned.metric = lambda state: torch.ones(state.patches_BNC.shape[:2]).unsqueeze(-1)
    assert reference(graph, graph.example(3)).host_margin_B.tolist() == [0, 0, 0]
    dropped = small_graph(replace(SPEC, rest="drop"))
    assert reference(dropped, dropped.example(3)).host_margin_B.isinf().all()


def test_another_host_is_moved_only_between_equally_near_ones() -> None:
    graph = small_graph()
    pictures = Pictures(list("abcd"), graph.example(4))
    known = reference(graph, pictures.image_BHW3)
    feature = known.feature_BD.clone()
    feature[1] = feature[1].roll(1)
    known.host_margin_B[:] = 1e-6
    moved = compare(outputs_as_of(known, known.kept[0], feature), graph, pictures, "float32", known)
    assert (moved.num_moved, moved.max_abs, moved.cosine_min) == (1, 0.0, pytest.approx(1.0))
    assert moved.moved_cosine_min < 0.99
    assert failures(moved, limits_of("float32")) == [], "one of four is within the rounding up"
    assert len(failures(replace(moved, num_moved=2), limits_of("float32"))) == 1
    known.host_margin_B[:] = 1e-3
    wrong = compare(outputs_as_of(known, known.kept[0], feature), graph, pictures, "float32", known)
    assert wrong.num_moved == 0 and failures(wrong, limits_of("float32"))


def perfect(**changes) -> Parity:
    values = dict(
        num_images=100, batches=(1,), max_abs=0.0, max_abs_by_batch={}, cosine_min=1.0, cosine_mean=1.0,
        kept_agreement=1.0, top1_agreement=1.0, num_near_ties=0, num_excused=0, num_forced=0, num_moved=0,
        moved_cosine_min=None, accuracy=None, torch_accuracy=None, torch_float16_max_abs=1e-3, worst="w",
    )  # fmt: skip
    return Parity(**(values | changes))


@pytest.mark.parametrize(
    "precision, changes",
    [
        ("float32", dict(max_abs=1.1e-4)),
        ("float32", dict(max_abs=float("inf"))),
        ("float32", dict(max_abs=float("nan"))),
        ("float32", dict(kept_agreement=0.99)),
        ("float32", dict(top1_agreement=0.99)),
        ("float32", dict(num_excused=2)),
        ("float32", dict(num_moved=2)),
        ("float16", dict(max_abs=2.1e-3)),
        ("float16", dict(top1_agreement=0.998)),
        ("float16", dict(num_moved=2)),
        ("int8", dict(cosine_mean=0.997)),
    ],
)
def test_every_limit_bites(precision: str, changes: dict) -> None:
    limits = limits_of(precision, 1e-3)
    assert isinstance(limits, Limits)
    assert failures(perfect(), limits) == []
    assert len(failures(perfect(**changes), limits)) == 1


def test_what_a_precision_only_reports_does_not_bite() -> None:
    assert failures(perfect(kept_agreement=0.5, top1_agreement=0.9, max_abs=0.1), limits_of("int8")) == []
    assert failures(perfect(kept_agreement=0.5, num_excused=50), limits_of("float16", 1e-3)) == []
    assert failures(perfect(top1_agreement=None, num_near_ties=50, num_excused=1), limits_of("float32")) == []


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(tower="audio"), "--tower audio"),
        (dict(opset=17), "--opset 17"),
        (dict(precision=("fp8",)), "--precision fp8"),
        (dict(precision=()), "--precision"),
        (dict(images=0), "--images 0"),
        (dict(keep=(0.5,), macs=(0.5,)), "--keep and --macs"),
        (dict(layer=2), "--layer 2"),
        (dict(tower="text", keep=(0.5,)), "--keep"),
        (dict(keep=(0.5, 0.5)), "twice"),
        (dict(runtime=("tvm",)), "--runtime tvm"),
        (dict(runtime=()), "--runtime"),
        (dict(calibration=0), "--calibration 0"),
        (dict(source=(0, 5)), "--source"),
        (dict(tower="text", source=(50, 50)), "--source"),
    ],
)
def test_rules_of_the_flags(changes: dict, said: str) -> None:
    with pytest.raises(UserError) as error:
        check(ExportConfig(**changes))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_class_file(model: Path, tmp_path: Path) -> None:
    clip = load_clip(str(model))
    path = tmp_path / "names.txt"
    path.write_text("cat\n\n dog \n")
    classes, note = export.source.class_list(ExportConfig(classes=str(path)), clip, None)
    assert (classes.names, note) == (("cat", "dog"), "")
    torch.testing.assert_close(classes.weight_DY.T, clip.text(["a photo of a cat.", "a photo of a dog."]))
    with pytest.raises(UserError, match="cannot be read"):
        export.source.class_list(ExportConfig(classes=str(tmp_path / "absent.txt")), clip, None)


class Several(torch.nn.Module):
    """Several graphs on one image, traced at once: tracing costs more than the towers."""

    def __init__(self, graphs: list[ServingGraph]) -> None:
        super().__init__()
        self.graphs = torch.nn.ModuleList(graphs)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(output for graph in self.graphs for output in graph(image))


@pytest.mark.system
@pytest.mark.parametrize("rest, opset", [("fold", 18), ("fold", 23), ("drop", 18)])
def test_every_scorer_exports(rest: str, opset: int) -> None:
    spec = PruneSpec(cuts=((0, 0.75), (1, 0.5)), rest=rest, select="suppress" if rest == "fold" else "topk")
    several = Several([small_graph(spec, scorer) for scorer in SCORERS]).eval()
    (first, *_) = several.graphs
    names = [f"{scorer}_{name}" for scorer in SCORERS for name in first.output_names]
    model = trace(several, first.example(), "image", names, opset)
    session = open_session(model.SerializeToString())
    assert count_operators(model)["TopK"] == 2 * len(SCORERS)
    for batch in (1, 5):
        image = first.example(batch)
        for found, expected in zip(session.run(None, {"image": image.numpy()}), several(image)):
            np.testing.assert_allclose(found, expected, atol=1e-5)
