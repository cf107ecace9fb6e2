"""What a model costs on a device: measured or remembered, for `forerun devices --model`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from forerun.apps.cli.progress import Reporter
from forerun.runtime.drafting.costs import DEEP, StepCosts, costs_key
from forerun.runtime.drafting.draft_costs import DraftCosts
from forerun.runtime.drafting.survey import (
    Bandwidth,
    measured_bandwidth,
    measured_drafters,
    measured_target,
)
from forerun.runtime.manifest import Manifest

_MEGA, _GIGA = 1e6, 1e9


@dataclass(frozen=True)
class ModelCosts:
    """What was measured of one model on one device.

    Attributes:
        model: as it was asked for.
        device: where it ran.
        threads: of its session.
        costs: of its steps.
        drafters: of those that are here for it.
        bandwidth: of this machine.
        manifest: of the model.
    """

    model: str
    device: str
    threads: int
    costs: StepCosts
    drafters: tuple[DraftCosts, ...]
    bandwidth: Bandwidth
    manifest: Manifest

    def as_json(self) -> dict[str, Any]:
        """Every figure; times in milliseconds, sizes in bytes, MB and GB of 10^6 and 10^9."""
        costs, plain = self.costs, self.costs.seconds[0][0]
        columns = list(zip(*costs.seconds, strict=True))
        return {
            "model": self.model,
            "device": self.device,
            "threads": self.threads,
            "depths": list(costs.depths),
            "steps": [
                {"rows": rows, "ms": [1e3 * t for t in times], "ratio": times[0] / plain}
                for rows, times in zip(costs.rows, columns, strict=True)
            ],
            "overhead_ms": 1e3 * costs.overhead,
            "drafters": [
                {
                    "drafter": row.name,
                    "device": row.device,
                    "call_ms": 1e3 * row.call_seconds,
                    "step_ms": 1e3 * row.step_seconds,
                    "c": row.seconds(4) / 4 / plain,
                }
                for row in self.drafters
            ],
            "bandwidth": {
                "gb_per_s": self.bandwidth.together / _GIGA,
                "one_thread_gb_per_s": self.bandwidth.alone / _GIGA,
                "step_gb_per_s": weight_bytes(self.manifest) / plain / _GIGA,
                "kappa": self.bandwidth.kappa,
            },
            "memory": {
                "weights_mb": weight_bytes(self.manifest) / _MEGA,
                "kv_bytes_per_token": self.manifest.kv.nbytes_per_token,
                "capacity": self.manifest.kv.capacity,
                "kv_mb": self.manifest.kv.nbytes / _MEGA,
            },
        }


def weight_bytes(manifest: Manifest) -> int:
    """Bytes of the weights, which a plain step reads once."""
    return max(entry.bytes for entry in manifest.files.values())


def measure_model(
    model: str, device: str, threads: int | None, show: Reporter, fresh: bool
) -> ModelCosts:
    """Measure what is not remembered.

    Args:
        model: name or folder of a bundle.
        device: a name of `forerun.devices.providers.PROVIDERS`.
        threads: of the session; None takes the best that was measured before.
        show: told of the progress.
        fresh: measure again what is remembered.

    Raises:
        UnknownModelError: there is no such model here.
        OptionError: the device is unknown, or `threads` is out of range.
        DeviceError: the device is not here.
        BundleError: the bundle is damaged, or has no form for the device.
        UnsupportedError: it is not a text model.
    """
    from forerun.devices.home import find_bundle
    from forerun.devices.providers import find_provider
    from forerun.devices.session import SessionOptions
    from forerun.errors import UnsupportedError
    from forerun.runtime.drafting.registry import DrafterContext
    from forerun.runtime.manifest import load_manifest
    from forerun.runtime.probe import best_threads

    find_provider(device)
    folder = find_bundle(model)
    manifest = load_manifest(folder)
    if manifest.kind != "text":
        raise UnsupportedError(f"{folder} is a {manifest.kind} model; a text model is needed here")
    manifest.check_files(folder)
    count = SessionOptions(threads=threads or best_threads(manifest)).resolved_threads()
    costs = measured_target(manifest, folder, device, count, show, DEEP, fresh)
    # One thread, as `--device auto` places them.
    context = DrafterContext(manifest, folder, threads=1)
    key = costs_key(manifest, "cpu", count)
    drafters = measured_drafters(context, key, show, fresh)
    bandwidth = measured_bandwidth(fresh)
    return ModelCosts(model, device, count, costs, tuple(drafters), bandwidth, manifest)
