from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are many and small: threads would only wait for each other

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")
    parser.addoption(
        "--cuda-on-host", metavar="LIBRARY", help="run the CUDA kernels' build for the CPU as the fused solver"
    )


def pytest_configure(config: pytest.Config) -> None:
    library = config.getoption("--cuda-on-host")
    if library:
        import nodeshape._ode.fused  # noqa: F401  (its library defines the ops that this one overrides)

        torch.ops.load_library(library)
        os.environ.setdefault("NODESHAPE_TEST_ISAS", "cuda")  # read by fused_reference.py


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip_slow = pytest.mark.skip(reason="slow: run with --slow")
    skip_cuda = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(skip_slow)
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(skip_cuda)
