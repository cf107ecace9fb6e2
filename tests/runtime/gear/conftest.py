import pytest
from gear_tools import gear_bundle


@pytest.fixture(scope="session")
def gear_tiny(tmp_path_factory):
    """(dense manifest, kind to manifest, folder) of a tiny llama."""
    return gear_bundle(tmp_path_factory.mktemp("gear"))
