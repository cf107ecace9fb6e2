"""Opening ONNX Runtime sessions; knows graphs and devices, but no manifests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnxruntime as ort

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
    """

    threads: int | None = None
    spin: bool = True
    profile: Path | None = None
    config: dict[str, str] = field(default_factory=dict)

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
    """Load a graph on the CPU.

    Raises:
        BundleError: ONNX Runtime cannot load the graph.
    """
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
    try:
        return ort.InferenceSession(str(graph), native, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a class of its own for each status code
        reason = " ".join(str(error).split())[:200]
        raise BundleError(f"{graph} cannot be loaded ({reason}); export it again") from error
