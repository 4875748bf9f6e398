"""compute-sanitizer over the CUDA engine's kernels: what it says, and about whose kernels."""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from gpu_harness import ROOT, CheckFailed, Figures, NotRun, read_answer, run_command, tail

SANITIZER_LIMIT = 240.0
#: Exit status that compute-sanitizer is told to end with if it finds something.
FOUND = 99


@functools.cache
def our_kernels() -> frozenset[str]:
    """The names of the kernels in ``cuda_src``."""
    head = r'extern "C" __global__ void (?:OCCUPANCY |__launch_bounds__\([^)]*\)\s+)?(\w+)\('
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "cuda_src").glob("*.cu")]
    return frozenset(name for text in texts for name in re.findall(head, text))


#: Where compute-sanitizer says that something happened: "at update+0x140", "at 0x140 in update".
PLACE = re.compile(
    r"(?:^at |access at |^Device Frame: ?)(?:0x[0-9a-f]+ in )?(?!0x)(.+?)(?:\+0x[0-9a-f]+|\s+\[|$)"
)


def kernel_of(line: str) -> str | None:
    """The kernel that a line of compute-sanitizer's names."""
    place = PLACE.search(line.strip("= "))
    return place[1] if place else None


def is_ours(kernel: str | None) -> bool:
    """Whether it is one of ``cuda_src``; a file and a line may stand before its name."""
    return kernel is not None and kernel.split(":")[-1] in our_kernels()


def sanitizer(tool: str, script: str) -> Figures:
    """The part ``short_case`` of a script under a tool of compute-sanitizer.

    What racecheck and initcheck find in torch's kernels is only reported: some of those read memory
    that nobody has written, and do not use it.
    """
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    program = shutil.which("compute-sanitizer", path=places)
    if program is None:
        raise NotRun("compute-sanitizer is not on PATH, nor in /usr/local/cuda/bin")
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND)]
    if tool == "memcheck":  # the runtime's own failed calls, which torch expects, are no findings
        command += ["--report-api-errors", "no"]
    if tool in ("racecheck", "initcheck"):  # may find much
        command += ["--show-backtrace", "no", "--print-limit", "10000"]
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command += [sys.executable, script, "--part", "short_case", "--output", str(answer)]
        # Without torch's cache every tensor is an allocation of its own, whose ends are watched.
        status, output = run_command(command, SANITIZER_LIMIT, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        said = [line for line in output.splitlines() if line.startswith("=====")]
        kernels = [kernel_of(line) for line in said]
        figures: Figures = {
            "program": program,
            "summary": [line.strip("= ") for line in said if "SUMMARY" in line],
            "kernels": dict(Counter(filter(None, kernels))),
            "said": said[:2000],
        }
        if status is None:
            raise CheckFailed(f"no end after {SANITIZER_LIMIT:.0f} s: {tail(output)}", figures)
        if status == FOUND:
            ours = [i for i, kernel in enumerate(kernels) if is_ours(kernel)]
            is_others = tool == "initcheck" or (tool == "racecheck" and any(kernels))
            if ours or not is_others:
                first = max(ours[0] - 1, 0) if ours else 0
                raise CheckFailed("\n".join(said[first : first + 40]), figures)
        if not answer.exists():
            text = f"the case did not run, status {status}: {tail(output, 40)}"
            raise CheckFailed(text, figures)
        figures = {**read_answer(answer), **figures}
    if status not in (0, FOUND) or not figures["summary"]:
        raise CheckFailed(f"{tool} ended with status {status}: {tail(output, 40)}", figures)
    return figures
