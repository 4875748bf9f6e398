"""Compare what happens to rows that a batch does not touch: a convergence study.

    python examples/study.py                    all of it, and docs/study.md anew from the results
    python examples/study.py --report           the report of the results that are there
    python examples/study.py --modes skip adamw --data clicks     a part of it

Five ways of training the same model: SparseAdamW with untouched="skip", "decay" and "dense",
torch.optim.AdamW on dense gradients, and torch.optim.SparseAdam. Each result is a line in
results.jsonl as soon as it is there: after Ctrl-C the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from convergence import report
from convergence.data import DataSet, Fold, clicks, movielens
from convergence.model import MODES
from convergence.runs import Results, Setting, train
from convergence.tuning import Case, Plan, timing_settings, wanted
from movielens.formats import DataError
from tqdm import tqdm

INTERRUPTED = 130  # the shell's exit status after SIGINT
DECAYS = (0.0, 0.01, 0.1, 1.0)
BATCHES = {"movielens": (32, 128, 1024), "clicks": (1024,)}
LOADERS: dict[str, Callable[[], DataSet]] = {"movielens": movielens, "clicks": clicks}
FIRST_EXPONENT = {  # of the learning rates tried
    ("movielens", 32): -8,
    ("movielens", 128): -8,
    ("movielens", 1024): -6,
    ("clicks", 1024): -7,
}
DOCUMENT = Path(__file__).parents[1] / "docs" / "study.md"

folds: dict[tuple[str, bool], Fold] = {}  # of a worker, by data set and whether it is the test's


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(args.out / "results.jsonl")
    try:
        plans = {
            case: plan
            for kind in args.data
            for case, plan in cases(kind, LOADERS[kind]().name).items()
        }
        if not args.report:
            chosen = {case: plan for case, plan in plans.items() if case.mode in args.modes}
            loaders = [LOADERS[kind] for kind in args.data]
            run_all(chosen, results, loaders, args.workers)
            time_epochs(chosen, results, loaders)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    report.write(args.document, plans, results)
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/study"), help="folder of the results (%(default)s)")
    add("--document", type=Path, default=DOCUMENT, help="whose tables and plots are written")
    add("--data", nargs="+", choices=BATCHES, default=list(BATCHES), help="(all)")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="to run (all)")
    add("--workers", type=int, default=2, help="processes of one thread (%(default)s)")
    add("--report", action="store_true", help="run nothing, report what is there")
    return parser.parse_args(argv)


def cases(kind: str, name: str) -> dict[Case, Plan]:
    """The cases of a data set, the longest first, and how each is studied.

    Left out is what is the same as another case, decay at 0, or does not exist, SparseAdam with
    decay. AdamW on the dense table of the clicks takes minutes a run, so it has fewer.
    """
    found = {}
    for batch in BATCHES[kind]:
        for mode in MODES:
            decays, seeds = DECAYS, 5
            if mode == "decay":
                decays = DECAYS[1:]
            elif mode == "sparse_adam":
                decays = (0.0,)
            elif mode == "adamw" and kind == "clicks":
                decays, seeds = (0.0, 0.1), 3
            first = FIRST_EXPONENT[kind, batch]
            if kind == "movielens":
                plan = Plan(first, 12, (100, 101), tuple(range(seeds)))
            else:
                plan = Plan(first, 4, (100,), tuple(range(seeds)))
            for decay in decays:
                found[Case(name, mode, batch, decay)] = plan
    return found


def run_all(
    plans: dict[Case, Plan],
    results: Results,
    loaders: list[Callable[[], DataSet]],
    workers: int,
) -> None:
    """Make all runs that are missing, in worker processes; this one alone writes the file."""
    ended: SimpleQueue[tuple[Case, Setting, dict[str, Any] | BaseException]] = SimpleQueue()
    context = multiprocessing.get_context("spawn")  # forks of a process with threads may hang
    waiting = list(plans)
    running: set[Setting] = set()
    with context.Pool(workers, start_worker, (loaders,)) as pool, tqdm(unit=" runs") as bar:
        finished = 0

        def submit(case: Case) -> int:
            """Send off what the case needs next; 1 if that is nothing, since it is finished."""
            settings = wanted(case, plans[case], results)
            for setting in settings:
                if setting not in running:
                    running.add(setting)
                    end = partial(_end, ended, case, setting)
                    pool.apply_async(work, (setting,), callback=end, error_callback=end)
            return 0 if settings else 1

        while waiting or running:
            # Few cases at once: they end one after another, and later ones fill the gaps.
            while waiting and len(running) < 2 * workers:
                finished += submit(waiting.pop(0))
            bar.set_postfix_str(f"{finished} of {len(plans)} cases", refresh=False)
            if not running:
                break
            case, setting, result = ended.get()
            if isinstance(result, BaseException):
                raise result
            results.append(setting, result)
            running.remove(setting)
            finished += submit(case)
            bar.update()


def time_epochs(
    plans: dict[Case, Plan], results: Results, loaders: list[Callable[[], DataSet]]
) -> None:
    """Make the runs that are there to be timed, one at a time with nothing beside them."""
    missing = [setting for setting in timing_settings(plans) if results.get(setting) is None]
    if not missing:
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, start_worker, (loaders,)) as pool:
        found = pool.imap(work, missing)
        for setting, result in zip(missing, tqdm(found, total=len(missing)), strict=True):
            results.append(setting, result)


def _end(
    ended: SimpleQueue[tuple[Case, Setting, dict[str, Any] | BaseException]],
    case: Case,
    setting: Setting,
    result: dict[str, Any] | BaseException,
) -> None:
    ended.put((case, setting, result))


def start_worker(loaders: list[Callable[[], DataSet]]) -> None:
    """Set up a worker process. Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    load_folds(loaders)


def load_folds(loaders: list[Callable[[], DataSet]]) -> None:
    """Load data sets for `work`."""
    for load in loaders:
        data = load()
        folds[data.name, False], folds[data.name, True] = data.tuning_fold(), data.test_fold()


def work(setting: Setting) -> dict[str, Any]:
    """One run; only a final one gets to see the test part."""
    return train(setting, folds[setting.data, setting.final])


if __name__ == "__main__":
    sys.exit(main())
