"""Compiles the CUDA kernels with NVRTC, which needs neither a GPU nor a driver.

As a script (`make kernels`) it writes docs/kernels.md.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import itertools
import os
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from emulator import engine_module

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "kernels.md"

NVRTC = "nvidia-cuda-nvrtc-cu12"
HEADERS = "nvidia-cuda-runtime-cu12"
ARCHS = (70, 75, 80, 86, 89, 90, 100, 120)
#: Those for which the kernels of rows that may be behind are compiled, too: they are two thirds of
#: all, and take minutes. SOAK=1 compiles them for each.
ARCHS_OF_ALL = ARCHS if os.environ.get("SOAK") else (80, 90)
#: Those of the table, and their multiprocessors' shared memory in bytes. Both have 65,536 registers
#: in four parts, and room for 64 warps in 32 blocks (CUDA C++ Programming Guide, appendix "Compute
#: Capabilities").
SHARED = {80: 164 * 1024, 90: 228 * 1024}

#: What CuPy puts beside the engine's options: flushing to zero decides which code comes
#: out; the other is for lambdas and the like, which the kernels have not. Its include folders are
#: CuPy's own and CUDA's; the kernels need the latter.
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
#: Makes ptxas say what each kernel uses. The code stays the same.
VERBOSE = "--ptxas-options=-v"


def name_of(variant: Any) -> str:
    """As in "rows.cu UNIT=uint4"."""
    return " ".join([variant.file, *(f"{name}={value}" for name, value in variant.macros)])


# ------------------------------------------------------------------ the compiler


#: What fills the end of a kernel: one BRA to itself, then NOPs. cuobjdump writes them as 0x7947 and
#: 0x7918, of which the upper four bits are a predicate.
BRA, NOP = 0x947, 0x918


class Usage(NamedTuple):
    """What one thread or block of a kernel takes, as ptxas reports it."""

    registers: int
    spill: int  # bytes stored and loaded again, since registers were short
    stack: int  # bytes
    shared: int  # bytes
    instructions: int = 0  # SASS, without what fills the end


class Compiled(NamedTuple):
    is_ok: bool
    log: str
    ptx: str
    usage: dict[str, Usage]  # by kernel
    remarks: list[str]  # the lines of the log that are not ptxas' report


def _file(distribution: str, name: str) -> Path:
    for file in importlib.metadata.files(distribution) or ():
        if file.name == name:
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{distribution} has no {name} here")


@functools.cache
def why_absent() -> str | None:
    """The reason why nothing can be compiled here, or None."""
    try:
        _library()
        _file(HEADERS, "cuda_fp16.h")
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        return f"NVRTC is not to be had ({error}); pip install {NVRTC} {HEADERS}"
    return None


def version() -> str:
    """Of NVRTC: as exactly as it has to be given to get the same registers."""
    return importlib.metadata.version(NVRTC)


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(_file(NVRTC, "libnvrtc.so.12")))


@functools.cache
def supported_archs() -> list[int]:
    """What this NVRTC compiles for."""
    count = ctypes.c_int()
    _library().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    archs = (ctypes.c_int * count.value)()
    _library().nvrtcGetSupportedArchs(archs)
    return list(archs)


def compile_source(source: str, name: str, options: tuple[str, ...], arch: int) -> Compiled:
    """Compile as CuPy does, for one architecture."""
    library, program = _library(), ctypes.c_void_p()

    def get(what: str) -> bytes:
        size = ctypes.c_size_t()
        if getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)):
            return b""
        buffer = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    def text(what: str) -> str:
        return get(what).rstrip(b"\0").decode()

    headers = _file(HEADERS, "cuda_fp16.h").parent
    flags = [*options, f"-I{headers}", *CUPY_OPTIONS, f"-arch=sm_{arch}", VERBOSE]
    array = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    created = library.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), name.encode(), 0, None, None
    )
    if created != 0:
        raise RuntimeError(f"nvrtcCreateProgram failed with {created}")
    try:
        failed = library.nvrtcCompileProgram(program, len(flags), array)
        log = text("ProgramLog")
        usage, remarks = read_log(log)
        if failed:
            return Compiled(False, log, "", usage, remarks)
        for kernel, count in num_instructions(get("CUBIN")).items():
            usage[kernel] = usage[kernel]._replace(instructions=count)
        return Compiled(True, log, text("PTX"), usage, remarks)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def compile_variant(variant: Any, arch: int, extra: str = "") -> Compiled:
    """Compile what the engine may ask for, and ``extra`` behind it in the same file."""
    source = engine_module("_compile").source(variant.file) + extra
    return compile_source(source, variant.file, variant.options(), arch)


@functools.cache
def compile_all(arch: int) -> dict[Any, Compiled]:
    """All that the engine may ask for; see ``ARCHS_OF_ALL``."""
    variants = [
        variant
        for variant in engine_module("_compile").all_variants()
        if arch in ARCHS_OF_ALL or "UNTOUCHED" not in dict(variant.macros)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC runs without the interpreter's lock
        compiled = pool.map(compile_variant, variants, itertools.repeat(arch))
        return dict(zip(variants, compiled, strict=True))


def read_log(log: str) -> tuple[dict[str, Usage], list[str]]:
    """What kernels use, and the lines of the log that do not say so.

    What a function uses that is called, not inlined, counts for the kernel that it is listed under.
    """
    usage: dict[str, Usage] = {}
    remarks, kernel = [], ""
    for line in log.splitlines():
        if entry := re.match(r"ptxas info +: Compiling entry function '(\w+)'", line):
            kernel = entry[1]
            usage[kernel] = Usage(0, 0, 0, 0)
        elif frame := re.match(
            r"ptxas +\. +(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", line
        ):
            stack, stores, loads = map(int, frame.groups())
            so_far = usage[kernel]
            usage[kernel] = so_far._replace(
                spill=so_far.spill + stores + loads, stack=so_far.stack + stack
            )
        elif used := re.match(r"ptxas info +: Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            usage[kernel] = usage[kernel]._replace(
                registers=int(used[1]), shared=int(shared[1]) if shared else 0
            )
        elif line.strip() and not line.startswith("ptxas info"):
            remarks.append(line)
    return usage, remarks


def num_instructions(cubin: bytes) -> dict[str, int]:
    """How many SASS instructions each kernel has. Those that fill its end are not counted.

    A kernel's code is the section ".text.<kernel>" of an ELF file (System V ABI, "Sections").
    """
    # e_shoff; e_shentsize, e_shnum, e_shstrndx
    (sections,) = struct.unpack_from("<Q", cubin, 40)
    size, number, of_names = struct.unpack_from("<3H", cubin, 58)

    def section(index: int) -> tuple[int, bytes]:
        """Where its name begins among the names, and its content."""
        name, begin, length = struct.unpack_from("<I20xQQ", cubin, sections + index * size)
        return name, cubin[begin : begin + length]

    _, names = section(of_names)
    counts = {}
    for name, code in map(section, range(number)):
        label = names[name : names.index(b"\0", name)].decode()
        if label.startswith(".text."):
            operations = [word & 0xFFF for (word,) in struct.iter_unpack("<H14x", code)]
            while operations[-1] == NOP:
                operations.pop()
            if operations[-1] == BRA:
                operations.pop()
            counts[label.removeprefix(".text.")] = len(operations)
    return counts


def kernels(ptx: str) -> dict[str, str]:
    """The text of each kernel in PTX."""
    parts = re.split(r"^\.visible \.entry (\w+)\(", ptx, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# ------------------------------------------------------------------ the table


class Key(NamedTuple):
    variant: str  # name_of()
    kernel: str
    arch: int


def measure() -> dict[Key, Usage]:
    """What is in the table, from the compiler.

    Raises:
        RuntimeError: something does not compile.
    """
    measured = {}
    for arch in SHARED:
        for variant, compiled in compile_all(arch).items():
            if not compiled.is_ok:
                raise RuntimeError(f"{name_of(variant)}, sm_{arch}:\n{compiled.log}")
            for kernel in kernels(compiled.ptx):  # in the order of the source
                measured[Key(name_of(variant), kernel, arch)] = compiled.usage[kernel]
    return measured


def warps(arch: int, usage: Usage, num_threads: int) -> int:
    """How many warps a multiprocessor holds of a kernel with so many threads a block."""
    in_block = num_threads // 32
    in_part = 65536 // 4 // (-(-usage.registers // 8) * 8 * 32)  # registers come in eights
    blocks = min(32, 64 // in_block, 4 * in_part // in_block, SHARED[arch] // (usage.shared + 1024))
    return blocks * in_block


def _num_threads(file: str) -> int:
    """Threads per block, as the host launches the kernels of a file. `advance` and `store_words`,
    which have next to nothing to do, have fewer."""
    modules = {"sparse_adamw.cu": "adamw", "untouched.cu": "untouched", "group.cu": "segment"}
    return engine_module(modules.get(file, "index")).THREADS


def write_table(measured: Mapping[Key, Usage], nvrtc: str) -> str:
    """docs/kernels.md."""
    return "\n".join(_lines(measured, nvrtc)) + "\n"


def _lines(measured: Mapping[Key, Usage], nvrtc: str) -> Iterator[str]:
    yield f"""\
# Kernels

What the compiler makes of each kernel, for each choice of types that the engine can ask for.
`make kernels` writes this file, which needs no GPU; here with NVRTC {nvrtc}, and other versions
give other registers. `tests/test_kernels.py` fails if a kernel spills or has a stack, and if it
takes more registers than here.

* **registers** per thread.
* **spill**, **stack**: bytes per thread, in memory; there should be none.
* **shared**: bytes per block.
* **instructions**: of the machine (SASS); what fills the end is not counted.
* **warps**: how many of 64 a multiprocessor holds, in blocks of {_num_threads("sparse_adamw.cu")}
  threads in `sparse_adamw.cu` and `untouched.cu`, of {_num_threads("rows.cu")} elsewhere.
"""
    columns = ("registers", "spill", "stack", "shared", "instructions", "warps")
    yield (
        " | ".join(
            ["| compiled", "kernel", *(f"sm_{arch} {c}" for arch in SHARED for c in columns)]
        )
        + " |"
    )
    yield "|---|---|" + "---:|" * len(columns) * len(SHARED)
    for variant, kernel in dict.fromkeys(key[:2] for key in measured):
        cells = [f"| {variant}", f"`{kernel}`"]
        for arch in SHARED:
            usage = measured[Key(variant, kernel, arch)]
            cells += map(str, (*usage, warps(arch, usage, _num_threads(variant.split()[0]))))
        yield " | ".join(cells) + " |"


def read_table(text: str) -> tuple[dict[Key, Usage], str]:
    """What is in docs/kernels.md, and the version of NVRTC that it was made with."""
    committed = {}
    for variant, kernel, rest in re.findall(
        r"^\| (.+?) \| `(\w+)` \| (.+) \|$", text, re.MULTILINE
    ):
        numbers = [int(cell) for cell in rest.split(" | ")]
        per_arch = len(numbers) // len(SHARED)
        for k, arch in enumerate(SHARED):
            first = k * per_arch
            committed[Key(variant, kernel, arch)] = Usage(*numbers[first : first + per_arch - 1])
    made_with = re.search(r"NVRTC (\d[\d.]*\d)", text)
    return committed, made_with[1] if made_with else "?"


if __name__ == "__main__":
    if reason := why_absent():
        sys.exit(reason)
    TABLE.write_text(write_table(measure(), version()), encoding="utf-8")
    print(f"wrote {TABLE.relative_to(ROOT)}")
