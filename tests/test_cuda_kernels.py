"""The CUDA kernels, executed: on a GPU where there is one, and everywhere on the CPU.

``tests/cuda_shim`` plays the GPU: the kernels' own sources, compiled as C++, with threads as fibres that run
in random order between barriers. Its library takes the place of the CPU's ops, in a process under AddressSanitizer, and
the tests of the fused solver run on it as they are.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from filelock import FileLock
from fused_reference import ADJOINTS, METHODS, random_conv, solve
from problems import relative_error
from test_fuse import CASES, FIXED, IMPLICIT, TIGHT, problem, solved

import nodeshape as ns
from nodeshape._ode import fused

ROOT = Path(__file__).parent.parent
TORCH = Path(torch.__file__).parent
FLAGS = [
    *("-std=c++20", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-DNODESHAPE_CUDA_ON_HOST", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
    *("-I", str(ROOT / "tests/cuda_shim"), "-isystem", str(TORCH / "include")),
]
SANITIZED = ["-O1", "-fsanitize=address"]
EXTRA = shlex.split(os.environ.get("NODESHAPE_CXXFLAGS", ""))  # as setup.py takes them
UNITS = {
    "tests/cuda_shim/cuda_shim.cpp": ["-O2"],  # what switches fibres is not what is tested
    "csrc/cuda/ops.cpp": SANITIZED,
    "csrc/cuda/conv.cu": SANITIZED,
    "csrc/cuda/program.cu": SANITIZED,
}

#: A machine on which blocks are small and the tests' feature maps too large for one of them.
TEAMS = "cuda:threads=32,shared=4096"

#: Tests that are not run on the host, by a part of their names: torch.compile's tools do not run under a preload,
#: others are of CPU threads, instruction sets and errors, and one is long.
OF_THE_CPU = [
    *("compiled", "exported", "scripted", "opcheck", "forked", "eight_threads", "threads_do_not", "twenty_steps"),
    *("unknown_instruction_set", "unsolved_stage_is_an_error", "trajectory_is_an_error", "float32_activations"),
    *("compilers_and_exporters", "good_citizen"),
]
#: Of programs, tests that run no kernel but the check of fuse().
OF_FUSE = [
    "without_the_time",
    "keeps_does_not",
    "can_be_read",
    "does_not_lower",
    "do_not_own",
    "strided_convolution",
    "loads_states",
    "in_the_one",
]
#: And long ones; some cases of them.
LONG = [
    *("any_feature_map", "any_mlp", "wide_sample", "random_programs", "any_batch", "all_gradient_modes", "in_float32"),
    "(solves_as_its_f_does and (conv or separable or batch))",
    *("full_size", "every_other_method"),  # whose cases are all slow
]

pytestmark = pytest.mark.skipif(fused._missing is not None, reason=str(fused._missing))
on_host = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux" or shutil.which("g++") is None,
    reason="the shim needs g++ on x86-64 Linux",
)


def compile(source: str, folder: Path, root: Path = ROOT) -> Path:
    """The object of one unit, from the sources under ``root``."""
    output = folder / f"{Path(source).stem}_{Path(source).suffix[1:]}.o"
    command = ["g++", *FLAGS, *UNITS[source], "-x", "c++", "-c", str(root / source), "-o", str(output), *EXTRA]
    subprocess.run(command, check=True)
    return output


def link(objects: list[Path], library: Path) -> Path:
    """Functions that several objects have are those of the first."""
    command = [
        "g++",
        "-shared",
        "-fsanitize=address",
        *EXTRA,
        *map(str, objects),
        f"-L{TORCH / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
    ]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The object of each unit, compiled by whichever of the testing processes comes first."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "cuda_on_host"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"), ThreadPoolExecutor(os.cpu_count()) as pool:
        done = folder / "done"
        if not done.exists():
            list(pool.map(lambda source: compile(source, folder), UNITS))
            done.touch()
    return {source: folder / f"{Path(source).stem}_{Path(source).suffix[1:]}.o" for source in UNITS}


def run_tests(library: Path, machine: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run tests in a process whose fused solver is ``library``, playing ``machine`` (see cuda_runtime.h)."""
    # AddressSanitizer has to be there first, and finds how to throw only if the C++ library is there too.
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # Python and torch leak on purpose
        "NODESHAPE_TEST_ISAS": machine,
        "PYTEST_ADDOPTS": "-q -n 0 -p no:cacheprovider",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", f"--cuda-on-host={library}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@on_host
@pytest.mark.parametrize(
    ("machine", "marked", "left_out"),
    [
        (TEAMS, "not slow", LONG),
        pytest.param(TEAMS, "", [], marks=pytest.mark.slow),
        pytest.param("cuda:threads=96,shared=8192", "", [], marks=pytest.mark.slow),
        pytest.param("cuda", "", [], marks=pytest.mark.slow),
    ],
)
def test_kernels_pass_the_tests_of_the_fused_solver_on_the_host(objects, machine, marked, left_out, tmp_path):
    """Under AddressSanitizer, in random order: teams of blocks, blocks that do not divide the work, the usual ones."""
    left_out = [*OF_THE_CPU, *OF_FUSE, *left_out]
    files = [
        f"tests/{name}.py" for name in ("test_fused_solver", "test_fused_ops", "test_fuse", "cuda_shim/test_on_host")
    ]
    library, results = tmp_path / "libnodeshape_cuda_on_host.so", tmp_path / "results.xml"
    expression = " and ".join(f"not {name}" for name in left_out)
    arguments = ("-m", marked, "-k", expression, f"--junitxml={results}")
    done = run_tests(link([*objects.values()], library), machine, *files, *arguments)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    names = {name for file in files for name in re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.MULTILINE)}
    passed = [case for case in ElementTree.parse(results).findall(".//testcase") if len(case) == 0]
    expected = {name for name in names if not any(part in name for part in left_out)}
    assert {case.get("name").split("[")[0] for case in passed} == expected, "and none was skipped"


@on_host
@pytest.mark.slow
@pytest.mark.parametrize("place", ["each", "spread", "reduce", "add_up", "team"])
def test_a_missing_barrier_is_found(objects, place, tmp_path):
    """What the random order is for: without a loop's last barrier, or if blocks do not wait for each other, numbers
    are wrong or threads astray."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    header = tmp_path / "csrc/cuda/block.cuh"
    if place == "team":
        pattern, left = r"while \(\*const_cast.*?;", "(void)all;"
    else:
        pattern, left = rf"( {place}\(int64_t .*?\n)  barrier\(\);\n((?:  return result;\n)?}}\n)", r"\1\2"
    broken, count = re.subn(pattern, left, header.read_text(), count=1, flags=re.DOTALL)
    assert count == 1
    header.write_text(broken)
    unit = "csrc/cuda/conv.cu"  # what it has from the header goes before what others have
    others = [object for source, object in objects.items() if source != unit]
    library = link([compile(unit, tmp_path, tmp_path), *others], tmp_path / "libnodeshape_cuda_on_host.so")
    selected = ("tests/test_fused_solver.py", "-m", "", "-s", "-k", "conv_agrees and implicit and discrete")
    done = run_tests(library, TEAMS if place == "team" else "cuda", *selected)
    assert done.returncode != 0 and " passed" not in done.stdout, done.stdout + done.stderr
    assert " failed" in done.stdout or "cuda_shim: some threads wait" in done.stderr, done.stdout + done.stderr


@pytest.mark.cuda
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dynamics", ["conv", "conv of several blocks", "mlp"])
def test_gpu_agrees_with_the_plain_loop(dynamics, method, adjoint):
    torch.manual_seed(0)
    if dynamics == "conv":
        f, y0 = random_conv(16), torch.randn(3, 16, 8, 8, dtype=torch.float64)
    elif dynamics == "conv of several blocks":
        f, y0 = random_conv(128), torch.randn(2, 128, 14, 14, dtype=torch.float64)
    else:
        f, y0 = ns.MLPDynamics(3, (33, 7)), torch.randn(19, 3, dtype=torch.float64)
    times = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    arguments = {"method": method, "adjoint": adjoint, "steps": 3, "options": {"drift_tolerance": 1e-2}}
    plain = solve(f, y0, times, fused=False, dtype=torch.float64, **arguments)
    for dtype, (forward, gradients) in {torch.float32: (1e-5, 1e-4), torch.float64: (1e-12, 1e-11)}.items():
        fused = solve(f.cuda(), y0.cuda(), times, fused=True, dtype=dtype, **arguments)
        to_ys, to_y0, to_t, to_parameters = fused.distance(plain)
        assert to_ys < forward
        assert max(to_y0, to_parameters, to_t / 10) < gradients


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_gpu_solves_a_program_as_its_f_is_solved(name):
    f, y0 = problem(name, 7)
    t = torch.tensor([0.1, 0.4, 1.0], dtype=torch.float64)
    on_gpu = tuple(x.cuda() for x in y0) if isinstance(y0, tuple) else y0.cuda()
    fused = ns.fuse(f.cuda(), on_gpu)
    smooth = name not in ("odds", "concat conv")
    for method in (*FIXED, *(IMPLICIT if smooth else ())):
        arguments = {"method": method, "steps": 2, "options": TIGHT if method in IMPLICIT else None}
        assert ns.backend(fused, on_gpu, **arguments).name == "fused"
        values, gradients = solved(fused.cuda(), on_gpu, t, **arguments)
        expected_values, expected_gradients = solved(f.cpu(), y0, t, **arguments)
        assert relative_error(values, expected_values) < 1e-12
        assert relative_error(gradients, expected_gradients) < 1e-10


@pytest.mark.cuda
def test_a_sample_of_several_blocks_has_the_bits_of_one_in_a_batch():
    f, y0 = ns.ConvDynamics(128).cuda(), torch.randn(300, 128, 14, 14, device="cuda")
    with torch.no_grad():
        alone, together = (ns.odeint(f, y, [0.0, 1.0], method="implicit_euler", steps=2) for y in (y0[:1], y0))
    assert torch.equal(alone, together[:, :1])


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(3, 16, 8, 8), (1, 128, 14, 14)], ids=str)
def test_solve_can_be_captured_in_a_cuda_graph(shape):
    f, y0 = ns.ConvDynamics(shape[1]).cuda(), torch.randn(shape, device="cuda")
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with torch.no_grad():
        expected = ns.odeint(f, y0, times, method="implicit_midpoint", steps=5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ys = ns.odeint(f, y0, times, method="implicit_midpoint", steps=5)
        graph.replay()
    assert torch.equal(ys, expected)
