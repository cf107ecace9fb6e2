"""The execution providers forerun knows: what each is, what it holds, where it comes from.

Which operators and layouts a row holds was found by running it where `tested` says so, and read
in ONNX Runtime's documentation otherwise. Either way a session is refused when the provider
leaves a single node to the CPU, so a wrong row gives an error and never a slow answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from forerun.errors import OptionError


@dataclass(frozen=True)
class Provider:
    """One execution provider of ONNX Runtime.

    Attributes:
        name: what `--device` calls it.
        provider: ONNX Runtime's name; a plugin is registered under it too.
        form: the lowering that a bundle needs to run there.
        module: package of the plugin; empty for a provider that is part of ONNX Runtime's wheel.
        install: what makes the provider appear on a machine that has the hardware.
        options: of the provider.
        memory: ``host``, or ``device`` when the KV cache must lie there.
        memory_name: what ONNX Runtime calls that memory, for providers that are no plugin.
        dtypes: of activations in the graphs that run there.
        kv: dtypes of the KV cache it attends over.
        static_shapes: every axis must have a number before the graph is compiled.
        needs: the hardware or driver it is for.
        tested: it was run for this version; other rows are written after the documentation.
    """

    name: str
    provider: str
    form: str
    module: str = ""
    install: str = ""
    options: dict[str, str] = field(default_factory=dict)
    memory: str = "host"
    memory_name: str = ""
    dtypes: tuple[str, ...] = ("float32",)
    kv: tuple[str, ...] = ("float32",)
    static_shapes: bool = False
    needs: str = ""
    tested: bool = False

    @property
    def holds(self) -> str:
        """What it can hold, in a few words."""
        shapes = "static shapes" if self.static_shapes else "any shapes"
        return f"{'/'.join(self.dtypes)}, KV {'/'.join(self.kv)} on the {self.memory}, {shapes}"


_ROWS = (
    Provider(
        "cpu",
        "CPUExecutionProvider",
        "cpu",
        kv=("float32", "float16", "int8", "uint8"),
        needs="any processor",
        tested=True,
    ),
    Provider(
        "webgpu",
        "WebGpuExecutionProvider",
        "webgpu",
        module="onnxruntime_ep_webgpu",
        install="pip install onnxruntime-ep-webgpu",
        memory="device",
        dtypes=("float32", "float16"),
        needs="a GPU with a Vulkan, Metal or Direct3D 12 driver (software ones count if "
        "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1)",
        tested=True,
    ),
    Provider(
        "qnn",
        "QNNExecutionProvider",
        "npu",
        module="onnxruntime_qnn",
        install="pip install onnxruntime-qnn",
        options={"backend_type": "htp"},
        dtypes=("float16", "uint16"),
        kv=("float16", "uint8"),
        static_shapes=True,
        needs="a Qualcomm NPU, or its simulator on x86",
        tested=True,
    ),
    Provider(
        "cuda",
        "CUDAExecutionProvider",
        "webgpu",
        install="pip install onnxruntime-gpu, in place of onnxruntime",
        memory="device",
        memory_name="cuda",
        dtypes=("float32", "float16", "bfloat16"),
        kv=("float16", "bfloat16", "int8"),
        needs="an NVIDIA GPU with CUDA",
    ),
    Provider(
        "tensorrt-rtx",
        "NvTensorRTRTXExecutionProvider",
        "npu",
        module="onnxruntime_ep_nv_tensorrt_rtx",
        install="pip install onnxruntime-ep-nv-tensorrt-rtx",
        dtypes=("float32", "float16", "bfloat16"),
        kv=("float32", "float16"),
        static_shapes=True,
        needs="an NVIDIA RTX GPU of the 30 series or newer",
    ),
    Provider(
        "directml",
        "DmlExecutionProvider",
        "webgpu",
        install="pip install onnxruntime-directml (or Windows ML), in place of onnxruntime",
        dtypes=("float32", "float16"),
        kv=("float32", "float16"),
        needs="Windows and a GPU with Direct3D 12",
    ),
    Provider(
        "coreml",
        "CoreMLExecutionProvider",
        "npu",
        install="the onnxruntime wheel of macOS has it",
        options={"ModelFormat": "MLProgram", "RequireStaticInputShapes": "1"},
        dtypes=("float32", "float16"),
        kv=("float32", "float16"),
        static_shapes=True,
        needs="a Mac",
    ),
    Provider(
        "openvino",
        "OpenVINOExecutionProvider",
        "npu",
        module="onnxruntime_ep_openvino",
        install="pip install onnxruntime-ep-openvino",
        dtypes=("float32", "float16"),
        kv=("float32", "float16"),
        static_shapes=True,
        needs="an Intel processor, GPU or NPU",
    ),
    Provider(
        "xnnpack",
        "XnnpackExecutionProvider",
        "npu",
        install="an ONNX Runtime that was built with --use_xnnpack",
        static_shapes=True,
        needs="an Arm or x86 processor",
    ),
)

PROVIDERS = {row.name: row for row in _ROWS}


def find_provider(name: str) -> Provider:
    """Return the row of a device.

    Raises:
        OptionError: there is none of that name.
    """
    try:
        return PROVIDERS[name]
    except KeyError:
        raise OptionError(
            f"the device {name!r} is unknown; there are {', '.join(PROVIDERS)}"
        ) from None
