"""Providers on this machine: loading a plugin once per process, its devices and their memory."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from forerun.errors import DeviceError

if TYPE_CHECKING:
    from forerun.devices.providers import Provider

# A graph of one node (y = -x, one float), to see whether a device opens at all.
_SMALLEST_GRAPH = bytes.fromhex(
    "08 0a 3a 32 0a 0b 0a 01 78 12 01 79 22 03 4e 65 67 12 01 67 5a 0f 0a 01 78 12 0a 0a 08"
    "08 01 12 04 0a 02 08 01 62 0f 0a 01 79 12 0a 0a 08 08 01 12 04 0a 02 08 01 42 04 0a 00 10 15"
)
_ERRORS_ONLY = 3
_WITHOUT_FALLBACK = {
    "session.disable_cpu_ep_fallback": "1",
    "session.record_ep_graph_assignment_info": "1",
}
_lock = threading.Lock()
_registered: set[str] = set()


def whole_session(graph: str | bytes, native: Any, row: Provider) -> ort.InferenceSession:
    """Open a session of which every node runs on one provider.

    Args:
        graph: path, or the serialized model.
        native: `onnxruntime.SessionOptions`; the provider is added to it.
        row: the provider, not the CPU.

    Raises:
        DeviceError: the provider is not here, does not open, or leaves nodes to the CPU.
    """
    for key, value in _WITHOUT_FALLBACK.items():
        native.add_session_config_entry(key, value)
    more: dict[str, Any] = {}
    if row.module:
        native.add_provider_for_devices([plugin_device(row)], provider_options(row))
    else:
        _require_builtin(row)
        more["providers"] = [(row.provider, provider_options(row))]
    try:
        with messages_on_stderr():
            # Without enable_fallback=0 the constructor tries again on the CPU by itself.
            session = ort.InferenceSession(graph, native, enable_fallback=0, **more)
    except Exception as error:  # ONNX Runtime raises a class of its own for each status code
        raise DeviceError(f"{row.name} cannot run the graph ({reason(error)})") from error
    _require_all_nodes(session, row)
    return session


def _require_all_nodes(session: Any, row: Provider) -> None:
    elsewhere = [
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != row.provider
        for node in part.get_nodes()
    ]
    if elsewhere:
        raise DeviceError(
            f"{row.name} leaves {len(elsewhere)} nodes to the CPU "
            f"({', '.join(sorted(set(elsewhere)))}); such a mix is not run"
        )


def plugin_device(row: Provider) -> Any:
    """The first device of a plugin; the plugin is loaded when it is first asked for.

    Raises:
        DeviceError: the plugin is not installed, or finds no device.
    """
    with _lock:
        if row.provider not in _registered:
            _register(row)
        found = [device for device in ort.get_ep_devices() if device.ep_name == row.provider]
    if not found:
        raise DeviceError(f"{row.name} finds no device here; it needs {row.needs}")
    return found[0]


def _register(row: Provider) -> None:
    try:
        plugin = importlib.import_module(row.module)
    except Exception as error:
        raise DeviceError(
            f"{row.name} needs {row.needs}, and its plugin: {row.install} ({reason(error)})"
        ) from None
    known = {device.ep_name for device in ort.get_ep_devices()}
    if row.provider not in known:
        # A plugin greets with warnings about the machine, which are no news for an answer.
        ort.set_default_logger_severity(_ERRORS_ONLY)
        try:
            ort.register_execution_provider_library(row.provider, plugin.get_library_path())
        except Exception as error:
            raise DeviceError(f"{row.name}'s plugin does not load ({reason(error)})") from error
    _registered.add(row.provider)


def _require_builtin(row: Provider) -> None:
    if row.provider not in ort.get_available_providers():
        raise DeviceError(
            f"{row.name} is not in this ONNX Runtime; it needs {row.needs}: {row.install}"
        )


def provider_options(row: Provider) -> dict[str, str]:
    """Options of a provider on this machine."""
    if row.name == "qnn" and platform.machine().lower() in ("x86_64", "amd64"):
        # The simulator has to be told which chip it is, or it misreports operators as too large.
        return row.options | {"htp_arch": "75", "soc_model": "60"}
    return dict(row.options)


def missing(row: Provider) -> str:
    """Why no session can be opened on a provider here; empty if one can.

    A plugin that lists a device may still fail to open it, so the smallest graph is tried.
    """
    if row.name == "cpu":
        return ""
    try:
        whole_session(_SMALLEST_GRAPH, ort.SessionOptions(), row)
    except DeviceError as error:
        return str(error)
    return ""


def allocate(row: Provider, shape: tuple[int, ...], dtype: str) -> ort.OrtValue:
    """A tensor of zeros in the memory of a device.

    Raises:
        DeviceError: there is no room for it, as far as the device tells at once.
    """
    kind = np.dtype(dtype)
    try:
        if row.module:
            place = plugin_device(row).memory_info(ort.OrtDeviceMemoryType.DEFAULT)
            return ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, memory_info=place)
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, row.memory_name, 0)
    except DeviceError:
        raise
    except Exception as error:
        raise DeviceError(f"{row.name} has no room for the KV cache ({reason(error)})") from error


@contextlib.contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Send what native code prints to standard error; standard output belongs to the answer."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def reason(error: Exception) -> str:
    """The first 200 characters of an error, on one line."""
    return " ".join(str(error).split())[:200]
