"""Builds the fused solver as plain shared libraries: libnodeshape_cpu.so, for CUDA libnodeshape_cuda.so, and for
onnxruntime without torch libnodeshape_onnxruntime.so.

The libraries speak to torch through its stable C++ ABI and to Python not at all, so one build serves every Python and
every torch from 2.10 on. The CPU kernels are compiled once per instruction set and dtype; the machine that runs them
chooses.
The CUDA library is built where torch has CUDA and nvcc is found; FORCE_CUDA=1 builds it for any torch and fails without
nvcc, NODESHAPE_CUDA=0 leaves it out, TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") says for which GPUs.
The library for onnxruntime is built where NODESHAPE_ONNXRUNTIME names the folder of onnxruntime_c_api.h (docs/export.md
says where to get it).
NODESHAPE_CXXFLAGS appends compiler and linker flags (sanitizers, for example) to the CPU library's;
NODESHAPE_PORTABLE=1 leaves out the kernels for wider vectors, for a quick build.
"""

import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

#: The package that the libraries lie in, as a folder.
PACKAGE_FOLDER = "nodeshape/_ode"
CPU_NAME, CUDA_NAME, ONNXRUNTIME_NAME = (
    f"{PACKAGE_FOLDER.replace('/', '.')}.{name}" for name in ("_cpu", "_cuda", "_onnxruntime")
)
REPOSITORY = "https://github.com/nodeshape/nodeshape"
CPU, CUDA, ONNXRUNTIME = Path("csrc/cpu"), Path("csrc/cuda"), Path("csrc/onnxruntime")
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
#: Files in csrc/cpu that are compiled for each instruction set and dtype.
KERNELS = ("program", "adaptive", "conv")
#: Contraction is off so that a sum rounds the same way wherever the compiler has inlined it; kernels call fma by name.
KERNEL_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
INSTRUCTION_SETS = {"portable": []}
PORTABLE = os.environ.get("NODESHAPE_PORTABLE") == "1"
if platform.machine().lower() in ("x86_64", "amd64") and not PORTABLE:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def find_nvcc() -> str | None:
    """Nvcc, if the CUDA solver is to be built."""
    if os.environ.get("NODESHAPE_CUDA") == "0":
        return None
    forced = os.environ.get("FORCE_CUDA") == "1"
    if not forced:
        try:
            import torch
        except ImportError:
            return None  # metadata can be read without torch
        if torch.version.cuda is None:
            return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ] + ["/usr/local/cuda"]
    candidates = ["nvcc", *(f"{home}/bin/nvcc" for home in homes)]
    found = next((path for path in map(shutil.which, candidates) if path), None)
    if found is None and forced:
        sys.exit(f"FORCE_CUDA=1 needs nvcc and found none (looked for {', '.join(candidates)}): set CUDA_HOME")
    if found is None:
        print("nodeshape: torch has CUDA but nvcc was not found, so solves on a GPU will take the plain loop")
    return found


def find_onnxruntime() -> str | None:
    """The folder of onnxruntime's headers, if the library for it is to be built."""
    folder = os.environ.get("NODESHAPE_ONNXRUNTIME")
    if folder and not Path(folder, "onnxruntime_c_api.h").is_file():
        sys.exit(f"NODESHAPE_ONNXRUNTIME={folder} holds no onnxruntime_c_api.h: name the folder that does, or unset it")
    return folder or None


def gencode_flags(architectures: str) -> list[str]:
    """Nvcc's flags for a list like torch's, "8.0;9.0+PTX"."""
    flags = []
    for name in architectures.replace(" ", ";").split(";"):
        number = name.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}", f"compute_{number}"] if name.endswith("+PTX") else [f"sm_{number}"]
        flags += [f"-gencode=arch=compute_{number},code=[{','.join(codes)}]"]
    return flags


class BuildLibrary(build_ext):
    """Compile a library's sources side by side, and link them."""

    def finalize_options(self) -> None:
        self.nvcc, self.onnxruntime = find_nvcc(), find_onnxruntime()
        extensions = self.distribution.ext_modules
        # An editable install comes here twice.
        if self.nvcc is not None and all(ext.name != CUDA_NAME for ext in extensions):
            sources = [str(path) for path in sorted(CUDA.glob("*.c*")) if path.suffix != ".cuh"]
            # Unless it is asked for, one that does not compile is left out, and setuptools says so.
            extensions.append(Extension(CUDA_NAME, sources, optional=os.environ.get("FORCE_CUDA") != "1"))
        if self.onnxruntime is not None and all(ext.name != ONNXRUNTIME_NAME for ext in extensions):
            extensions.append(Extension(ONNXRUNTIME_NAME, [str(ONNXRUNTIME / "ops.cpp")]))
        super().finalize_options()

    def get_ext_filename(self, fullname: str) -> str:
        *packages, name = fullname.split(".")
        return os.path.join(*packages, f"libnodeshape{name}.so")

    def build_extension(self, ext: Extension) -> None:
        import torch  # only here, so that metadata can be read without it

        root = Path(torch.__file__).parent
        torch_flags = ["-isystem", str(root / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if ext.name == CUDA_NAME:
            print("nodeshape: compiling the solver for CUDA; takes some minutes", flush=True)
            if (root / "lib/libtorch_cuda.so").exists():
                link.append("-ltorch_cuda")
            command = [self.nvcc, *NVCC_FLAGS, *(["-ccbin", os.environ["CXX"]] if "CXX" in os.environ else [])]
            code = gencode_flags(os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES)
            units = [
                (path, f"cuda_{Path(path).stem}_{Path(path).suffix[1:]}", [*code, *torch_flags]) for path in ext.sources
            ]
            self.build_library(command, units, link, target)
            return
        command = [*shlex.split(find_compiler()), *FLAGS]
        extra = [
            *shlex.split(os.environ.get("NODESHAPE_CXXFLAGS", "")),
            *(["-DNODESHAPE_PORTABLE"] if PORTABLE else []),
        ]
        if ext.name == ONNXRUNTIME_NAME:  # from the kernels of libnodeshape_cpu.so, which has been built
            flags = ["-isystem", self.onnxruntime, "-DNODESHAPE_ONNXRUNTIME", *extra]
            units = [(path, "onnxruntime", flags) for path in ext.sources]
            self.build_library(command, units, extra, target, self.kernels)
            return
        names = ", ".join(sorted(INSTRUCTION_SETS))
        print(f"nodeshape: compiling the solver for {names}; takes a minute or two", flush=True)
        units = [(CPU / f"{name}.cpp", name, [*torch_flags, *extra]) for name in ("ops", "adaptive_ops")]
        kernels = [(CPU / "isa.cpp", "isa", extra)]
        for name, flags in INSTRUCTION_SETS.items():
            for scalar in ("float", "double"):
                kernel_flags = [
                    f"-DNODESHAPE_TARGET={name}",
                    f"-DNODESHAPE_SCALAR={scalar}",
                    *KERNEL_FLAGS,
                    *flags,
                    *extra,
                ]
                kernels += [(CPU / f"{kind}.cpp", f"{kind}_{name}_{scalar}", kernel_flags) for kind in KERNELS]
        objects = self.build_library(command, [*units, *kernels], [*link, *extra], target)
        self.kernels = objects[len(units) :]

    def build_library(
        self,
        command: list[str],
        units: list[tuple[Path | str, str, list[str]]],
        link: list[str],
        target: Path,
        others: Sequence[str] = (),
    ) -> list[str]:
        """Compile units (source, name of the object, flags) and link them, and other objects, into ``target``."""
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)

        def compile(unit: tuple[Path | str, str, list[str]]) -> str:
            source, name, flags = unit
            output = str(objects / f"{name}.o")
            self.spawn([*command, *flags, "-c", str(source), "-o", output])
            return output

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile, units))
        self.spawn([*command, "-shared", *compiled, *others, *link, "-o", str(target)])
        return compiled


def find_compiler() -> str:
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    compiler = next((name for name in candidates if shutil.which(shlex.split(name)[0])), None)
    if compiler is None:
        sys.exit(
            f"nodeshape needs a C++20 compiler and found none (looked for {', '.join(candidates)}):"
            " install g++ 11 or clang 16, or newer, or set CXX to one"
        )
    return compiler


class PlatformWheel(bdist_wheel):
    """A wheel for this platform and any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


def readme() -> str:
    """README.md with its relative links made links into the repository, for the package index."""
    version = re.search(r'__version__ = "(.+)"', Path("nodeshape/__init__.py").read_text("utf-8")).group(1)
    link = re.compile(r"(!?)(\[[^\]]*\])\((?!https?:|#)([^)]+)\)")
    return link.sub(
        lambda m: f"{m[1]}{m[2]}({REPOSITORY}/{'raw' if m[1] else 'blob'}/v{version}/{m[3]})",
        Path("README.md").read_text("utf-8"),
    )


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    ext_modules=[Extension(CPU_NAME, [str(path) for path in sorted(CPU.glob("*.cpp"))])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    distclass=BinaryDistribution,
)
