"""Opening ONNX Runtime sessions; knows graphs and devices, but no manifests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnxruntime as ort

from forerun.devices.plugins import reason, whole_session
from forerun.devices.providers import find_provider
from forerun.devices.threads import default_threads
from forerun.errors import BundleError, OptionError

if TYPE_CHECKING:
    from pathlib import Path

_ERRORS_ONLY = 3


@dataclass(frozen=True)
class SessionOptions:
    """How a session is opened.

    Attributes:
        threads: intra-op threads; None takes `default_threads`.
        spin: waiting threads spin, which is fastest when nothing else wants the cores.
        profile: where ONNX Runtime writes a trace of every node (prefix of the file's name).
        config: further session configuration entries of ONNX Runtime.
        device: a name of `forerun.devices.providers.PROVIDERS`.
        axes: lengths of named axes of the graph. One file serves every length so, also on
            devices whose compiler needs all shapes.
    """

    threads: int | None = None
    spin: bool = True
    profile: Path | None = None
    config: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    axes: dict[str, int] = field(default_factory=dict)

    def resolved_threads(self) -> int:
        """The number of threads that will be used.

        Raises:
            OptionError: it is not positive.
        """
        threads = default_threads() if self.threads is None else self.threads
        if not 1 <= threads <= 1024:
            raise OptionError(f"threads must be in 1..1024, got {threads}")
        return threads


def open_session(graph: Path, options: SessionOptions) -> ort.InferenceSession:
    """Load a graph so that all of it runs on one device.

    Raises:
        BundleError: ONNX Runtime cannot load the graph on the CPU.
        DeviceError: the device is not here, or cannot run the whole graph.
        OptionError: the device is unknown.
    """
    row = find_provider(options.device)
    native = ort.SessionOptions()
    native.intra_op_num_threads = options.resolved_threads()
    native.inter_op_num_threads = 1
    native.log_severity_level = _ERRORS_ONLY
    native.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spin)))
    if options.profile is not None:
        native.enable_profiling = True
        native.profile_file_prefix = str(options.profile)
    for key, value in options.config.items():
        native.add_session_config_entry(key, value)
    for axis, length in options.axes.items():
        native.add_free_dimension_override_by_name(axis, length)
    if row.name != "cpu":
        return whole_session(str(graph), native, row)
    try:
        return ort.InferenceSession(str(graph), native, providers=[row.provider])
    except Exception as error:  # ONNX Runtime raises a class of its own for each status code
        raise BundleError(f"{graph} cannot be loaded ({reason(error)}); export it again") from error
