import signal
import sys
from pathlib import Path

import pytest

# Helpers shared by all test folders (tiny.py, fakes.py) are imported by name.
sys.path.insert(0, str(Path(__file__).parent))

# A job in the background may ignore Ctrl-C, and programs that the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


import gpu
import needs

gpu.prepare()


def pytest_configure(config):
    if reason := needs.refusal():
        raise pytest.UsageError(reason)


@pytest.fixture(scope="session")
def webgpu():
    """The name of the device; the test is skipped where there is none, see `gpu`."""
    return gpu.webgpu_or_skip()
