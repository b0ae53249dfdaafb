"""Print the licence of each package of this environment; exit 1 if one is none of those that we depend on."""

import re
import sys
from importlib.metadata import Distribution, distributions

#: Licences that let a program of any licence use the package as it is.
ALLOWED = (
    r"\b(MIT|BSD|0BSD|Apache|Python Software Foundation|PSF-2\.0|MPL|Mozilla Public|Zlib|CC0|HPND|ISC|BSL-1\.0"
    r"|Unlicense|Public Domain)"
)
#: Packages whose metadata says nothing that can be read, and what their licence is.
KNOWN = {"setuptools": "MIT"}
#: Packages with another licence that nothing we ship needs: docutils, of the documentation, has one file under the GPL.
APART = ("docutils ",)


def licence(package: Distribution) -> str:
    """What a package's metadata says: an SPDX expression, a classifier, or the first line of a text."""
    said = package.metadata
    classifiers = [x.split(" :: ")[-1] for x in said.get_all("Classifier") or [] if x.startswith("License :: ")]
    named = " AND ".join(x for x in classifiers if x != "OSI Approved")
    text = (said.get("License") or "").strip().splitlines()
    return said.get("License-Expression") or named or (text[0] if text else KNOWN.get(said["Name"], "none said"))


found = {f"{x.metadata['Name']} {x.version}": licence(x) for x in distributions()}
for name, said in sorted(found.items(), key=lambda pair: pair[0].lower()):
    print(f"{name:40} {said}")
refused = [
    name
    for name, said in found.items()
    if not name.startswith(("nodeshape ", "nvidia-", "cuda-", *APART))  # NVIDIA's own come with torch's CUDA build
    and not all(re.search(ALLOWED, part) for part in re.split(r" AND | and |; ", said))
]
if refused:
    sys.exit(f"licences to look at: {', '.join(refused)}")
