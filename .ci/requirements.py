"""Print what pyproject.toml says nodeshape needs, or what its extra EXTRA adds: requirements.py [EXTRA]."""

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11
    from pip._vendor import tomli as tomllib

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
listed = project["optional-dependencies"][sys.argv[1]] if len(sys.argv) > 1 else project["dependencies"]
print("\n".join(requirement for requirement in listed if not requirement.startswith("nodeshape[")))
