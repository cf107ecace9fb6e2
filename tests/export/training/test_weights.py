"""Which bundles can be read for training."""

import shutil

import numpy as np
import pytest

from forerun.errors import UnsupportedError
from forerun.export.training.weights import BundleWeights
from forerun.quant.skip_graph import with_skipping


def test_weights_are_those_of_the_bundle(target_bundle):
    weights = BundleWeights(target_bundle.folder)
    sizes = target_bundle.manifest.model
    assert weights.embedding().shape == (sizes.vocab, sizes.hidden)
    np.testing.assert_array_equal(weights.matrix("down.0"), weights.array("down.0").T)


def test_a_bundle_that_can_skip_is_refused(target_bundle, tmp_path):
    folder = shutil.copytree(target_bundle.folder, tmp_path / "bundle")
    with_skipping(folder, "model.onnx")
    with pytest.raises(UnsupportedError, match=r"can skip .*; give the bundle .* without"):
        BundleWeights(folder)
