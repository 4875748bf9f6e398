"""Compiles the runtime and kernel sources with g++, and keeps the results in a cache on disk."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

CPP = Path(__file__).parent / "cpp"
TORCH = Path(torch.__file__).parent
OLDEST_GXX = 11  # the first to tell volatile accesses from others

# Instrumented code calls the hooks of the runtime. What a GPU compiler would not do, g++ must not
# do either: fuse a multiplication and an addition, or take memcpy for a plain access.
COMMON = [
    "-fPIC -fvisibility=hidden -fno-gnu-unique -fno-exceptions -fno-rtti -fno-builtin",
    "-fno-threadsafe-statics -fno-math-errno -ffp-contract=off -fno-strict-aliasing",
    # A fault's line is that of the call; addr2line gets the first file of DWARF 5 wrong.
    "-fno-optimize-sibling-calls -g1 -gdwarf-4",
    "-Wno-unknown-pragmas -Wno-attributes",
]
CHECKED = [
    "-O1 -fsanitize=thread,alignment,bounds,integer-divide-by-zero",
    "--param tsan-instrument-func-entry-exit=0 --param tsan-distinguish-volatile=1",
]
UNCHECKED = ["-O2"]


def words(lines: Sequence[str]) -> list[str]:
    return " ".join(lines).split()


@functools.cache
def available() -> str | None:
    """The reason why kernels cannot be emulated here, or None where they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the emulator switches threads in assembly for Linux on x86-64 only"
    if shutil.which("g++") is None:
        return "the emulator needs g++, which is not installed"
    version = run(["g++", "-dumpversion"]).split(".")[0]
    if int(version) < OLDEST_GXX:
        return f"the emulator needs g++ {OLDEST_GXX} or newer, this one is {version}"
    if not (TORCH / "include/c10/core/CPUAllocator.h").exists():
        return "the emulator needs torch's C++ headers, which this torch came without"
    return None


def run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-8000:]}")
    return done.stdout


@functools.cache
def fixed_inputs() -> str:
    """What every object depends on besides its own source: compiler, torch, our sources.

    And where these are: a fault's line is looked up by the names of files.
    """
    sources = sorted([*CPP.rglob("*.h"), *CPP.rglob("*.cpp"), Path(__file__)])
    text = [run(["g++", "--version"]), torch.__version__, str(TORCH), str(CPP)]
    return "\0".join(text + [path.read_text(encoding="utf-8") for path in sources])


def cache() -> Path:
    """A folder of this user's alone: what lies in it is executed."""
    path = Path(tempfile.gettempdir()) / f"cupy-sparse-adamw-emulator-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or path.is_symlink():
        raise RuntimeError(f"{path} may be written by others; remove it")
    return path


def cached(key: Sequence[str], build: Callable[[Path], None]) -> Path:
    """The folder that ``build`` filled for this key, now or in another process before."""
    digest = hashlib.sha256("\0".join([fixed_inputs(), *key]).encode()).hexdigest()[:32]
    done = cache() / digest
    if done.exists():
        return done
    building = Path(tempfile.mkdtemp(prefix="building-", dir=cache()))
    try:
        build(building)
        building.rename(done)
    except OSError:
        if not done.exists():  # if it does, another process was faster, with the same result
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return done


@functools.cache
def runtime() -> Path:
    """The runtime as a shared library."""
    return cached(["runtime"], _build_runtime) / "libemulator.so"


def _build_runtime(folder: Path) -> None:
    flags = words(["-std=c++17 -O3 -g1 -fPIC -fvisibility=hidden -Wall -Wextra -Werror"])
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    command = ["g++", *flags, abi, "-isystem", str(TORCH / "include"), "-c"]
    compiling = []
    for source in sorted((CPP / "runtime").glob("*.cpp")):
        target = str(folder / source.stem) + ".o"
        compiling.append(
            subprocess.Popen([*command, str(source), "-o", target], stderr=subprocess.PIPE)
        )
    failures = [process.communicate()[1].decode() for process in compiling]
    if any(process.returncode for process in compiling):
        raise RuntimeError("the emulator's runtime does not compile:\n" + "".join(failures))
    objects = sorted(map(str, folder.glob("*.o")))
    libraries = [f"-L{TORCH / 'lib'}", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}", "-Wl,-z,defs"]
    run(["g++", "-shared", *objects, "-o", str(folder / "libemulator.so"), *libraries])


def kernels(code: str, options: Sequence[str], checked: bool) -> Path:
    """A shared library of the kernels in ``code``."""
    flags = compiler_options(options)
    build = functools.partial(_build_kernels, code=code, options=flags, checked=checked)
    return cached([code, *flags, str(checked)], build) / "kernels.so"


def compiler_options(options: Sequence[str]) -> list[str]:
    """Of NVRTC's options those that g++ must know too."""
    kept = []
    standard = "-std=c++17"
    for option in options:
        name, _, value = option.lstrip("-").partition("=")
        if option.startswith("-D"):
            kept.append(option)
        elif name == "define-macro":
            kept.append(f"-D{value}")
        elif name == "std":
            standard = f"-std={value}"
    return [standard, *kept]


def _build_kernels(folder: Path, code: str, options: Sequence[str], checked: bool) -> None:
    source, expanded = folder / "kernels.cu", folder / "kernels.ii"
    source.write_text(code, encoding="utf-8")
    # NVRTC has no headers of the host's: an #include of one fails here as it would there.
    headers = ["-nostdinc", "-nostdinc++", f"-I{CPP / 'include'}"]
    headers += ["-include", str(CPP / "device/builtins.h")]
    compiler = ["g++", f"-ffile-prefix-map={folder}/=", *options, *words(COMMON)]
    # A kernel must not be inlined into its launcher, which is not instrumented; and of a variable
    # that is not "used" g++ may decide that nobody writes to it.
    keywords = [
        '-D__global__=__attribute__((noinline, visibility("default")))',
        "-D__shared__=static __attribute__((used))",
        "-D__launch_bounds__(...)=",
    ]
    flags = words(CHECKED if checked else UNCHECKED)
    target = str(folder / "kernels.o")
    try:
        run([*compiler, *headers, "-x", "c++", "-E", str(source), "-o", str(expanded)])
        text = expanded.read_text(encoding="utf-8")
        expanded.write_text(in_plain_cpp(text) + kernel_table(text), encoding="utf-8")
        run([*compiler, *keywords, *flags, "-x", "c++", "-c", str(expanded), "-o", target])
    except RuntimeError as error:
        raise RuntimeError(f"the kernel source does not compile: {error}") from None
    library = runtime()
    linked = ["-Wl,-z,defs", str(library), f"-Wl,-rpath,{library.parent}"]
    # Without start files, .bss holds the shared variables and nothing else.
    run(["g++", "-shared", "-nostartfiles", target, *linked, "-o", str(folder / "kernels.so")])


BRACKETS = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"  # nested three deep
ATTRIBUTES = rf"(?:__launch_bounds__\s*{BRACKETS}|__attribute__\s*{BRACKETS}|void|static|inline)"
KERNEL = re.compile(rf"__global__\s+((?:{ATTRIBUTES}\s*)*)(\w+)\s*\(")
BOUNDS = re.compile(rf"__launch_bounds__\s*({BRACKETS})")
DYNAMIC_SHARED = re.compile(
    rf"extern\s+__shared__\s+(?:__attribute__\s*{BRACKETS}\s*|alignas\s*{BRACKETS}\s*)*"
    r"([\w:<>\s]+?)\s*\b(\w+)\s*\[\s*\]\s*;"
)


def kernel_table(text: str) -> str:
    """The list of the kernels in preprocessed source: those with C names, which CuPy can find."""
    entries = {}
    for found in KERNEL.finditer(text):
        statement = text[max(text.rfind(mark, 0, found.start()) for mark in ";}") + 1 : found.end()]
        if "template" in statement:
            continue  # only its instances are kernels, and their names are mangled
        bounds = BOUNDS.search(found[1])
        entries[found[2]] = f"EMULATOR_KERNEL({found[2]}, {bounds[1] if bounds else '(1024)'})"
    header = (CPP / "device/kernel_table.h").read_text(encoding="utf-8")
    # The preprocessor has run already, so the two macros of the table are given once more.
    macros = re.findall(r"#define EMULATOR_(?:KERNEL|MODULE)\(.*?[^\\]\n", header, re.DOTALL)
    return "\n" + "".join(macros) + f"EMULATOR_MODULE({', '.join(entries.values())})\n"


def in_plain_cpp(text: str) -> str:
    """Rewrites the two uses of ``__shared__`` that ``static`` cannot stand for."""
    text = DYNAMIC_SHARED.sub(
        r"\1* const \2 = reinterpret_cast<\1*>(emulator_dynamic_shared());", text
    )
    # g++ takes alignas in front of static only.
    return re.sub(rf"\b__shared__\s+(alignas\s*{BRACKETS})", r"\1 __shared__", text)


@functools.cache
def shared_variables(library: Path) -> list[tuple[str, int, int]]:
    """Name, offset in the library and size of each of its ``__shared__`` variables."""
    variables = []
    for line in run(["nm", "-S", str(library)]).splitlines():
        columns = line.split(maxsplit=3)
        if len(columns) < 4 or columns[2] not in "bBvVuU":
            continue
        name = columns[3]
        if not name.startswith("_ZZ"):  # a variable of no function
            raise RuntimeError(
                f"{name} is a __device__ variable; the emulator has none (pass a pointer)"
            )
        plain = run(["c++filt", name]).strip().rpartition("::")[2]
        variables.append((plain, int(columns[0], 16), int(columns[1], 16)))
    return variables


def source_line(library: Path, offset: int) -> str:
    """File and line of the instruction before ``offset``, outside the emulator's own headers."""
    command = ["addr2line", "-i", "-e", str(library), hex(offset - 1)]
    for line in run(command).splitlines():
        path, _, number = line.partition(" ")[0].rpartition(":")
        if path and not Path(path).is_relative_to(CPP):
            # The compiler gives lines of the source to the file that it read.
            return f"{Path(path).name.replace('kernels.ii', 'kernels.cu')}:{number}"
    return ""
