"""How many tokens fit into a number of bytes, and a bundle whose KV cache is that long."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from forerun.devices.providers import find_provider
from forerun.errors import BundleError, OptionError
from forerun.runtime.layouts import LAYOUTS, layout_name

if TYPE_CHECKING:
    from forerun.runtime.manifest import KVLayout, Manifest

LEAST_TOKENS = 64
_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")
_FLOAT = np.dtype(np.float32).itemsize


def parse_size(text: str, option: str = "the KV budget") -> int:
    """Bytes of a size with a unit, e.g. ``64MB``, ``64MiB`` or ``1.5GB``.

    Args:
        text: what was given.
        option: how the error names it.

    Raises:
        OptionError: it is no number with a unit, or less than one byte.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None or float(match.group(1)) * unit < 1:
        raise OptionError(
            f"{option} is {text!r}; it must be a size with a unit, like 64MB, 64MiB or 1.5GB"
        )
    return int(float(match.group(1)) * unit)


@dataclass(frozen=True)
class KVPlan:
    """A length of the KV cache.

    Attributes:
        layout: with that capacity.
        nbytes: of all its keys and values.
        is_capped: the budget would have been enough for more.
    """

    layout: KVLayout
    nbytes: int
    is_capped: bool

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.layout.capacity

    @property
    def text(self) -> str:
        """One line for people."""
        row = LAYOUTS[layout_name(self.layout)]
        line = (
            f"KV cache: {row.text}, {self.capacity:,} tokens in {self.nbytes / 1e6:.1f} MB "
            f"({self.layout.nbytes_per_token:,} bytes a token)"
        )
        return f"{line}; the model reaches no further" if self.is_capped else line


def plan_capacity(layout: KVLayout, budget: int) -> KVPlan:
    """Find the longest KV cache within a budget.

    Args:
        layout: of the bundle; its capacity is the most the graphs can reach.
        budget: bytes.

    Raises:
        OptionError: not even `LEAST_TOKENS` fit.
    """
    fixed = buffer_bytes(layout)
    fitting = (budget - fixed) // layout.nbytes_per_token
    least = min(LEAST_TOKENS, layout.capacity)
    if fitting < least:
        needed = fixed + least * layout.nbytes_per_token
        raise OptionError(
            f"a KV budget of {budget:,} bytes is too small: {least} tokens in the layout "
            f"{layout_name(layout)} need {needed:,} bytes; give at least {_rounded(needed)}, "
            "or choose a smaller layout"
        )
    capacity = min(fitting, layout.capacity)
    nbytes = fixed + capacity * layout.nbytes_per_token
    sized = replace(layout, capacity=capacity)
    return KVPlan(sized, nbytes, fitting > layout.capacity)


def buffer_bytes(layout: KVLayout) -> int:
    """Bytes of the newest tokens that a form of GEAR keeps in float32 beside its codes."""
    return 2 * layout.layers * layout.heads * layout.head_dim * layout.buffer * _FLOAT


def with_capacity(manifest: Manifest, capacity: int, device: str = "cpu") -> Manifest:
    """The manifest with a KV cache of another length.

    Args:
        manifest: whose `kv` is the layout that will run, see `layouts.choose_layout`.
        capacity: tokens.
        device: where it will run.

    Raises:
        OptionError: the capacity is none that the graphs can reach, or the form's is fixed.
        BundleError: the bundle is of a time when every form's was fixed.
    """
    if not 1 <= capacity <= manifest.kv.capacity:
        raise OptionError(
            f"the KV cache can have 1 to {manifest.kv.capacity} tokens, not {capacity}"
        )
    form = manifest.lowerings.get(find_provider(device).form)
    fixed = [
        spec.shape[2]
        for role, spec in (form.inputs if form else {}).items()
        if role.startswith("past_") and isinstance(spec.shape[2], int)
    ]
    if fixed and fixed[0] != capacity:
        if device != "cpu":
            raise OptionError(
                f"the KV cache on {device} has {fixed[0]} tokens and no other size; leave its "
                "size alone, or use the cpu"
            )
        raise BundleError(
            f"the bundle's KV cache has {fixed[0]} tokens and no other size; "
            "export it again, or pull it with --force"
        )
    return replace(manifest, kv=replace(manifest.kv, capacity=capacity))


def _rounded(nbytes: int) -> str:
    """A size a user can type, not below `nbytes`."""
    unit = "KB" if nbytes < _UNITS["MB"] else "MB"
    tenths = -(-10 * nbytes // _UNITS[unit])
    return f"{tenths / 10}{unit}"
