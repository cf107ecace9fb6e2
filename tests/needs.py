"""Packages without which some tests are skipped, unless a variable forbids that.

With FORERUN_REQUIRE_NPU=1 or FORERUN_REQUIRE_TORCH=1 no test is run where the package is missing,
so that CI cannot lose the tests that need it unnoticed. For FORERUN_REQUIRE_GPU see `gpu`.
"""

import importlib
import os

REQUIRED = {"FORERUN_REQUIRE_NPU": "onnxruntime_qnn", "FORERUN_REQUIRE_TORCH": "torch"}


def refusal(environment=os.environ):
    """Why the tests must not run; empty if they may."""
    wanted = [(name, package) for name, package in REQUIRED.items() if environment.get(name)]
    for name, package in wanted:
        try:
            importlib.import_module(package)
        except ImportError as error:
            return f"{name} is set, and {package} cannot be imported: {error}"
    return ""
