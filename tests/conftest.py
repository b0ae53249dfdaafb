"""How the tests run: on every core, the slow ones apart, hypothesis without chance, and no test skipped unseen."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are many and small: threads would only wait for each other

import re
import signal
from pathlib import Path

import hypothesis
import pytest
import torch

#: Why a run with --strict-skips may skip a test, by the reason that the skip gives (a regular expression).
ALLOWED_SKIPS = {
    r"needs a GPU: ": "machines of CI have none; the same kernels run in tests/test_cuda_kernels.py, on the CPU",
    r"no onnxruntime of that age": "a Python newer than the test knows has none of the time of opset 18",
    r"needs glibc's mallinfo2": "older systems, and others than Linux, do not say how much malloc has given out",
    r"could not import 'torchsde'": "a rival whose last release is of 2023; the orders are measured without it",
    r"needs libnodeshape_onnxruntime\.so": "few have onnxruntime's headers; CI builds it at night and tests it then",
    r"needs an adapter for WebGPU": "not every Chromium plays one on the CPU; the fall back is tested by stand-ins",
    r"run by tests/test_cuda_kernels\.py": "and is run there, in a process of its own",
}

# The same examples in every run, so that a run fails for what has changed and for nothing else. The nightly profile
# looks further: `pytest --hypothesis-profile=nightly --hypothesis-seed=SEED` repeats one of its runs.
hypothesis.settings.register_profile("quick", max_examples=25, derandomize=True, deadline=None)
hypothesis.settings.register_profile("nightly", max_examples=400, derandomize=False, deadline=None, print_blob=True)
hypothesis.settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--strict-skips", action="store_true", help="fail if a test is skipped that ALLOWED_SKIPS lacks")
    parser.addoption(
        "--cuda-on-host", metavar="LIBRARY", help="run the CUDA kernels' build for the CPU as the fused solver"
    )


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of what a shell runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    library = config.getoption("--cuda-on-host")
    if library:
        import nodeshape._ode.fused  # noqa: F401  (its library defines the ops that this one overrides)

        torch.ops.load_library(library)
        os.environ.setdefault("NODESHAPE_TEST_ISAS", "cuda")  # read by fused_reference.py


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """None of its own for a run of named files, which would end before other processes have imported torch."""
    named_files = all(Path(argument.split("::")[0]).suffix == ".py" for argument in config.args)
    return 0 if named_files else None  # as many as there are cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_cuda = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(skip_cuda)


def unexpected_skips(config: pytest.Config) -> list[str]:
    """What --strict-skips objects to, a line per test."""
    if not config.getoption("--strict-skips") or hasattr(config, "workerinput"):  # workers report to the controller
        return []
    reports = config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])
    reasons = [(report.nodeid, report.longrepr[2].removeprefix("Skipped: ")) for report in reports]
    return [f"{test}: {why}" for test, why in reasons if not any(re.match(allowed, why) for allowed in ALLOWED_SKIPS)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.exitstatus == pytest.ExitCode.OK and unexpected_skips(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := unexpected_skips(config):
        terminalreporter.section("skipped, and not in ALLOWED_SKIPS of tests/conftest.py", red=True)
        for line in lines:
            terminalreporter.line(line)
