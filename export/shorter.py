"""The first layers of a model as a source of their own, to try a device with a small graph."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from forerun.errors import OptionError

if TYPE_CHECKING:
    import numpy as np

    from forerun.export.sources import ModelConfig, WeightSource
    from forerun.export.tokenizer import TokenizerSource

_LAYER = "model.layers."


class FirstLayers:
    """A source without the later layers of another.

    What it computes is real arithmetic on real weights, but no longer the model: the text means
    nothing. The origin in the manifest says so.

    Args:
        source: the whole model.
        layers: how many to keep.

    Raises:
        OptionError: the model has fewer.
    """

    def __init__(self, source: WeightSource, layers: int) -> None:
        whole = source.config.layers
        if not 1 <= layers <= whole:
            raise OptionError(f"the model has {whole} layers; keep 1 to {whole}, not {layers}")
        self._source = source
        self.config: ModelConfig = dataclasses.replace(
            source.config, layers=layers, layer_window=source.config.layer_window[:layers]
        )
        self.origin = f"{source.origin} (the first {layers} of {whole} layers)"

    @property
    def sha256(self) -> str:
        """SHA-256 of the whole source."""
        return self._source.sha256

    def names(self) -> frozenset[str]:
        """Names of the tensors that are left."""
        return frozenset(name for name in self._source.names() if self._kept(name))

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as float32."""
        return self._source.tensor(name)

    def tokenizer_files(self) -> TokenizerSource:
        """The tokenizer of the whole model."""
        return self._source.tokenizer_files()

    def _kept(self, name: str) -> bool:
        if not name.startswith(_LAYER):
            return True
        return int(name[len(_LAYER) :].partition(".")[0]) < self.config.layers
