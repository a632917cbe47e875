"""The study: its plan, its tuning, its probes, its report."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from study_data import write_study_data
from study_plan import METHODS, TUNED, Plan, StudyArguments
from study_probes import StudyProbes, balanced_folds, pool_tokens
from study_report import BEGIN, END, check_report, orderings_section, write_report
from study_results import PAPER_FRACTIONS, PAPER_GAPS, PAPER_METHODS, TITLES
from study_runs import check_budgets, run_study, seconds_of, train_and_probe, tune, untrained
from tiny_features import labelled_table
from tiny_models import random_tensor, tiny_config
from transformers import set_seed

from vicmae_hf import ViCMAEForPreTraining, ViCMAEModel
from vicmae_hf.command_line import parse_config_overrides
from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.errors import InputError, NonFiniteError
from vicmae_hf.evaluation.probes import balanced_subset, probe_accuracy
from vicmae_hf.processors import build_processors
from vicmae_hf.settings import ArgumentsError
from vicmae_hf.training.reporting import read_metrics
from vicmae_hf.training.session.models import build_model


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_study_data(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def planned(settings):
    """A study of two seeds, with settings to try and ablations; it is planned, and not run."""
    return StudyArguments(
        **settings,
        output_dir="outputs",
        num_seeds=2,
        learning_rate_factors=[1.0, 0.5],
        contrastive_weights=[0.1, 0.2, 0.5],
        vicreg_invariance_weights=[25.0, 2.0],
        frame_gaps=["same"],
        mask_ratios=[0.5],
    )


@pytest.fixture(scope="module")
def study(settings, tmp_path_factory):
    """The smallest study that has everything but a sweep, which `test_run_study.py` runs."""
    return StudyArguments(
        **settings,
        output_dir=str(tmp_path_factory.mktemp("finished")),
        num_seeds=1,
        learning_rate_factors=[1.0],
        contrastive_weights=[0.1],
        vicreg_invariance_weights=[25.0],
        frame_gaps=["same"],
        mask_ratios=[],
        label_fractions=[0.25, 1.0],
        num_subsets=2,
        num_frames=2,
    )


@pytest.fixture(scope="module")
def results(study):
    return run_study(study)


@pytest.fixture
def two_seeds(results):
    """These results, with all accuracies 4 points higher in a second seed, of all frame gaps and of mask ratios."""
    made_up = json.loads(json.dumps(results))
    made_up["settings"]["num_seeds"] = 2
    for run in [run for run in made_up["runs"] if run["part"] == "frame_gap"]:
        others = {"part": "frame_gap", "variant": "4_frames"}, {"part": "mask_ratio", "variant": 0.5}
        made_up["runs"] += [run | other | {"name": f"vicmae-{other['variant']}"} for other in others]
    for run in json.loads(json.dumps(made_up["runs"])):
        for probe in run["probe"].values():
            probe["top1"] += 4
        made_up["runs"].append(run | {"seed": 1, "name": run["name"] + "-again"})
    made_up["references"]["untrained"] *= 2
    made_up["sweep"] = [
        {
            "method": method,
            "tuned": made_up["tuned"][method] | {"contrastive_weight": weight},
            "train_seconds": 1,
            "probe": {pooling: {"top1": 10 * weight} for pooling in ("cls", "mean", "std")},
        }
        for method in ("mae_simsiam", "mae_vicreg", "vicmae")
        for weight in (0.1, 0.5)
    ]
    return made_up


def overrides(run):
    return parse_config_overrides(type(tiny_config()), run.settings.config_overrides)


def values_of(run):
    """The tuned settings that a run really has."""
    found = overrides(run) | {"base_learning_rate": run.settings.base_learning_rate}
    return {name: found[name] for name in TUNED[run.method]}


# As they would come out of tuning.
CHOSEN = {
    "mae": {"base_learning_rate": 0.05},
    "mae_simsiam": {"base_learning_rate": 0.025, "contrastive_weight": 0.1},
    "mae_vicreg": {"vicreg_invariance_weight": 2.0, "base_learning_rate": 0.05, "contrastive_weight": 0.5},
    "vicmae": {"base_learning_rate": 0.05, "contrastive_weight": 0.1},
}


def test_methods_differ_in_objective_and_tuned_settings_alone(planned):
    methods = [run for run in Plan(planned).reported(CHOSEN) if run.part == "methods"]
    assert [(run.method, run.settings.seed) for run in methods] == [(m, s) for s in (0, 1) for m in METHODS]
    common = set()
    for run in methods:
        assert values_of(run) == run.tuned == CHOSEN[run.method]
        found = overrides(run)
        assert found.pop("contrastive_loss") == METHODS[run.method]
        assert found.pop("contrastive_weight") == CHOSEN[run.method].get("contrastive_weight", 0.0)
        found.pop("vicreg_invariance_weight", None)
        changes = {"output_dir": None, "config_overrides": None, "seed": None, "base_learning_rate": None}
        settings = vars(run.settings) | changes
        common.add(str((sorted(found.items()), sorted(settings.items(), key=str))))
    assert len(common) == 1


def test_the_ablations_change_one_thing_of_vicmae(planned):
    reported = Plan(planned).reported(CHOSEN)
    by_name = {run.name: run for run in reported}
    assert len(by_name) == len(reported) == 2 * (4 + 1 + 1)
    reference, same, masked = (by_name[name] for name in ("vicmae-seed1", "vicmae-same-seed1", "vicmae-mask0.5-seed1"))
    assert (reference.settings.frame_sampling, same.settings.frame_sampling) == ("distant", "same")
    assert overrides(same) == overrides(reference)
    assert overrides(masked) == overrides(reference) | {"mask_ratio": 0.5}
    assert masked.settings.frame_sampling == "distant"
    assert {run.settings.base_learning_rate for run in (reference, same, masked)} == {0.05}


def test_settings_are_tuned_one_after_the_other(planned):
    """Against the best of all combinations, of a made-up accuracy that rates each setting by itself."""
    plan = Plan(planned)
    points = {0.05: 5, 0.025: 1, 0.1: 10, 0.2: 20, 0.5: 15, 25.0: 0, 2.0: 100}
    seen = []

    def train(runs):
        assert {run.settings.seed for run in runs} == {1000}
        assert all(values_of(run) == run.tuned for run in runs)
        seen.append([(run.method, *run.tuned.values()) for run in runs])
        results = []
        for run in runs:
            top1 = sum(points[value] for value in run.tuned.values())
            probe = {"cls": {"top1": top1}, "mean": {"top1": -top1}}
            results.append({"name": run.name, "method": run.method, "tuned": run.tuned, "probe": probe})
        return results

    results, tuned = tune(plan, "cls", train)
    assert tuned == {
        "mae": {"base_learning_rate": 0.05},
        "mae_simsiam": {"base_learning_rate": 0.05, "contrastive_weight": 0.2},
        "mae_vicreg": {"vicreg_invariance_weight": 2.0, "base_learning_rate": 0.05, "contrastive_weight": 0.2},
        "vicmae": {"base_learning_rate": 0.05, "contrastive_weight": 0.2},
    }
    vicreg = [step for step in seen if step[0][0] == "mae_vicreg"]
    assert vicreg == [
        [("mae_vicreg", 25.0, 0.05, 0.1), ("mae_vicreg", 2.0, 0.05, 0.1)],
        [("mae_vicreg", 2.0, 0.05, 0.1), ("mae_vicreg", 2.0, 0.025, 0.1)],
        [("mae_vicreg", 2.0, 0.05, 0.1), ("mae_vicreg", 2.0, 0.05, 0.2), ("mae_vicreg", 2.0, 0.05, 0.5)],
    ]
    # A run that two steps share is listed once: 2, 4, 5 and 4.
    assert len({result["name"] for result in results}) == len(results) == 15
    _, opposite = tune(plan, "mean", train)
    assert opposite["vicmae"] == {"base_learning_rate": 0.025, "contrastive_weight": 0.1}


def test_the_results_are_those_of_the_runs(study, results, settings):
    """Accuracies of one run, computed again from its folder."""
    output_dir = Path(study.output_dir)
    assert json.loads((output_dir / "all_results.json").read_text()) == results
    assert results["sweep"] == []
    assert [run["name"] for run in results["runs"]] == [
        *(f"{method}-seed0" for method in METHODS),
        "vicmae-same-seed0",
    ]
    assert {str(run["budget"]) for run in results["runs"]} == {
        str({"num_steps": 6, "total_batch_size": 8, "num_train_files": 32})
    }
    run = results["runs"][2]
    folder = output_dir / "runs" / "mae_vicreg-seed0"
    model = ViCMAEModel.from_pretrained(folder, video=False).eval()
    assert model.config.contrastive_loss == "vicreg"
    (train, labels), (evaluation, eval_labels) = (
        read_frames(settings[name], build_processors(model.config)[0])
        for name in ("probe_train_data", "probe_eval_data")
    )
    with torch.no_grad():
        tokens = [model(frames.flatten(0, 1)).last_hidden_state for frames in (train, evaluation)]
    features = {
        "cls": [t[:, 0] for t in tokens],
        "mean": [t[:, 1:].mean(1) for t in tokens],
        "std": [t[:, 1:].std(1) for t in tokens],
    }
    assert run["probe"].keys() == features.keys()
    for pooling, (train_features, eval_features) in features.items():
        train_features, eval_features = (part.unflatten(0, (-1, 2)) for part in (train_features, eval_features))
        known, asked = labelled_table(train_features, labels, 8), labelled_table(eval_features, eval_labels, 8)
        expected = probe_accuracy(known, asked, seed=0)
        found = run["probe"][pooling]
        assert {name: found[name] for name in expected} == expected
        quarter = [
            probe_accuracy(known.select(balanced_subset(labels, 0.25, seed)), asked, seed)["top1"] for seed in range(2)
        ]
        assert found["top1_by_fraction"] == pytest.approx([sum(quarter) / 2, expected["top1"]])
    assert results["probe_data"]["num_labels_by_fraction"] == [8, 24]
    metrics = [line for line in read_metrics(folder) if "feature_std" in line]
    assert run["collapse"]["projection_rank"] == metrics[-1]["projection_rank"]
    assert run["history"]["feature_std"] == [line["feature_std"] for line in metrics]
    # Plain MAE compares no projections.
    mae = next(run for run in results["runs"] if run["method"] == "mae")
    assert set(mae["collapse"]) == {"feature_std", "feature_rank", "feature_alignment", "feature_uniformity"}


def read_frames(folder, processor):
    """Two frames of each video, the middles of its halves, `(N, 2, 3, H, W)`, and the labels."""
    source = open_labelled(folder)
    frames = []
    for index in range(len(source)):
        with source[index].open("pyav") as video:
            middles = [video.num_frames // 4, video.num_frames * 3 // 4]
            frames.append(processor(list(video.get_frames(middles)), return_tensors="pt").pixel_values)
    return torch.stack(frames), torch.from_numpy(source.labels)


def test_settings_are_rated_by_parts_of_the_training_files(study, results):
    """The figure computed again, where reading held-out files is refused."""
    model = ViCMAEModel.from_pretrained(Path(study.output_dir) / "runs" / "vicmae-seed0", video=False).eval()
    processor = build_processors(model.config)[0]
    settings = {"num_frames": 2, "label_fractions": [1.0], "num_subsets": 1}
    probes = StudyProbes(study.probe_train_data, "no such folder", processor, MediaLoader(), **settings)
    found = probes.cross_validate(model)
    frames, labels = read_frames(study.probe_train_data, processor)
    with torch.no_grad():
        features = model(frames.flatten(0, 1)).last_hidden_state[:, 0].unflatten(0, (-1, 2))
    # Three files of each class.
    folds = balanced_folds(labels, 3)
    assert torch.bincount(folds).tolist() == [8, 8, 8]
    top1 = []
    for fold in range(3):
        known, asked = folds != fold, folds == fold
        parts = (labelled_table(features[places], labels[places], 8) for places in (known, asked))
        top1.append(probe_accuracy(*parts, seed=fold)["top1"])
    assert found["cls"]["top1"] == pytest.approx(sum(top1) / 3)
    one_each = labelled_table(features, torch.arange(24), 24)
    with pytest.raises(InputError, match="tuning needs two files of a class"):
        probes._cross_validate(one_each)


def test_the_untrained_reference_is_where_the_runs_start(study):
    """All methods start from one encoder, whatever comes after it."""
    encoders = []
    for run in Plan(study).reported(CHOSEN):
        set_seed(run.settings.seed)
        encoders.append(build_model(ViCMAEForPreTraining, run.settings).vicmae)
    reference = untrained(Plan(study), seed=0)
    for encoder in encoders:
        for name, parameter in reference.named_parameters():
            assert torch.equal(encoder.get_parameter(name), parameter), name
    other = untrained(Plan(study), seed=1)
    assert not torch.equal(other.layers[0].mlp.fc1.weight, reference.layers[0].mlp.fc1.weight)


def test_a_second_call_trains_and_probes_nothing(study, results, monkeypatch):
    def refuse(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr("study_runs.run_pretraining", refuse)
    monkeypatch.setattr("study_probes.embed_views", refuse)
    assert run_study(study) == results


@pytest.mark.slow
def test_what_diverges_is_the_worst_of_what_was_tried(settings, tmp_path):
    changes = {"learning_rate_factors": [1e30, 1.0], "output_dir": str(tmp_path)}
    study = StudyArguments(**settings, **changes)
    tried = []

    def train(runs):
        if runs[0].method != "mae":
            return [{"name": run.name, "tuned": run.tuned, "probe": {"mean": {"top1": 1.0}}} for run in runs]
        tried.extend(train_and_probe(runs, probes, tmp_path))
        return tried

    plan = Plan(study)
    processor = build_processors(build_model(ViCMAEForPreTraining, plan.recipe).config)[0]
    data = (study.probe_train_data, study.probe_eval_data)
    probes = StudyProbes(*data, processor, MediaLoader(), num_frames=1, label_fractions=[1.0], num_subsets=1)
    _, tuned = tune(plan, "mean", train)
    assert tuned["mae"] == {"base_learning_rate": 0.05}
    assert "diverged" not in tried[1]
    assert "at step" in tried[0]["diverged"]
    check_budgets(tried)
    # A run that is reported must not fail silently.
    with pytest.raises(NonFiniteError):
        train_and_probe(plan.reported(CHOSEN | {"mae": {"base_learning_rate": 1e28}})[:1], probes, tmp_path)


def test_other_settings_are_refused_where_runs_are(study, results, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(Path(study.recipe).read_text().replace("base_learning_rate: 0.05", "base_learning_rate: 0.1"))
    changed = StudyArguments(**{**vars(study), "recipe": str(recipe)})
    with pytest.raises(ArgumentsError, match=r"was begun with base_learning_rate 0.05, now 0.1\. Choose another"):
        run_study(changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrastive_weights": [0.2]}, r"contrastive_weights \[0.1\], now \[0.2\]"),
        ({"sweep_seed": 7}, "sweep_seed 1000, now 7"),
    ],
)
def test_a_study_keeps_what_it_tries(study, results, changes, message):
    """What was tried before would be missing in the report."""
    with pytest.raises(ArgumentsError, match=message):
        run_study(StudyArguments(**{**vars(study), **changes}))


def test_runs_of_another_length_are_not_mixed(results):
    changed = json.loads(json.dumps(results["runs"]))
    changed[3]["budget"]["num_train_files"] += 1
    with pytest.raises(ArgumentsError, match="vicmae-seed0 had num_train_files 33, mae-seed0 32"):
        check_budgets(changed)


def test_training_times_are_those_of_all_sessions(results):
    """Also of a run that was interrupted, whose own figure counts the updates after that."""
    metrics = [{"step": 10, "pairs_per_second": 80.0}, {"step": 25, "pairs_per_second": 60.0}]
    assert seconds_of(metrics, batch_size=8) == pytest.approx(10 * 8 / 80 + 15 * 8 / 60)


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (0.75, "0.75 is the recipe's"),
        (0.98, "leaves 0 of 16 patches visible"),
        (0.02, "leaves 16 of 16 patches visible"),
    ],
)
def test_mask_ratios_that_make_no_run(study, ratio, message):
    with pytest.raises(ArgumentsError, match=message):
        run_study(StudyArguments(**{**vars(study), "mask_ratios": [ratio]}))


def test_a_recipe_that_starts_from_a_checkpoint_is_refused(study, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{Path(study.recipe).read_text()}model_name_or_path: somewhere\n")
    with pytest.raises(ArgumentsError, match="leave out model_name_or_path"):
        Plan(StudyArguments(**{**vars(study), "recipe": str(recipe)}))


def test_other_probes_are_computed_anew_from_the_same_runs(study, results, monkeypatch):
    monkeypatch.setattr("study_runs.run_pretraining", None)
    again = run_study(StudyArguments(**{**vars(study), "label_fractions": [1.0]}))
    assert [len(run["probe"]["cls"]["top1_by_fraction"]) for run in again["runs"]] == [1] * 5
    for before, after in zip(results["runs"], again["runs"], strict=True):
        assert after["probe"]["mean"]["top1"] == before["probe"]["mean"]["top1"]


def test_pooled_tokens_are_the_model_s_own_pooling():
    frames = random_tensor(6, 3, 16, 16)
    for part, pooling in enumerate(("cls", "mean")):
        torch.manual_seed(0)
        model = ViCMAEModel(tiny_config(pooling=pooling), video=False).eval()
        with torch.no_grad():
            output = model(frames)
        found = pool_tokens(output.last_hidden_state).chunk(3, dim=-1)[part]
        torch.testing.assert_close(found, output.pooler_output)


def test_folds_spread_every_class_and_parts_of_labels_are_nested():
    labels = torch.tensor([0] * 8 + [1] * 5 + [2] * 4)
    folds = balanced_folds(labels, 4)
    counts = [torch.bincount(folds[labels == label], minlength=4) for label in range(3)]
    assert all(count.max() - count.min() <= 1 for count in counts)
    for seed in range(3):
        small, large = (set(balanced_subset(labels, fraction, seed).tolist()) for fraction in (0.25, 0.75))
        assert small < large


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrastive_weights": [-1.0]}, "--contrastive_weights must be at least 0, got -1.0"),
        ({"vicreg_invariance_weights": []}, "vicreg_invariance_weights: expected at least one"),
        ({"sweep_seed": 1}, "must not be one of the reported seeds 0 to 1"),
        ({"frame_gaps": ["far"]}, "expected some of same, 4_frames, got far"),
        ({"label_fractions": [0.5]}, "and 1 among them"),
        ({"label_fractions": [1.0, 1.0]}, "expected each value once"),
        ({"mask_ratios": [1.5]}, "--mask_ratios must be above 0 and below 1, got 1.5"),
        ({"num_seeds": 0}, "at least 1"),
    ],
)
def test_settings_that_make_no_study(planned, changes, message):
    with pytest.raises(ArgumentsError, match=message):
        StudyArguments(**{**vars(planned), **changes})


# The report


def test_the_report_has_the_paper_s_figures_beside_ours(two_seeds, tmp_path):
    path = tmp_path / "report.md"
    write_report(two_seeds, path)
    text = path.read_text()
    for value in [*sum(PAPER_METHODS.values(), ()), *PAPER_GAPS.values()]:
        assert f"{value:.2f}" in text
    for row, curve in PAPER_FRACTIONS.items():
        # The shares that this study has.
        assert f"| paper: {TITLES[row]} | {curve[0.25]:.2f} | {curve[1.0]:.2f} |" in text
    first = two_seeds["runs"][3]["probe"]["cls"]["top1"]
    (line,) = (line for line in text.splitlines() if line.startswith("| ViC-MAE |") and "67.66" in line)
    # Of a and a + 4: mean a + 2, standard deviation 4 / sqrt(2).
    assert f"| {first + 2:.1f} ± 2.8 |" in line
    for run in two_seeds["runs"]:
        assert f"| {run['name']} |" in text
    for name in ("methods", "label_fractions", "frame_gap", "collapse"):
        assert f"(images/report_{name}.png)" in text
        with Image.open(tmp_path / "images" / f"report_{name}.png") as picture:
            assert min(picture.size) > 200
    for title in ("## Mask ratio", "## Settings tried", "## Collapse"):
        assert title in text
    assert "| MAE + VICReg | 25 | 0.05 | 0.1 | 1.0 | 1.0 | 1.0 | chosen; lowest contrastive weight tried |" in text
    assert "| MAE + VICReg | 25 | 0.05 | 0.5 | 5.0 | 5.0 | 5.0 |  |" in text


def test_what_was_written_by_hand_around_the_report_stays(results, tmp_path):
    path = tmp_path / "study.md"
    path.write_text(f"# Mine\n\nBefore.\n\n{BEGIN}\nold figures\n{END}\n\nAfter.\n")
    check_report(path)
    write_report(results, path)
    first = path.read_text()
    assert first.startswith(f"# Mine\n\nBefore.\n\n{BEGIN}\n")
    assert first.endswith(f"{END}\n\nAfter.\n")
    assert "old figures" not in first
    write_report(results, path)
    assert path.read_text() == first
    path.write_text("Notes of somebody else.\n")
    for refused in (check_report, lambda path: write_report(results, path)):
        with pytest.raises(InputError, match="has no place for the study's report"):
            refused(path)
    assert path.read_text() == "Notes of somebody else.\n"


def test_orderings_are_counted_seed_by_seed(two_seeds):
    """Of made-up accuracies: ahead in one seed of two, by 1 point on average."""
    accuracy = {("vicmae", 0): 50.0, ("vicmae", 1): 60.0, ("mae_vicreg", 0): 45.0, ("mae_vicreg", 1): 63.0}
    for run in two_seeds["runs"]:
        if run["part"] == "methods" and (run["method"], run["seed"]) in accuracy:
            run["probe"]["mean"]["top1"] = accuracy[run["method"], run["seed"]]
    # Differences 5 and -3.
    assert "| ViC-MAE over MAE + VICReg | +3.80 | +1.0 ± 5.7 | 1 of 2 |" in orderings_section(two_seeds)
