"""The convergence study: splits, statistics and search by hand, and a tiny one from end to end."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

for package in ("matplotlib", "tqdm"):  # the example's
    pytest.importorskip(package)

import study  # noqa: E402 - after the check of what it needs
from convergence import data, model, report, runs, tuning  # noqa: E402

CLICKS = partial(data.clicks, 4_000, 300, 40)
PLAN = tuning.Plan(exponent=-6, epochs=3, tuning_seeds=(100,), test_seeds=(0, 1))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the study; several threads stall on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def setting(data_set, mode="skip", **changes):
    values = {"batch": 64, "decay": 0.0, "lr": 2.0**-6, "seed": 0, "epochs": 2, "final": False}
    return runs.Setting(data_set.name, mode, **{**values, **changes})


# ---- data


def test_the_split_is_by_time_and_disjoint():
    timestamp = torch.randperm(200, generator=torch.Generator().manual_seed(0)).double()
    train, validation, test = data.split(timestamp)
    assert [len(part) for part in (train, validation, test)] == [162, 18, 20]
    assert torch.cat([train, validation, test]).sort().values.equal(torch.arange(200))
    assert timestamp[train].max() < timestamp[validation].min()
    assert timestamp[validation].max() < timestamp[test].min()


def test_ratings_are_split_by_their_timestamps():
    fields = {
        name: data_field(np.arange(60) % count)
        for name, count in (("user", 7), ("film", 11), ("genres", 3))
    }
    rating, timestamp = torch.arange(60.0) % 5 + 1, torch.arange(60.0).flip(0).double()
    found = data.from_ratings(data.Ratings("small", fields, rating, timestamp))
    assert found.rows == {"user": 7, "film": 11}
    assert found.test.tolist() == [5, 4, 3, 2, 1, 0]
    assert found.validation.tolist() == [10, 9, 8, 7, 6]
    fold = found.test_fold()
    assert fold.held_out.target.tolist() == [1, 5, 4, 3, 2, 1]
    assert fold.held_out.ids["film"].tolist() == [5, 4, 3, 2, 1, 0]
    assert len(fold.train) == 54


def data_field(index):
    from movielens.data import Field

    return Field(torch.unique(torch.from_numpy(index)), torch.from_numpy(index))


def test_clicks_follow_their_planted_logits():
    found = data.clicks(200_000, 500, 300).examples
    probability = found.planted.double().sigmoid()
    for low in (0.1, 0.3, 0.5, 0.7):
        near = (probability >= low) & (probability < low + 0.1)
        spread = 4 * (0.25 / int(near.sum())) ** 0.5
        rate = found.target[near].double().mean().item()
        assert rate == pytest.approx(probability[near].mean().item(), abs=spread)
    seen = torch.bincount(found.ids["item"], minlength=500)
    # of ids drawn from Zipf(1.1), id 0 is seen 4^1.1 times as often as id 3
    assert (seen[0] / seen[3]).item() == pytest.approx(4**1.1, rel=0.05)
    assert torch.equal(found.target, data.clicks(200_000, 500, 300).examples.target)


def test_tuning_depends_on_no_test_example():
    whole = CLICKS()
    target = whole.examples.target.clone()
    target[whole.test] = float("nan")
    ids = {name: rows.clone() for name, rows in whole.examples.ids.items()}
    for rows in ids.values():
        rows[whole.test] = 0
    examples = dataclasses.replace(whole.examples, target=target, ids=ids)
    spoiled = dataclasses.replace(whole, name="spoiled", examples=examples)
    study.load_folds([lambda: whole, lambda: spoiled])
    one, other = (study.work(setting(found)) for found in (whole, spoiled))
    for key in ("error", "auc"):
        assert one[key] == other[key]
    assert math.isnan(study.work(setting(spoiled, final=True))["error"][-1])  # so it would show


# ---- model and runs


def test_scores_are_offset_biases_and_products():
    weights = {
        "user": torch.tensor([[1.0, 2, 0.5]]),
        "item": torch.tensor([[3.0, 4, -1], [0, 1, 7]]),
    }
    net = model.Factors(weights, 10.0, sparse=True)
    ids = {"user": torch.tensor([0, 0]), "item": torch.tensor([0, 1])}
    assert net(ids).tolist() == [10 + 0.5 - 1 + 3 + 8, 10 + 0.5 + 7 + 2]


def test_weights_depend_on_the_seed_alone_and_unseen_rows_are_zeros():
    seen = {"user": torch.tensor([0, 2, 2]), "item": torch.tensor([1])}
    one, again, other = (
        model.initial_weights({"user": 3, "item": 2}, 4, seen, s) for s in (0, 0, 1)
    )
    for name in ("user", "item"):
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], other[name])
    assert not one["user"][1].any()
    assert not one["item"][0].any()
    assert one["user"][[0, 2], :-1].all()
    assert not one["user"][:, -1].any()


@pytest.mark.parametrize("mode", model.MODES)
def test_a_run_is_a_function_of_its_setting_and_learns(mode):
    fold = CLICKS().tuning_fold()
    wish = setting(CLICKS(), mode, epochs=3, decay=0.0 if mode == "sparse_adam" else 0.1)
    one, again = runs.train(wish, fold), runs.train(wish, fold)
    assert one["error"] == again["error"]
    assert one["auc"] == again["auc"]
    assert one["auc"][-1] > 0.6  # 0.5 without training


def test_adamw_and_the_modes_for_untouched_rows_start_alike():
    """In a first step no row has been left out before. SparseAdam adds eps elsewhere."""
    fold = CLICKS().tuning_fold()
    weights = model.initial_weights(fold.rows, fold.dim, fold.train.ids, 3)
    part = fold.train.take(torch.arange(64))
    nets = []
    for mode in ("adamw", *model.OURS):
        copies = {name: weight.clone() for name, weight in weights.items()}
        net = model.Factors(copies, 0.0, sparse=mode != "adamw")
        optimizer = model.make_optimizer(mode, net, 2**-6, 0.0)
        torch.nn.functional.mse_loss(net(part.ids), part.target).backward()
        optimizer.step()
        nets.append(net)
    for name, table in nets[0].tables.items():
        assert not torch.equal(table.weight, weights[name])
        for net in nets[1:]:
            torch.testing.assert_close(net.tables[name].weight, table.weight, rtol=0, atol=1e-7)


def test_dense_is_adamw_and_skip_is_not():
    """After an epoch of small batches with decay, in the error of the held-out examples."""
    fold = CLICKS().tuning_fold()
    error = {}
    for mode in ("adamw", *model.OURS):
        wish = setting(CLICKS(), mode, batch=8, decay=1.0, epochs=1)
        error[mode] = runs.train(wish, fold)["error"][-1]
    assert error["dense"] == pytest.approx(error["adamw"], abs=2e-7)
    for one, other in (("skip", "adamw"), ("decay", "adamw"), ("skip", "decay")):
        assert abs(error[one] - error[other]) > 1e-4


def test_sparse_adam_with_decay_is_refused():
    net = model.Factors({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, 0.0, sparse=True)
    with pytest.raises(ValueError, match=r"no weight decay, got 0\.1"):
        model.make_optimizer("sparse_adam", net, 0.1, 0.1)
    with pytest.raises(ValueError, match=r"mode must be one of .*, got 'lazy'"):
        model.make_optimizer("lazy", net, 0.1, 0.1)


def test_buckets_go_by_how_often_training_showed_the_item():
    train = examples([0] * 1 + [1] * 3 + [2] * 70, [0.0] * 74)
    held_out = examples([3, 3, 0, 0, 1, 1, 2, 2, 2], [1.0, 0, 0, 1, 1, 0, 1, 1, 1])
    fold = data.Fold(train, held_out, {"user": 1, "item": 4}, 1, True)
    found = runs.bucket_auc(torch.tensor([2.0, 1, 2, 1, 1, 1, 0, 1, 2]), fold)
    assert found["0"] == 1
    assert found["1"] == 0
    assert found["2–3"] == 0.5
    assert str(found["4–15"]) == str(found["16–63"]) == "nan"
    assert str(found["64 and more"]) == "nan"  # clicks only


def examples(items, target):
    ids = {"user": torch.zeros(len(items), dtype=torch.int64), "item": torch.tensor(items)}
    return data.Examples(ids, torch.tensor(target))


def test_errors_by_hand():
    ratings = data.Fold(examples([0, 0], [1.0, 4.0]), examples([0, 0], [3.0, 2.0]), {}, 1, False)
    assert runs.error(torch.tensor([9.0, -9.0]), ratings) == 1  # clamped to 4 and 1
    clicks = data.Fold(examples([0], [1.0]), examples([0, 0], [1.0, 0.0]), {}, 1, True)
    logit = math.log(3)  # a probability of 3/4
    expected = -(math.log(3 / 4) + math.log(1 / 4)) / 2
    assert runs.error(torch.tensor([logit, logit]), clicks) == pytest.approx(expected, rel=1e-6)


# ---- the results file


def test_results_are_found_again_and_a_torn_line_is_made_anew(tmp_path):
    path = tmp_path / "results.jsonl"
    wishes = [setting(CLICKS(), seed=seed, lr=0.1) for seed in range(3)]
    results = runs.Results(path)
    for number, wish in enumerate(wishes):
        results.append(wish, {"error": [number / 7], "bucket_auc": {"0": float("nan")}})
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    results = runs.Results(path)
    assert [one["error"] for _, one in results.items()] == [[0], [1 / 7]]
    assert results.get(wishes[2]) is None
    results.append(wishes[2], {"error": [2 / 7], "bucket_auc": {"0": float("nan")}})
    assert path.read_bytes() == content


# ---- the search


def fake(results, wish):
    """A result with the least error, 1, at 2^-4 after two epochs."""
    best = abs(math.log2(wish.lr) + 4) + 1
    values = [best] if wish.final else [best + 0.5, best + 0.01 * (wish.seed - 100), best + 0.25]
    results.append(wish, {"error": values, "auc": [0.5] * len(values)})


@pytest.mark.parametrize("first", [-12, -4, -2])
def test_the_search_ends_at_a_rate_between_two_worse_ones(tmp_path, first):
    results = runs.Results(tmp_path / "results.jsonl")
    case = tuning.Case("none", "skip", 32, 0.0)
    plan = tuning.Plan(first, 9, (100, 101), (0, 1, 2))
    steps = 0
    while settings := tuning.wanted(case, plan, results):
        assert len({wish.final for wish in settings}) == 1
        for wish in settings:
            fake(results, wish)
        steps += 1
    best = tuning.choice(case, plan, results)
    assert (best.exponent, best.lr, best.epochs, best.auc) == (-4, 2**-4, 2, 0.5)
    assert best.error == pytest.approx(1.005)
    tuned = {wish.lr for wish, _ in results.items() if not wish.final}
    assert {2**-5, 2**-4, 2**-3} <= tuned
    final = [wish for wish, _ in results.items() if wish.final]
    assert [(wish.lr, wish.epochs, wish.seed) for wish in final] == [
        (2**-4, 2, s) for s in range(3)
    ]
    assert len(results.items()) == 2 * len(tuned) + 3


@pytest.mark.parametrize("first", [-4, -2])
def test_a_rate_that_blows_up_is_not_chosen(tmp_path, first):
    results = runs.Results(tmp_path / "results.jsonl")
    case, plan = tuning.Case("none", "skip", 32, 0.0), tuning.Plan(first, 9, (100,), (0, 1))
    while settings := tuning.wanted(case, plan, results):
        for wish in settings:
            fake(results, wish)
            if wish.lr >= 2**-4:
                results.append(wish, {"error": [float("nan")], "auc": [float("nan")]})
    assert tuning.choice(case, plan, results).exponent == -5
    assert {wish.lr for wish, _ in results.items() if wish.final} == {2**-5}


def test_seeds_for_both_are_refused():
    with pytest.raises(ValueError, match=r"tuning or for the test, got both for \{1\}"):
        tuning.Plan(-4, 3, (1, 2), (0, 1))


def test_the_cases_of_the_study():
    for kind, batches in study.BATCHES.items():
        found = study.cases(kind, kind)
        assert {case.batch for case in found} == set(batches)
        for batch in batches:
            decays = {mode: [] for mode in model.MODES}
            for case in found:
                if case.batch == batch:
                    decays[case.mode].append(case.decay)
            assert {0, 0.1} <= set(decays["adamw"])
            assert decays["skip"] == decays["dense"] == [0, 0.01, 0.1, 1]
            assert decays["decay"] == [0.01, 0.1, 1]
            assert decays["sparse_adam"] == [0]
    for plan in study.cases("movielens", "").values():
        assert len(plan.test_seeds) >= 5


# ---- the report


def test_the_interval_by_hand():
    # mean 3, standard deviation sqrt(2.5), t = 2.7764 for 4 degrees of freedom
    mean, half = report.confidence([1, 2, 3, 4, 5])
    assert mean == 3
    assert half == pytest.approx(2.7764 * math.sqrt(2.5) / math.sqrt(5), rel=1e-12)
    with pytest.raises(ValueError, match="needs 2 to 31 values, got 1"):
        report.confidence([1.0])


def test_quantiles_of_t():
    stats = pytest.importorskip("scipy.stats")
    for degrees, quantile in enumerate(report.T_975, start=1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, degrees), abs=6e-5)


def test_dense_is_compared_with_adamw_where_all_else_is_equal(tmp_path):
    results = runs.Results(tmp_path / "results.jsonl")
    for mode, seed, lr, auc in (
        *(("dense", 0, 0.5, 0.75), ("adamw", 0, 0.5, 0.5)),
        *(("dense", 1, 0.5, 0.5), ("adamw", 1, 0.25, 1.0), ("skip", 1, 0.5, 0.0)),
        *(("dense", 2, 0.5, 0.5), ("adamw", 2, 0.5, 0.625)),
    ):
        wish = runs.Setting("none", mode, 32, 0.0, lr, seed, 1, True)
        results.append(wish, {"auc": [auc], "error": [2 * auc]})
    tables = report.Tables({tuning.Case("none", "skip", 32, 0.0): PLAN}, results)
    assert report.likeness(tables).startswith("2 runs of dense and of torch AdamW")
    assert "is 2.5e-01 in AUC, 5.0e-01 in the error" in report.likeness(tables)


def test_differences_go_by_seed(tmp_path):
    """Seeds differ by 0.1, modes by 0.01 to 0.03: unpaired, no difference would show."""
    results = runs.Results(tmp_path / "results.jsonl")
    plan = tuning.Plan(-4, 9, (100,), (0, 1, 2))
    plans = {tuning.Case("none", mode, 32, 0.0): plan for mode in ("dense", "skip")}
    for case in plans:
        while settings := tuning.wanted(case, plan, results):
            for wish in settings:
                fake(results, wish)
                if wish.final:
                    gain = (wish.seed + 1) / 100 if case.mode == "dense" else 0
                    results.append(wish, {"error": [1.0], "auc": [0.5 + wish.seed / 10 + gain]})
    tables = report.Tables(plans, results)
    dense, skip = (tables.find(mode, 32, 0.0) for mode in ("dense", "skip"))
    # 100, 200, 300 × 1e-4: mean 200, standard deviation 100, t = 4.3027
    assert tables.difference(dense, skip, report.auc) == "+200.0 ± 248.4"
    assert tables.find("decay", 32, 0.0) == skip
    assert tables.find("adamw", 32, 0.0) is None
    assert tables.difference(dense, None, report.auc) == "–"


# ---- from end to end


@pytest.fixture
def small(monkeypatch):
    """The study on tiny clicks, two modes at one decay."""
    plans = {tuning.Case(CLICKS().name, mode, 256, 0.1): PLAN for mode in ("skip", "adamw")}
    monkeypatch.setitem(study.LOADERS, "clicks", CLICKS)
    monkeypatch.setattr(study, "cases", lambda kind, name: plans)


def test_a_small_study_ends_in_tables_and_goes_on_where_it_was_stopped(small, tmp_path):
    document, path = tmp_path / "study.md", tmp_path / "results.jsonl"
    document.write_text(f"# Study\n\n{report.BEGIN}\nold\n{report.END}\n\nRead so.\n")
    argv = ["--out", str(tmp_path), "--document", str(document), "--data", "clicks"]
    assert study.main([*argv, "--workers", "1"]) == 0
    lines = path.read_text().splitlines()
    settings = [json.loads(line)["setting"] for line in lines]
    assert sum(one["final"] for one in settings) == 4  # two modes, two seeds
    assert {one["seed"] for one in settings if not one["final"]} == {100, 200, 201, 202}
    assert [one["mode"] for one in settings[-6:]] == ["skip", "adamw"] * 3  # timed in turns
    text = document.read_text()
    assert text.startswith("# Study\n\n")
    assert text.endswith("\n\nRead so.\n")
    assert "old" not in text
    assert "| 256 | torch AdamW | " in text
    assert (tmp_path / "study" / "clicks.png").read_bytes().startswith(b"\x89PNG")

    # Eight lines are lost, and half of one: exactly these are made again, with the same numbers.
    path.write_text("\n".join([*lines[:-9], lines[-9][:40]]))
    assert study.main([*argv, "--workers", "1"]) == 0
    again = path.read_text().splitlines()
    assert again[:-9] == lines[:-9]
    assert {numbers(line) for line in again[-9:]} == {numbers(line) for line in lines[-9:]}

    document.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert study.main([*argv, "--report"]) == 0
    assert "| 256 | torch AdamW | " in document.read_text()
    assert path.read_text().splitlines() == again


def numbers(line):
    """A line without its times."""
    result = json.loads(line)
    return json.dumps({k: v for k, v in result.items() if not k.endswith("seconds")})


def test_a_document_without_marks_is_left_alone(small, tmp_path):
    document = tmp_path / "study.md"
    document.write_text("mine\n")
    with pytest.raises(ValueError, match="must have the lines"):
        report.write(document, {}, runs.Results(tmp_path / "none.jsonl"))
    assert document.read_text() == "mine\n"
