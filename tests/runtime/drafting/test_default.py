"""Without a wish, drafts are made exactly where they cannot change a bit of the text."""

import dataclasses

import pytest
from fakes import make_manifest

from forerun.runtime.drafting.choice import DEFAULT_DRAFTER, Drafters, default_drafter
from forerun.runtime.drafting.drafter import Drafter


@pytest.mark.parametrize("row_exact", [True, False])
def test_auto_is_the_default_of_row_exact_bundles_only(row_exact):
    manifest = dataclasses.replace(make_manifest(), row_exact=row_exact)
    asked = []

    def open_drafter(name) -> Drafter:
        asked.append(name)
        raise LookupError(name)

    drafters = Drafters(manifest, open_drafter, default=DEFAULT_DRAFTER)
    assert default_drafter(manifest) == ("auto" if row_exact else "none")
    assert default_drafter(manifest, "webgpu") == "none"
    if row_exact:
        with pytest.raises(LookupError):
            drafters.plan()
    else:
        assert drafters.plan() is None
    assert asked == (["auto"] if row_exact else [])
    assert drafters.plan("none") is None
