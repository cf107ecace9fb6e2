"""Tiny bundles with a cache in GEAR's form, and what such a cache stands for."""

import numpy as np
from tiny import tiny_bundle

from forerun.quant.gear import GEAR, with_gear
from forerun.runtime.gear.compress import decompress
from forerun.runtime.gear.layout import CHUNK, part_layouts
from forerun.runtime.gear.runner import GearRunner
from forerun.runtime.layouts import choose_layout
from forerun.runtime.runner import Runner


def gear_bundle(folder, arch="llama", **settings):
    """(manifest of the dense bundle, kind to manifest of its forms of GEAR, folder)."""
    manifest, bundle = tiny_bundle(arch, folder, **{"capacity": 512, "context": 1024, **settings})
    full = with_gear(bundle, manifest)
    return manifest, {kind: view(full, kind) for kind in GEAR}, bundle


def view(manifest, kind):
    """What the runtime makes of the choice of a layout."""
    return choose_layout(manifest, kind)


def dense_runner(bundle, manifest):
    return Runner(manifest, bundle, threads=1)


def gear_runner(bundle, manifest):
    return GearRunner(manifest, bundle, threads=1)


def contents(arena):
    """``PART`` to float32 [layers, heads, length, head_dim]: what the cache stands for."""
    layout, found = arena.layout, {}
    for part, sizes in part_layouts(layout).items():
        pieces = []
        for chunk in range(arena.compressed):
            tensors = {
                kind: np.stack(
                    [arena.chunks[f"{part}_{kind}.{n}"][chunk] for n in range(layout.layers)]
                )
                for kind in sizes.shapes
            }
            pieces.append(decompress(sizes.unpack(tensors), sizes.form, layout.heads))
        count = arena.length - arena.compressed * CHUNK
        rows = np.stack([arena.rows[f"{part}.{n}"] for n in range(layout.layers)])
        rows = rows[:, arena.offset : arena.offset + count]
        pieces.append(rows.reshape(*rows.shape[:2], layout.heads, layout.head_dim).swapaxes(1, 2))
        found[part] = np.concatenate(pieces, 2)
    return found


def fill(runner, arena):
    """Let the cache of a dense runner hold what one in GEAR's form stands for."""
    for part, values in contents(arena).items():
        for layer, rows in enumerate(values):
            runner.arena.arrays[f"{part}.{layer}"][0, :, : arena.length] = rows
    runner.arena.length, runner.arena.pending = arena.length, 0
