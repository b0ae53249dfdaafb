"""Builds the fused CPU solver as a plain shared library, nodeshape/libnodeshape_cpu.so.

The library speaks to torch through its stable C++ ABI and to Python not at all, so one build serves every Python and
every torch from 2.10 on. Its kernels are compiled once per instruction set; the machine that runs them chooses.
NODESHAPE_CXXFLAGS appends compiler and linker flags (sanitizers, for example).
"""

import os
import platform
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("csrc/cpu")
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
#: Contraction is off so that a sum rounds the same way wherever the compiler has inlined it; kernels call fma by name.
KERNEL_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
INSTRUCTION_SETS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"]


class BuildLibrary(build_ext):
    """Compile ops.cpp and isa.cpp once, kernels.cpp once per instruction set, and link them."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], "libnodeshape_cpu.so")

    def build_extension(self, ext: Extension) -> None:
        candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
        compiler = next((name for name in candidates if shutil.which(shlex.split(name)[0])), None)
        if compiler is None:
            sys.exit(
                f"nodeshape needs a C++20 compiler and found none (looked for {', '.join(candidates)}):"
                " install g++ 11 or clang 16, or newer, or set CXX to one"
            )
        import torch  # only here, so that metadata can be read without it

        root = Path(torch.__file__).parent
        extra = shlex.split(os.environ.get("NODESHAPE_CXXFLAGS", ""))
        torch_flags = ["-isystem", str(root / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        units = [("ops.cpp", "ops", torch_flags), ("isa.cpp", "isa", [])]
        for name, flags in INSTRUCTION_SETS.items():
            units.append(("kernels.cpp", f"kernels_{name}", [f"-DNODESHAPE_TARGET={name}", *KERNEL_FLAGS, *flags]))

        command = shlex.split(compiler)
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)

        def compile(unit: tuple[str, str, list[str]]) -> None:
            source, name, flags = unit
            output = str(objects / f"{name}.o")
            self.spawn([*command, *FLAGS, *flags, *extra, "-c", str(SOURCES / source), "-o", output])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile, units))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        link = [*command, "-shared", *extra, *(str(objects / f"{name}.o") for _, name, _ in units)]
        self.spawn([*link, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(target)])


class PlatformWheel(bdist_wheel):
    """A wheel for this platform and any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    ext_modules=[Extension("nodeshape._cpu", [str(path) for path in sorted(SOURCES.glob("*.cpp"))])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    distclass=BinaryDistribution,
)
