"""Tests that must not be skipped make the whole run fail where their package is missing."""

import sys
from pathlib import Path

import needs
import pytest

TESTS = Path(__file__).resolve().parent


@pytest.mark.parametrize("name", needs.REQUIRED)
def test_a_required_package_is_not_optional(name, request, monkeypatch):
    start = next(
        plugin.pytest_configure
        for plugin in request.config.pluginmanager.get_plugins()
        if getattr(plugin, "__file__", None) == str(TESTS / "conftest.py")
    )
    for variable, package in needs.REQUIRED.items():
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.setitem(sys.modules, package, None)
    start(request.config)
    monkeypatch.setenv(name, "1")
    with pytest.raises(pytest.UsageError, match=f"{name} is set, and {needs.REQUIRED[name]}"):
        start(request.config)


def test_ci_requires_what_it_installs():
    ci = (TESTS.parent / ".ci" / "run").read_text("utf-8")
    for name in ("FORERUN_REQUIRE_GPU", "FORERUN_REQUIRE_NPU", "FORERUN_REQUIRE_TORCH"):
        assert f"{name}=1" in ci, f"nothing would notice that the tests of {name} are skipped"
