"""Reads what the benchmarks saved: cases by name, and where and when they were timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

#: Of ratios: not a rival, but the time that the ideal bytes take at copy bandwidth.
FLOOR = "floor"
#: Of a case's figures: how fast a copy was in its rounds.
COPY = "copy_GB_per_s"

Cases = dict[str, dict[str, Any]]


class Unreadable(Exception):
    """A file is not what it must be; the text says which and what to do."""


class Run(NamedTuple):
    """What one call of the benchmarks found.

    Attributes:
        cases: name -> figures.
        environment: date, CPU, versions, and which cases were selected.
    """

    cases: Cases
    environment: dict[str, Any]


def read_json(path: Path, way_out: str) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        Unreadable: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Unreadable(f"there is no {path}; {way_out}") from None
    except (OSError, ValueError) as error:
        raise Unreadable(f"{path} cannot be read: {error}; {way_out}") from error
    if not isinstance(content, dict):
        raise Unreadable(f"{path} holds no JSON object; {way_out}")
    return content


def read_run(path: Path) -> Run:
    """What a call of the benchmarks saved.

    Raises:
        Unreadable: the file is not one that the benchmarks saved.
    """
    way_out = "run make bench first"
    content = read_json(path, way_out)
    cases: Cases = {}
    try:
        for benchmark in content["benchmarks"]:
            figures = benchmark["extra_info"]
            cases[figures["case"]] = figures
        machine = content["machine_info"]
        environment = {
            "date": content["datetime"][:10],
            "cpu": cpu_name(machine["cpu"]),
            **{
                key: machine[key]
                for key in (
                    "cores",
                    "threads",
                    "last_level_cache",
                    "omp_wait_policy",
                    "versions",
                    "selection",
                )
            },
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise Unreadable(
            f"{path} is no result of these benchmarks: {error!r}; {way_out}"
        ) from error
    return Run(cases, environment)


def cpu_name(cpu: dict[str, Any]) -> str:
    """A CPU, by what pytest-benchmark found out: a brand has models that differ in speed."""
    name: str = cpu.get("brand_raw", "unknown")
    if "family" in cpu and "model" in cpu:
        name += f" (family {cpu['family']}, model {cpu['model']})"
    return name
