"""The example: metrics and model by hand, and that a stopped script goes on bitwise."""

import copy
import json
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

for package in ("matplotlib", "tqdm"):  # the example's
    pytest.importorskip(package)

import train_movielens  # noqa: E402 - after the check of what it needs
from movielens import model, report, training  # noqa: E402


def test_auc_by_hand():
    # pairs of a liked and another film: .4 > .1, .4 = .4, .8 > .1, .8 > .4, so 3.5 of 4
    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 1, 0, 1]).bool()
    assert report.auc(scores, labels) == 0.875
    assert report.auc(-scores, labels) == 0.125
    assert report.auc(torch.zeros(4), labels) == 0.5
    assert str(report.auc(scores, labels | True)) == "nan"


def test_auc_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 20, (203,), generator=generator).float()
    labels = torch.rand(203, generator=generator) < 0.3
    gap = scores[labels][:, None] - scores[~labels]
    expected = ((gap > 0).double() + (gap == 0).double() / 2).mean().item()
    assert report.auc(scores, labels) == pytest.approx(expected, abs=1e-12)


def test_rmse_by_hand():
    assert report.rmse(torch.tensor([1.0, 5.0]), torch.tensor([4.0, 1.0])) == pytest.approx(
        12.5**0.5
    )


def build(run, rows, dim=2):
    torch.manual_seed(0)
    return model.build(run, rows, dim, 3.5, 0.1, 0.01, torch.device("cpu"))


def test_model_is_bias_plus_linear_plus_pairs_plus_mlp():
    net, _, _ = build("adamw", {"user": 3, "genres": 4})
    ids = torch.tensor([[0, 2], [1, 3]])
    weight = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    batch = {"user": (torch.tensor([1, 0]), None), "genres": (ids, weight)}
    with torch.no_grad():
        for table in net.tables.values():
            table.weight.normal_()
        user, genres = net.tables["user"].weight, net.tables["genres"].weight
        a = torch.stack([user[1], user[0]])
        b = torch.stack([(genres[0] + genres[2]) / 2, genres[1]])
        pairs = (a[:, :2] * b[:, :2]).sum(1)
        deep = net.mlp(torch.cat([a[:, :2], b[:, :2]], dim=1)).squeeze(1)
        expected = 3.5 + a[:, 2] + b[:, 2] + pairs + deep
        torch.testing.assert_close(net(batch), expected)


def test_the_runs_start_alike_but_for_the_tables():
    nets = [build(run, {"user": 500})[0] for run in model.RUNS]
    for net in nets[1:]:
        for mine, other in zip(net.mlp.parameters(), nets[0].mlp.parameters(), strict=True):
            assert torch.equal(mine, other)
    ids = torch.arange(499)
    for net in nets:
        rows = net.tables["user"](ids)
        assert rows.std().item() == pytest.approx(model.INIT_STD, rel=0.1)
        assert abs(rows.mean().item()) < 3 * model.INIT_STD / (499 * 3) ** 0.5
        net.eval()
        assert not net.tables["user"](torch.tensor([499])).any()  # an id unknown in training


@pytest.mark.parametrize("run", model.RUNS)
def test_table_bytes_are_those_that_are_held(run):
    net, tables, _ = build(run, {"user": 8, "film": 4})
    index = 2 * 64 * 16 if run == "sparse_adamw" else 0  # two tables of 64 entries (id, row)
    assert model.table_bytes(net, tables) == (index or 12 * 3 * 4)
    net({name: (torch.arange(3), None) for name in ("user", "film")}).sum().backward()
    tables.step()
    # A HashTable holds a block of rows of each slot, and those rows' ids.
    rows, ids = (2 * model.BLOCK_SIZE, 8) if run == "sparse_adamw" else (12, 0)
    expected = index + rows * (3 * 4 * 3 + ids)  # D + 1 columns, bytes, weights and moments
    assert model.table_bytes(net, tables) == expected


# ---- the whole script


FLAGS = ["--epochs", "2", "--batch-size", "64", "--dim", "4", "--device", "cpu", "--lr", "0.01"]


def write_many(folder, count=400):
    """`count` ratings in the form of ml-1m, with users that appear only at the end."""
    generator = torch.Generator().manual_seed(1)
    draws = torch.randint(0, 1000, (count, 3), generator=generator).tolist()
    rows = [
        (1 + (user + time) % (10 + time // 10), 1 + film % 30, 1 + rating % 5, time)
        for time, (user, film, rating) in enumerate(draws)
    ]
    users = {user for user, *_ in rows}
    write(folder / "ratings.dat", ["::".join(map(str, row)) for row in rows])
    write(folder / "users.dat", [f"{u}::F::{20 + u % 5}::{u % 3}::{u % 7}" for u in users])
    films = [f"{film}::Title::{'Drama|War' if film % 2 else 'War'}" for film in range(1, 31)]
    write(folder / "movies.dat", films)
    return folder


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))


def run_script(folder, out, *flags, stop_at=0):
    """The script's exit status, and the state of every run at the end of every epoch.

    stop_at: the call of train_batch that Ctrl-C falls into. Each run calls it once to compile.
    """
    states, calls = {}, 0
    save, step = train_movielens.save_checkpoint, training.Run.train_batch

    def saving(path, config, finished, run):
        save(path, config, finished, run)
        if run is not None and run.batch == 0:
            states[run.name, run.epoch] = copy.deepcopy(run.state_dict())

    def stepping(self, positions):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            signal.raise_signal(signal.SIGINT)
        return step(self, positions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_movielens, "save_checkpoint", saving)
        patch.setattr(training.Run, "train_batch", stepping)
        argv = ["--data", str(folder), "--out", str(out), *FLAGS, *flags]
        return train_movielens.main(argv), states


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Batches this small gain nothing from threads, which stall on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_many(tmp_path_factory.mktemp("ml"))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An output folder, and the states, of a script that nobody stopped."""
    out = tmp_path_factory.mktemp("whole")
    status, states = run_script(folder, out)
    assert status == 0
    return out, states


def test_script_writes_metrics_and_plot(whole):
    out, _ = whole
    metrics = json.loads((out / "metrics.json").read_text())
    assert sorted(metrics) == ["device", "runs", "versions"]
    assert metrics["device"] == "cpu"
    assert {"torch", "cupy_sparse_adamw", "python"} <= metrics["versions"].keys()
    assert list(metrics["runs"]) == ["sparse_adamw", "sparse_adam", "adamw"]
    for run in metrics["runs"].values():
        assert sorted(run) == ["auc", "loss", "optimizer_seconds", "rmse", "table_bytes"]
        assert [len(run[key]) for key in ("auc", "rmse", "loss")] == [2, 2, 2]
        assert all(0 <= score <= 1 for score in run["auc"])
        assert run["loss"][1] < run["loss"][0]
        assert run["optimizer_seconds"] > 0
        assert run["table_bytes"] > 0
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


# 400 ratings: 360 to train on, 6 batches an epoch, 13 calls a run
@pytest.mark.parametrize(
    "stop_at",
    [1, 4, 7, 18, 39],
    ids=["compiling", "in-an-epoch", "at-its-end", "in-the-second-run", "at-the-very-end"],
)
def test_a_stopped_script_goes_on_bitwise(folder, whole, tmp_path, stop_at, capsys):
    status, states = run_script(folder, tmp_path, stop_at=stop_at)
    assert status == 130
    assert "--resume" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.partial"))
    status, rest = run_script(folder, tmp_path, "--resume")
    assert status == 0
    states.update(rest)
    out, expected = whole
    assert states.keys() == expected.keys()
    for key, state in expected.items():
        assert_same(states[key], state, str(key))
    metrics = [json.loads((o / "metrics.json").read_text())["runs"] for o in (out, tmp_path)]
    assert_same(*metrics, "metrics.json")


def assert_same(got, expected, where):
    """Equal bit for bit, all the way down; only the seconds may differ."""
    assert type(got) is type(expected), where
    if isinstance(expected, dict):
        assert list(got) == list(expected), where
        for key in expected:
            if key != "optimizer_seconds":
                assert_same(got[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), where
        for index, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected), where
    else:
        assert got == expected, where


def test_resuming_what_is_finished_prints_it_again(folder, whole, capsys):
    out, _ = whole
    before = (out / "metrics.json").read_text()
    status, states = run_script(folder, out, "--resume")
    printed = capsys.readouterr().out
    assert (status, states) == (0, {})
    assert "adamw: finished before" in printed
    assert "peak table MB" in printed
    assert (out / "metrics.json").read_text() == before


def test_resuming_without_a_checkpoint_says_what_to_do(folder, tmp_path, capsys):
    assert run_script(folder, tmp_path, "--resume")[0] == 2
    error = capsys.readouterr().err
    assert f"no checkpoint at {tmp_path / 'checkpoint.pt'}; start afresh without --resume" in error


def test_resuming_from_a_damaged_checkpoint_says_what_to_do(folder, tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 half a file")
    assert run_script(folder, tmp_path, "--resume")[0] == 2
    assert "checkpoint.pt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "was"),
    [
        ("--seed", "3", "0"),
        ("--dim", "8", "4"),
        ("--batch-size", "32", "64"),
        ("--epochs", "3", "2"),
        ("--lr", "0.5", "0.01"),
        ("--weight-decay", "0.5", "1.0"),
        ("--threads", "2", "1"),
    ],
)
def test_resuming_with_another_flag_names_it(folder, whole, capsys, flag, value, was):
    assert run_script(folder, whole[0], "--resume", flag, value)[0] == 2
    error = capsys.readouterr().err
    assert f"{flag}: the checkpoint at" in error
    assert f"was made with {was}, now it is" in error


def test_resuming_with_other_data_names_it(whole, tmp_path, capsys):
    assert run_script(write_many(tmp_path, 300), whole[0], "--resume")[0] == 2
    assert "--data: the checkpoint at" in capsys.readouterr().err


def test_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with training.StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_validation_holds_out_the_end_of_the_training_period(folder, tmp_path, capsys):
    assert run_script(folder, tmp_path, "--validation", "--epochs", "1")[0] == 0
    assert "324 ratings to train on, 36 held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--epochs", "0"], "must be 1 or more, got 0"),
        (["--lr", "0"], "must be finite and above 0, got 0"),
        (["--lr", "nan"], "must be finite and above 0, got nan"),
        (["--weight-decay", "-1"], "must be finite and above 0, got -1"),
        (["--seed", "-1"], "must be"),
    ],
)
def test_flags_out_of_range_are_refused(capsys, flags, text):
    with pytest.raises(SystemExit):
        train_movielens.main(flags)
    assert text in capsys.readouterr().err


def test_help_lists_the_flags(capsys):
    with pytest.raises(SystemExit) as end:
        train_movielens.main(["--help"])
    assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--weight-decay WEIGHT_DECAY of the tables (1.0)" in printed


def test_one_sided_held_out_ratings_are_refused(tmp_path, capsys):
    rows = [f"1::{film}::5::{film}" for film in range(20)]
    write(tmp_path / "ratings.dat", rows)
    assert train_movielens.main(["--data", str(tmp_path)]) == 2
    assert "AUC needs held-out ratings on both sides of 4" in capsys.readouterr().err
