"""The revision of the recipe by which bundles are made, and which bundles are of an older one.

Raise `RECIPE` by one in the change that makes the exporter or the quantizer write something else
from the same weights, if those who have a bundle should get the new one: other graphs, another
KV layout, more roles, better numbers. `pull` then makes the bundles it installed again. Cards and
other text are no reason, and neither is a new architecture or format, of which no bundle is old.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forerun.runtime.manifest import Manifest

RECIPE = 3


def is_outdated(manifest: Manifest) -> bool:
    """Whether a bundle was made by an older recipe; one of a newer forerun is not outdated."""
    return manifest.recipe < RECIPE
