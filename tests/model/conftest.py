"""The installed bundles of the default model; a test that lacks one fails and says what to do."""

import pytest

import forerun
from forerun.devices.home import find_bundle
from forerun.errors import UnknownModelError

NAME = "smollm2-135m"


def installed(variant):
    try:
        return find_bundle(f"{NAME}:{variant}")
    except UnknownModelError as error:
        reason = str(error)
    pytest.fail(
        f"{reason}. These tests need real weights: run `forerun pull {NAME} --variant {variant}`, "
        'or leave them out with pytest -m "not model"',
        pytrace=False,
    )


@pytest.fixture(scope="session")
def folder():
    """The int4 bundle."""
    return installed("int4")


@pytest.fixture(scope="session")
def exact():
    """The row-exact bundle; its blocks of 32 have the faster kernels on GPUs, too."""
    return installed("int4-exact")


@pytest.fixture(scope="session")
def loaded(folder):
    with forerun.load(folder) as text:
        yield text


@pytest.fixture
def text(loaded):
    """The int4 model, with nothing in its KV cache."""
    loaded.session().reset()
    return loaded


@pytest.fixture(scope="session")
def loaded_fp32():
    with forerun.load(installed("fp32")) as text:
        yield text


@pytest.fixture
def fp32(loaded_fp32):
    """The float32 model, with nothing in its KV cache."""
    loaded_fp32.session().reset()
    return loaded_fp32
