"""What the compiler makes of the CUDA kernels, for every choice of types and every architecture.

No GPU is needed, nor CuPy: tests/nvrtc.py calls NVRTC itself, with the options that CuPy gives it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import nvrtc
import pytest
import torch
from emulator import engine_module
from nvrtc import (
    ARCHS,
    ARCHS_OF_ALL,
    SHARED,
    TABLE,
    Key,
    Usage,
    compile_all,
    compile_variant,
    name_of,
)

from cupy_sparse_adamw import _types
from cupy_sparse_adamw._types import Kind

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

pytestmark = pytest.mark.compiled

CUDA_SRC = nvrtc.ROOT / "cuda_src"
FILES = sorted(path.name for path in CUDA_SRC.glob("*.cu"))

needs_nvrtc = pytest.mark.skipif(nvrtc.why_absent() is not None, reason=str(nvrtc.why_absent()))


@pytest.fixture
def arch(request: pytest.FixtureRequest) -> int:
    """An architecture that the NVRTC here compiles for."""
    if request.param not in nvrtc.supported_archs():
        pytest.skip(f"NVRTC {nvrtc.version()} does not compile for sm_{request.param}")
    return request.param


def for_archs(archs: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("arch", archs, indirect=True, ids="sm_{}".format)


def adamw_variant(vec: int, key_dtype: torch.dtype = torch.int32, untouched: str = "skip") -> Any:
    """The update of tables and gradients in fp32."""
    of_kind = engine_module("_compile").adamw_variant
    return of_kind(torch.float32, torch.float32, key_dtype, vec, Kind(untouched))


# ------------------------------------------------------------------ warnings, stack, spills


def unexpected_remarks(compiled: nvrtc.Compiled, arch: int) -> list[str]:
    """What the compiler says beyond its report, but for a notice that nothing silences."""
    deprecated = "nvrtc: warning: Architectures prior to '<compute/sm>_75' are deprecated"
    return [x for x in compiled.remarks if not (arch == 70 and x.startswith(deprecated))]


@needs_nvrtc
@for_archs(ARCHS)
def test_every_choice_of_types_compiles_without_a_warning(arch: int):
    wrong = [
        f"{name_of(variant)}, sm_{arch}:\n{compiled.log}"
        for variant, compiled in compile_all(arch).items()
        if not compiled.is_ok or unexpected_remarks(compiled, arch)
    ]
    assert not wrong, "\n".join(wrong)


@needs_nvrtc
@for_archs(ARCHS)
def test_nothing_spills_or_has_a_stack(arch: int):
    wrong = []
    for variant, compiled in compile_all(arch).items():
        if not compiled.is_ok:
            continue  # the test above has its log
        assert compiled.usage.keys() == nvrtc.kernels(compiled.ptx).keys()
        wrong += [
            f"{name_of(variant)}: {kernel}, sm_{arch}: {usage}"
            for kernel, usage in compiled.usage.items()
            if usage.spill or usage.stack or not usage.registers
        ]
    assert not wrong, "\n".join(wrong)


# An array that is indexed at run time, which registers cannot hold; a variable that is not used; a
# name that is not declared.
@needs_nvrtc
@for_archs([90])
def test_a_planted_fault_is_found(arch: int):
    variant = engine_module("_compile").GROUP

    def planted(body: str) -> nvrtc.Compiled:
        kernel = f'extern "C" __global__ void planted(int i, float* out) {{ {body} }}'
        return compile_variant(variant, arch, kernel)

    fine = planted("*out = i;")
    assert unexpected_remarks(fine, arch) == []
    assert fine.usage["planted"].stack == 0

    # Of the empty one the stack pointer is loaded (sm_90 does so in each), and it exits.
    assert planted("").usage["planted"].instructions == 2
    assert fine.usage["planted"].instructions > 4
    assert fine.usage["make_keys_32"].instructions > 50

    on_stack = planted("volatile float x[64]; x[i] = 1; x[i + 1] = 2; *out = x[i / 2];")
    assert on_stack.usage["planted"].stack == 256
    assert on_stack.usage["make_keys_32"].stack == 0

    unused = planted("int unused;")
    assert unused.is_ok
    assert "never referenced" in unexpected_remarks(unused, arch)[0]

    broken = planted("*out = missing;")
    assert not broken.is_ok
    assert 'identifier "missing" is undefined' in broken.log


def test_what_ptxas_reports_is_read():
    log = """\
nvrtc: warning: Architectures prior to '<compute/sm>_75' are deprecated and may be removed
ptxas info    : 4 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function 'second' for 'sm_70'
ptxas info    : Function properties for second
ptxas         .     16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8728 bytes smem, 384 bytes cmem[0]
ptxas info    : Compile time = 18.608 ms
ptxas info    : Function properties for called_by_second
ptxas         .     24 bytes stack frame, 1 bytes spill stores, 2 bytes spill loads
ptxas info    : Compiling entry function 'first' for 'sm_70'
ptxas info    : Function properties for first
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 11 registers, used 0 barriers, 4336 bytes cmem[0]
ptxas warning : Stack size for entry function 'second' cannot be statically determined
"""
    usage, remarks = nvrtc.read_log(log)
    assert usage == {
        "second": Usage(registers=40, spill=15, stack=40, shared=8728),
        "first": Usage(registers=11, spill=0, stack=0, shared=0),
    }
    assert [line.split()[0] for line in remarks] == ["nvrtc:", "ptxas"]


# ------------------------------------------------------------------ docs/kernels.md


def complaints(committed: Mapping[Key, Usage], measured: Mapping[Key, Usage]) -> Iterator[str]:
    """Where kernels take more registers than the table says, and what it lacks."""
    for key in committed.keys() ^ measured.keys():
        which = "has no" if key in measured else "still has"
        yield f"the table {which} {key}: run make kernels"
    for key in committed.keys() & measured.keys():
        if measured[key].registers > committed[key].registers:
            yield f"{key}: {committed[key].registers} -> {measured[key].registers} registers"


@needs_nvrtc
def test_no_kernel_takes_more_registers_than_the_table_says():
    committed, made_with = nvrtc.read_table(TABLE.read_text(encoding="utf-8"))
    if nvrtc.version() != made_with:
        pytest.skip(f"docs/kernels.md was made with NVRTC {made_with}, here is {nvrtc.version()}")
    assert committed
    measured = nvrtc.measure()
    assert list(complaints(committed, measured)) == []
    assert committed == measured, "what changed is no worse: run make kernels"


# Otherwise the test above would be skipped everywhere.
def test_the_table_is_made_with_the_nvrtc_that_make_installs():
    _, made_with = nvrtc.read_table(TABLE.read_text(encoding="utf-8"))
    constraints = (nvrtc.ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"{nvrtc.NVRTC}=={made_with}" in constraints


def test_more_registers_or_another_kernel_are_complained_about():
    before = {Key("a.cu", "f", arch): Usage(40, 0, 0, 0) for arch in SHARED}
    assert list(complaints(before, before)) == []

    def after(registers: int) -> dict[Key, Usage]:
        return before | {Key("a.cu", "f", 80): Usage(registers, 0, 0, 0)}

    assert list(complaints(before, after(39))) == []
    (risen,) = complaints(before, after(41))
    assert "arch=80" in risen
    assert "40 -> 41" in risen
    (new,) = complaints(before, before | {Key("a.cu", "g", 90): Usage(1, 0, 0, 0)})
    assert "has no" in new
    (gone,) = complaints(before | {Key("b.cu", "f", 90): Usage(1, 0, 0, 0)}, before)
    assert "still has" in gone


def test_the_table_is_read_as_it_was_written():
    measured = {
        Key(variant, kernel, arch): Usage(arch, 1, 2, 30 + number, 90)
        for number, (variant, kernel) in enumerate(
            [("rows.cu UNIT=uint4", "gather"), ("sparse_adamw.cu KEY=long long VEC=4", "update")]
        )
        for arch in SHARED
    }
    assert nvrtc.read_table(nvrtc.write_table(measured, "12.9.86")) == (measured, "12.9.86")


@pytest.mark.parametrize(
    ("registers", "shared", "num_threads", "expected"),
    [
        (64, 8 * 1024, 128, 32),  # 16,384 / (64 · 32) = 8 warps in each of four parts
        (65, 0, 128, 28),  # as 72: 7 warps in each
        (16, 0, 128, 64),
        (16, 0, 32, 32),  # 32 blocks
        (16, 40 * 1024, 128, 16),  # 4 blocks of 41 KiB in 164
        (40, 0, 256, 48),  # 12 warps in each part, 6 blocks
    ],
)
def test_warps_per_multiprocessor(registers: int, shared: int, num_threads: int, expected: int):
    assert nvrtc.warps(80, Usage(registers, 0, 0, shared), num_threads) == expected


# ------------------------------------------------------------------ width of accesses

#: PTX types of elements and their bytes; keys, addresses and counts have other types.
ELEMENTS = {"f64": 8, "f32": 4, "u16": 2, "b16": 2}


def accesses(kernel: str) -> Counter[tuple[str, str, int, str]]:
    """The loads and stores of elements in a kernel: (ld or st, state space, how many, type)."""
    found: Counter[tuple[str, str, int, str]] = Counter()
    for op, modifiers in re.findall(r"\s(ld|st)\.([\w.]+)\s", kernel):
        *parts, kind = modifiers.split(".")
        space = next((x for x in parts if x in {"global", "shared", "local", "param"}), "generic")
        count = next((int(x[1:]) for x in parts if re.fullmatch(r"v\d", x)), 1)
        if kind in ELEMENTS and space != "param":
            found[op, space, count, kind] += 1
    return found


#: The 16-byte accesses of fp32 that a kernel cannot do with fewer of. Loads: rows of three arrays
#: and five gradients (the first, then four at a time), or eight streams. Stores: rows of three
#: arrays, a partial sum; a row of values.
FEWEST = {
    "update": {"ld": 3 + 5, "st": 3 + 1},
    "finish": {"ld": 3 + 8, "st": 3},
    "coalesce": {"ld": 5, "st": 1 + 1},
    "coalesce_finish": {"ld": 8, "st": 1},
}
#: Likewise where rows may be behind; where only decay was missed, moments stay.
FEWEST_BEHIND = {"gather_current": {"ld": 3 + 1, "st": 1 + 1}, "catch_up": {"ld": 3, "st": 3}}
FEWEST_DECAYED = {"gather_current": {"ld": 1 + 1, "st": 1 + 1}, "catch_up": {"ld": 1, "st": 1}}


def narrow_accesses(ptx: str, vec: int) -> Iterator[str]:
    """Elements of rows that move fewer than `vec` at a time, or by the slower generic access.

    More than `vec` are a table's scalars: Blackwell loads 32 bytes at once. Kernels for rows that
    may be behind, which also read numbers of the row's own, are not asked.
    """
    for name, kernel in nvrtc.kernels(ptx).items():
        for (op, space, count, kind), times in accesses(kernel).items():
            if space not in ("global", "shared") or count < vec:
                yield f"{name}: {times} × {op}.{space} of {count} {kind}"


def too_few_of_16_bytes(ptx: str, least: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for name, kernel in nvrtc.kernels(ptx).items():
        found: Counter[str] = Counter()
        for (op, space, count, kind), times in accesses(kernel).items():
            found[op] += times * (space == "global" and count == 4 and kind == "f32")
        for op, fewest in least[name].items():
            if found[op] < fewest:
                yield f"{name}: {found[op]} {op} of 16 bytes, there are at least {fewest} to do"


@needs_nvrtc
@for_archs(ARCHS)
def test_neighbouring_columns_move_together(arch: int):
    wrong = [
        f"{name_of(variant)}, sm_{arch}: {text}"
        for variant, compiled in compile_all(arch).items()
        if "UNTOUCHED" not in dict(variant.macros)
        and (vec := int(dict(variant.macros).get("VEC", 1))) > 1
        for text in narrow_accesses(compiled.ptx, vec)
    ]
    assert not wrong, "\n".join(wrong)


@needs_nvrtc
@for_archs(ARCHS)
@pytest.mark.parametrize("key_dtype", [torch.int32, torch.int64], ids=str)
def test_fp32_rows_of_a_multiple_of_four_move_16_bytes_at_a_time(arch: int, key_dtype: torch.dtype):
    compiled = compile_all(arch)[adamw_variant(4, key_dtype)]
    assert nvrtc.kernels(compiled.ptx).keys() == FEWEST.keys(), compiled.log
    assert list(too_few_of_16_bytes(compiled.ptx, FEWEST)) == []


@needs_nvrtc
@for_archs(ARCHS_OF_ALL)
@pytest.mark.parametrize("untouched", ["decay", "dense", "replay"])
def test_rows_that_may_be_behind_move_16_bytes_at_a_time(arch: int, untouched: str):
    update = compile_all(arch)[adamw_variant(4, untouched=untouched)]
    assert nvrtc.kernels(update.ptx).keys() == {"update", "finish"}, update.log
    assert list(too_few_of_16_bytes(update.ptx, FEWEST)) == []
    variant = engine_module("_compile").untouched_variant(torch.float32, 4, untouched)
    ptx = compile_all(arch)[variant].ptx
    least = FEWEST_DECAYED if untouched == "decay" else FEWEST_BEHIND
    assert nvrtc.kernels(ptx).keys() == least.keys()
    assert list(too_few_of_16_bytes(ptx, least)) == []


# The variant for other widths stands for one that has lost its wide accesses.
@needs_nvrtc
@for_archs([90])
def test_narrow_accesses_are_found(arch: int):
    ptx = compile_variant(adamw_variant(1), arch).ptx
    assert {x.partition(":")[0] for x in narrow_accesses(ptx, 4)} == FEWEST.keys()
    assert {x.partition(":")[0] for x in too_few_of_16_bytes(ptx, FEWEST)} == FEWEST.keys()


def test_accesses_are_read_from_ptx():
    ptx = """
.visible .entry update(
	.param .u64 update_param_0
)
{
	ld.param.u64 	%rd1, [update_param_0];
	ld.param.f64 	%fd1, [update_param_1];
	ld.global.nc.v4.f32 	{%f1, %f2, %f3, %f4}, [%rd1];
	@%p1 ld.global.f32 	%f5, [%rd1];
	ld.v4.f32 	{%f1, %f2, %f3, %f4}, [%rd1];
	ld.global.u64 	%rd2, [%rd1];
	st.shared.u16 	[%rd1], %rs1;
	st.volatile.global.v2.f64 	[%rd1], {%fd1, %fd2};
}
"""
    (kernel,) = nvrtc.kernels(ptx).values()
    assert accesses(kernel) == {
        ("ld", "global", 4, "f32"): 1,
        ("ld", "global", 1, "f32"): 1,
        ("ld", "generic", 4, "f32"): 1,
        ("st", "shared", 1, "u16"): 1,
        ("st", "global", 2, "f64"): 1,
    }
    assert list(narrow_accesses(ptx, 4)) == [
        "update: 1 × ld.global of 1 f32",
        "update: 1 × ld.generic of 4 f32",
        "update: 1 × st.shared of 1 u16",
        "update: 1 × st.global of 2 f64",
    ]


# ------------------------------------------------------------------ sources


def own_includes(path: Path) -> set[str]:
    """Files that a file includes, and that those include."""
    names = re.findall(r'^\s*#\s*include\s*"(.+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
    return set(names).union(*(own_includes(CUDA_SRC / name) for name in names))


@pytest.mark.parametrize("file", FILES)
def test_a_source_holds_each_of_its_includes_once(file: str):
    source = engine_module("_compile").source(file)
    included = own_includes(CUDA_SRC / file)
    for path in CUDA_SRC.glob("*.cuh"):
        begin = path.read_text(encoding="utf-8").splitlines()[0]
        assert source.count(begin) == (path.name in included), path.name
    left = {line for line in source.splitlines() if re.match(r"\s*#\s*(include|pragma once)", line)}
    assert left <= {"#include <cuda_fp16.h>", "#include <cuda_bf16.h>"}


def test_every_file_is_compiled_and_no_choice_of_types_twice():
    variants = list(engine_module("_compile").all_variants())
    assert {variant.file for variant in variants} == set(FILES)
    assert len(set(variants)) == len(variants)


# ------------------------------------------------------------------ what host and kernels agree on


IS_DOUBLE = """
template <typename T> struct IsDouble { static constexpr bool value = false; };
template <> struct IsDouble<double> { static constexpr bool value = true; };
"""


def layout(struct: str, dtype: np.dtype[Any], inner: Mapping[str, str] | None = None) -> str:
    """Assertions that a struct has the fields of a dtype; ``inner`` has those of a struct in it."""
    lines = [f'static_assert(sizeof({struct}) == {dtype.itemsize}, "size of {struct}");']
    for name in dtype.names or ():
        field_type, offset = dtype.fields[name][:2]
        path = (inner or {}).get(name, name)
        member = f"static_cast<{struct}*>(nullptr)->{path}"
        is_double = str(field_type.kind == "f").lower()
        lines += [
            f'static_assert({what}, "{struct}::{path}");'
            for what in (
                f"__INTADDR__(&{member}) == {offset}",  # what NVRTC has in place of offsetof
                f"sizeof({member}) == {field_type.itemsize}",
                f"IsDouble<decltype({member})>::value == {is_double}",
            )
        ]
    return "\n".join(lines)


def constants(**values: int) -> str:
    return "\n".join(f'static_assert({k} == {v}, "{k}");' for k, v in values.items())


def group_assertions() -> str:
    group = engine_module("_group")
    inner = {name: f"block_rows.{name}" for name in group.DIVISOR.names}
    return "\n".join(
        [
            layout("Divisor", group.DIVISOR),
            layout("Piece", group.PIECE),
            layout("Rows", group.ROWS),
            layout("Table", group.TABLE, inner),
            layout("Words", np.dtype([("word", "i8", group.WORDS)])),
            constants(WORDS=group.WORDS),
        ]
    )


def hash_table_assertions() -> str:
    return "\n".join(
        [
            layout("Divisor", engine_module("_group").DIVISOR),
            layout("Plan", engine_module("random").PLAN),
            layout("Entry", np.dtype([("id", "i8"), ("row", "i8")])),
            constants(WARP=engine_module("_compile").WARP),
        ]
    )


def adamw_assertions() -> str:
    adamw = engine_module("adamw")
    return "\n".join(
        [
            constants(TILE=adamw.TILE, WARP=adamw.WARP),
            constants(TILE=adamw.THREADS),  # a thread for each position
        ]
    )


def untouched_assertions() -> str:
    untouched = engine_module("untouched")
    names = ("RULE_NODES", "RULE_CHUNK", "RULE_WIDTH", "STEP_WIDTH")
    return "\n".join(
        [
            layout("Missed", engine_module("_group").MISSED),
            layout("Lagging", untouched.LAGGING),
            constants(THREADS=untouched.THREADS, **{x: getattr(_types, x) for x in names}),
        ]
    )


@needs_nvrtc
@for_archs([90])
@pytest.mark.parametrize("file", FILES)
def test_host_and_kernels_agree_on_layouts_and_constants(arch: int, file: str):
    assertions = {
        "group.cu": group_assertions,
        "hash_table.cu": hash_table_assertions,
        "rows.cu": lambda: "",
        "sparse_adamw.cu": adamw_assertions,
        "untouched.cu": untouched_assertions,
    }
    variants = engine_module("_compile").all_variants()
    variant = next(variant for variant in variants if variant.file == file)
    compiled = compile_variant(variant, arch, IS_DOUBLE + assertions[file]())
    assert compiled.is_ok, compiled.log


@needs_nvrtc
@for_archs([90])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([("id", "i8"), ("row", "i8"), ("more", "i8")], "size of Entry"),
        ([("row", "i8"), ("id", "i8")], "Entry::row"),
        ([("id", "i8"), ("row", "f8")], "Entry::row"),
        ([("id", "i4"), ("row", "i4"), ("pad", "i8")], "Entry::id"),
    ],
)
def test_a_layout_that_differs_is_found(arch: int, fields: list[tuple[str, str]], message: str):
    struct = "struct Entry { long long id; long long row; };"
    source = struct + IS_DOUBLE + layout("Entry", np.dtype(fields))
    compiled = nvrtc.compile_source(source, "planted.cu", ("-std=c++17",), arch)
    assert not compiled.is_ok
    assert message in compiled.log


# ------------------------------------------------------------------ division by a constant

NUMBERS = st.integers(0, 2**63 - 1)


def divide(n: int, number: int) -> int:
    """As ``divide`` of blocks.cuh does, in 64 bits; what does not fit raises OverflowError."""
    divisor, magic, shift = engine_module("_group").divisor(number)
    assert divisor == number
    for word in (2 * n, magic):
        word.to_bytes(8, "little")
    return ((2 * n * magic) >> 64) >> shift


def near(number: int) -> list[int]:
    return [number - 1, number, number + 1]


@pytest.mark.parametrize("number", sorted({m for k in range(41) for m in near(1 << k) if m > 0}))
def test_division_without_a_division_at_the_edges(number: int):
    last = (2**63 - 1) // number * number  # the greatest multiple
    for n in [0, 1, 2**31, 2**32, 2**63 - 1, *near(number), *near(last), *near(number * 2**22)]:
        if 0 <= n < 2**63:
            assert divide(n, number) == n // number, n


@hypothesis.given(n=NUMBERS, number=st.integers(1, 2**40), k=NUMBERS)
def test_division_without_a_division(n: int, number: int, k: int):
    assert divide(n, number) == n // number
    multiple = k // number * number  # where the quotient changes
    for m in near(multiple):
        if 0 <= m < 2**63:
            assert divide(m, number) == m // number
