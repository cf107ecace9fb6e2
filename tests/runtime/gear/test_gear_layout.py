import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.errors import BundleError
from forerun.quant.gear import GEAR, gear_layout
from forerun.runtime.gear.compress import compress, decompress
from forerun.runtime.gear.layout import CHUNK, part_layouts
from forerun.runtime.manifest import KVLayout

SMOLLM2 = KVLayout(layers=30, heads=3, head_dim=64, capacity=8192)


@given(
    st.sampled_from(GEAR),
    st.integers(1, 3),
    st.sampled_from([2, 16, 64, 128]),
    st.integers(1, 2),
    st.sampled_from([0.0, 0.02, 0.1]),
    st.integers(0, 99),
)
def test_unpacking_gives_back_what_was_packed(kind, heads, head_dim, rank, outliers, seed):
    dense = KVLayout(layers=2, heads=heads, head_dim=head_dim, capacity=128)
    layout = gear_layout(dense, kind, rank=rank, outliers=outliers)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, heads, CHUNK, head_dim)).astype(np.float32)
    for part, sizes in part_layouts(layout).items():
        chunk = compress(x, sizes.form)
        tensors = sizes.pack(chunk)
        assert {k: (v.shape[1:], str(v.dtype)) for k, v in tensors.items()} == sizes.shapes, part
        back = sizes.unpack(tensors)
        for name, value in chunk.__dict__.items():
            got = getattr(back, name)
            assert got.dtype == value.dtype, name
            # A sixteenth of an outlier that is nearly nothing can fall below float16.
            np.testing.assert_allclose(got, value, rtol=1e-3, atol=2e-6, err_msg=name)
        assert sizes.nbytes == sum(v[0].nbytes for v in tensors.values())
        np.testing.assert_allclose(
            decompress(back, sizes.form, heads), decompress(chunk, sizes.form, heads), atol=1e-4
        )


@pytest.mark.parametrize("kind", ["gear-kcvt", "gear-kivi"])
def test_bytes_per_token_are_those_of_the_arrays_and_at_most_a_quarter(kind):
    layout = gear_layout(SMOLLM2, kind)
    chunk = 30 * sum(sizes.nbytes for sizes in part_layouts(layout).values())
    assert 0 <= layout.nbytes_per_token * CHUNK - chunk < CHUNK
    assert layout.nbytes_per_token <= 0.25 * SMOLLM2.nbytes_per_token
    assert (layout.bits, layout.group, layout.buffer, layout.rank) == (4, 64, 128, 4)
    assert layout.outliers == 0.04


def test_kcvt_shares_the_scales_of_a_token_over_its_heads():
    kcvt, kivi = (part_layouts(gear_layout(SMOLLM2, kind)) for kind in GEAR)
    assert kcvt["key"] == kivi["key"]
    assert (kcvt["value"].scales, kivi["value"].scales) == (CHUNK, 3 * CHUNK)


@pytest.mark.parametrize(
    "change",
    [{"kind": "gear-3"}, {"bits": 2}, {"group": 32}, {"rank": 0}, {"rank": 65}, {"head_dim": 63}],
)
def test_a_layout_of_another_version_is_refused(change):
    layout = dataclasses.replace(gear_layout(SMOLLM2, "gear-kivi"), **change)
    with pytest.raises(BundleError, match=r"quantize the model again|rank"):
        part_layouts(layout)
