"""A WebGPU device for the tests: SwiftShader, a Vulkan driver in software, if there is no GPU.

`make test` lays it into build/swiftshader. With FORERUN_REQUIRE_GPU=1 a missing device fails the
tests instead of skipping them, so that CI cannot lose them unnoticed.
"""

import ctypes
import functools
import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "build" / "swiftshader"


def prepare():
    """Point this process and those it starts to the driver in `FOLDER`, if it is needed.

    Before anything loads the plugin, since that looks for devices only once.
    """
    loader = FOLDER / "libvulkan.so.1"
    if os.environ.get("VK_ICD_FILENAMES") or not loader.exists():
        return
    # In this process the plugin finds a loader that is there already, in others by their path.
    ctypes.CDLL(str(loader), mode=ctypes.RTLD_GLOBAL)
    paths = [str(FOLDER), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
    os.environ["VK_ICD_FILENAMES"] = str(FOLDER / "vk_swiftshader_icd.json")
    os.environ["ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"] = "1"


@functools.cache
def _missing():
    from forerun.devices.plugins import missing
    from forerun.devices.providers import find_provider

    return missing(find_provider("webgpu"))


def webgpu_or_skip():
    """Return the device's name, or skip (or fail, see above) with what is missing."""
    reason = _missing()
    if reason and os.environ.get("FORERUN_REQUIRE_GPU"):
        pytest.fail(f"{reason}; tests/swiftshader.sh fetches a software one", pytrace=False)
    if reason:
        pytest.skip(f"{reason}; tests/swiftshader.sh fetches a software one")
    return "webgpu"
