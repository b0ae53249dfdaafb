"""Compile every .cu file with nvcc, warnings as errors; print ptxas' report and fail if a hot kernel spills.

Hot are all kernels, and functions that they call, but the float64 backward kernels, which check gradients and need all
the registers that a thread has, and the backward kernels of programs, which spill what has to outlive a call.

    python .ci/compile_cuda.py [--quick] [--json FILE] [ARCHITECTURE ...]

FILE gets the report, for ``benchmarks/cuda_roofline.py``. With ``--quick`` code is hardly optimised, which takes a
third of the time and says nothing of registers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("sm_80", "sm_90")
FLAGS = ["-std=c++20", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin", "-o", os.devnull]
QUICK = ["-Xcicc", "-O1", "-Xptxas", "-O0"]
Kernel = dict[str, str | int]


def find_nvcc() -> str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ] + ["/usr/local/cuda"]
    found = next(filter(None, map(shutil.which, ("nvcc", *(f"{home}/bin/nvcc" for home in homes)))), None)
    if found is None:
        sys.exit("nvcc was not found: put it on the PATH or set CUDA_HOME")
    return found


def compile(nvcc: str, source: Path, architecture: str, quick: bool) -> list[Kernel]:
    """What ptxas says of each kernel of a file, and of each function that is called: those have no registers."""
    command = [nvcc, *FLAGS, *(QUICK if quick else []), f"-arch={architecture}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{source.name} for {architecture}:\n{done.stdout}{done.stderr}")
    text = subprocess.run(
        ["c++filt"], input=done.stdout + done.stderr, capture_output=True, text=True, check=True
    ).stdout
    return [
        {
            "kernel": re.sub(r"nodeshape::|cuda::|void |\(.*", "", name),
            "file": source.name,
            "architecture": architecture,
            "registers": int(registers or 0),
            "stack": int(stack),
            "spilled": int(stores) + int(loads),
        }
        for name, stack, stores, loads, registers in re.findall(
            r"Function properties for (.*)\n"
            r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
            r"(?:\n.*Used (\d+) registers)?",
            text,
        )
    ]


def is_hot(kernel: str) -> bool:
    return not (kernel.startswith("backward_kernel") and ("<double>" in kernel or "ProgramDynamics" in kernel))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="look for errors and warnings alone")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, help="of sm_80 and sm_90, the default")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    jobs = [(source, name) for source in sorted((ROOT / "csrc/cuda").glob("*.cu")) for name in arguments.architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        functions = [one for found in pool.map(lambda job: compile(nvcc, *job, arguments.quick), jobs) for one in found]
    kernels = [one for one in functions if one["registers"]]
    if not any("forward_kernel" in str(kernel["kernel"]) for kernel in kernels):
        sys.exit("ptxas reported no forward_kernel: has its output changed?")
    if arguments.quick:
        print(f"{len(kernels)} kernels for {', '.join(arguments.architectures)} compile without a warning")
        return
    print(f"{'kernel':<60}{'':<8}{'registers':>10}{'stack':>8}{'spilled bytes':>15}")
    for k in kernels:
        print(f"{k['kernel']:<60}{k['architecture']:<8}{k['registers']:>10}{k['stack']:>8}{k['spilled']:>15}")
    if arguments.json:
        arguments.json.write_text(json.dumps(kernels, indent=1) + "\n")
    spilling = [f"{k['kernel']} ({k['architecture']})" for k in functions if k["spilled"] and is_hot(str(k["kernel"]))]
    if spilling:
        sys.exit(f"register spills in {', '.join(spilling)}")


if __name__ == "__main__":
    main()
