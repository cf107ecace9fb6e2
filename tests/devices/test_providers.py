"""The table of devices, what `--device` says, and errors where a device is missing."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from forerun.devices import plugins
from forerun.devices.providers import PROVIDERS, find_provider
from forerun.devices.request import DeviceRequest, parse_devices
from forerun.devices.session import SessionOptions, open_session
from forerun.devices.table import list_devices
from forerun.errors import DeviceError, OptionError

UNTESTED = ("cuda", "tensorrt-rtx", "directml", "coreml", "openvino", "xnnpack")


def graph_of(op):
    x, y = (helper.make_tensor_value_info(name, 1, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()


def test_rows():
    assert set(PROVIDERS) == {"cpu", "webgpu", "qnn", *UNTESTED}
    for name, row in PROVIDERS.items():
        assert row.name == name and row.form and row.needs
        assert row.tested == (name not in UNTESTED)
        assert row.memory in ("host", "device") and row.dtypes and row.kv
        assert name == "cpu" or row.install
        assert row.holds.endswith("static shapes" if row.static_shapes else "any shapes")


def test_unknown_device():
    with pytest.raises(OptionError, match="'gpu' is unknown; there are cpu, webgpu, qnn, cuda"):
        find_provider("gpu")


@pytest.mark.parametrize(
    ("text", "target", "draft"),
    [
        ("cpu", "cpu", "cpu"),
        ("webgpu", "webgpu", "cpu"),
        ("auto", None, None),
        ("target=webgpu,draft=cpu", "webgpu", "cpu"),
        (" draft = webgpu ", "cpu", "webgpu"),
        ("draft=qnn,target=auto", None, "qnn"),
    ],
)
def test_what_device_says(text, target, draft):
    assert parse_devices(text) == DeviceRequest(target, draft)


@pytest.mark.parametrize(
    "text",
    ["", "gpu", "target=gpu", "target=", "main=cpu", "target=cpu,target=cpu", "target=cpu,webgpu"],
)
def test_what_device_may_not_say(text):
    with pytest.raises(OptionError, match="device"):
        parse_devices(text)


def test_the_list_tells_what_each_needs(monkeypatch):
    monkeypatch.setattr(
        plugins, "missing", lambda row: "" if row.name == "cpu" else f"{row.name} is not here"
    )
    rows = {row.name: row for row in list_devices()}
    assert set(rows) == set(PROVIDERS)
    assert rows["cpu"].available and "threads by default" in rows["cpu"].detail
    assert not rows["cuda"].available and rows["cuda"].detail == "cuda is not here"
    assert not rows["cuda"].tested and "float16" in rows["cuda"].holds


def test_a_missing_plugin_says_what_to_install(monkeypatch):
    monkeypatch.setattr(plugins, "_registered", set())
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime_ep_webgpu", None)
    with pytest.raises(DeviceError, match="pip install onnxruntime-ep-webgpu"):
        plugins.plugin_device(find_provider("webgpu"))


def test_a_missing_build_says_what_to_install(tmp_path):
    path = tmp_path / "neg.onnx"
    path.write_bytes(graph_of("Neg"))
    with pytest.raises(DeviceError, match="pip install onnxruntime-gpu"):
        open_session(path, SessionOptions(device="cuda"))


class Elsewhere:
    """A session that ONNX Runtime gave, part of which runs on the CPU."""

    def __init__(self, *args, **kwargs):
        assert kwargs["enable_fallback"] == 0, "the constructor must not retry on the CPU"

    def get_provider_graph_assignment_info(self):
        node = type("Node", (), {"op_type": "Softmax"})()
        return [
            type("Part", (), {"ep_name": "CPUExecutionProvider", "get_nodes": lambda _: [node]})()
        ]


def test_nodes_on_the_cpu_are_refused(monkeypatch):
    row = find_provider("cuda")
    monkeypatch.setattr(ort, "get_available_providers", lambda: [row.provider])
    monkeypatch.setattr(ort, "InferenceSession", Elsewhere)
    options = ort.SessionOptions()
    with pytest.raises(DeviceError, match=r"cuda leaves 1 nodes to the CPU \(Softmax\)"):
        plugins.whole_session(b"", options, row)
    assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


@pytest.mark.gpu
def test_webgpu_runs_all_or_refuses(webgpu, tmp_path):
    path = tmp_path / "graph.onnx"
    path.write_bytes(graph_of("Neg"))
    session = open_session(path, SessionOptions(device=webgpu))
    assert session.run(None, {"x": np.ones(1, np.float32)})[0] == -1
    path.write_bytes(graph_of("Hardmax"))
    with pytest.raises(DeviceError, match="CPU"):
        open_session(path, SessionOptions(device=webgpu))
    assert any(row.name == webgpu and row.available for row in list_devices())


@pytest.mark.gpu
def test_the_plugin_is_registered_once(webgpu):
    row = find_provider(webgpu)
    assert plugins.plugin_device(row).ep_name == plugins.plugin_device(row).ep_name == row.provider
    assert row.provider in plugins._registered
    value = plugins.allocate(row, (2, 3), "float32")
    assert value.shape() == [2, 3] and not value.numpy().any()


def test_the_smallest_graph_is_one():
    model = onnx.load_from_string(plugins._SMALLEST_GRAPH)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["Neg"]
