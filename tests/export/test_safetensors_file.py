import json
import struct

import numpy as np
import pytest

from forerun.errors import SourceError, UnsupportedError
from forerun.export.safetensors_file import SafetensorsFile

EIGHT = np.arange(8, dtype=np.float32)


def row(dtype="F32", shape=(8,), offsets=(0, 32)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def content(header, data=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + (EIGHT.tobytes() if data is None else data)


def opened(folder, raw):
    path = folder / "model.safetensors"
    path.write_bytes(raw)
    return SafetensorsFile(path)


def test_every_float_becomes_float32(tmp_path, tiny):
    bf16 = (EIGHT.view(np.uint32) >> 16).astype(np.uint16)
    raw = tiny.safetensors(
        {
            "f32": ("F32", (2, 4), EIGHT.tobytes()),
            "f16": ("F16", (8,), EIGHT.astype(np.float16).tobytes()),
            "bf16": ("BF16", (4, 2), bf16.tobytes()),
            "f64": ("F64", (8,), EIGHT.astype(np.float64).tobytes()),
            "none": ("F32", (0, 4), b""),
            "scalar": ("F32", (), EIGHT[3:4].tobytes()),
        }
    )
    file = opened(tmp_path, raw)
    for name, shape in {"f32": (2, 4), "f16": (8,), "bf16": (4, 2), "f64": (8,)}.items():
        assert file.tensor(name).dtype == np.float32
        np.testing.assert_array_equal(file.tensor(name), EIGHT.reshape(shape))
    assert file.tensor("none").shape == (0, 4) and file.tensor("scalar") == 3


def test_metadata_is_allowed(tmp_path):
    file = opened(tmp_path, content({"__metadata__": {"format": "pt"}, "w": row()}))
    assert set(file.tensors) == {"w"}


LIES = {
    "empty": b"",
    "short": b"\0" * 7,
    "header beyond the file": struct.pack("<Q", 1 << 40) + b"{}",
    "header length 2**64 - 1": b"\xff" * 8 + b"{}",
    "header length 0": struct.pack("<Q", 0) + b"{}",
    "not JSON": content(b"{'w': 1}"),
    "not UTF-8": content(b'{"\xff\xfe": 1}'),
    "not an object": content([1, 2]),
    "deep JSON": content(b"[" * 100_000),
    "name twice": content(b'{"w": %s, "w": %s}' % ((json.dumps(row()).encode(),) * 2)),
    "row is no object": content({"w": 3}),
    "key missing": content({"w": {"dtype": "F32", "shape": [8]}}),
    "key unknown": content({"w": row() | {"strides": [1]}}),
    "shape is text": content({"w": row() | {"shape": "8"}}),
    "shape is float": content({"w": row(shape=(8.0,))}),
    "shape is bool": content({"w": row(shape=(True, 8))}),
    "shape is negative": content({"w": row(shape=(-2, -4))}),
    "shape is huge": content({"w": row(shape=(1 << 61, 1 << 61))}),
    "number of many digits": content(b'{"w": {"shape": [%s]}}' % (b"9" * 10_000)),
    "too many dimensions": content({"w": row(shape=(1,) * 9)}),
    "offsets are reversed": content({"w": row(offsets=(32, 0))}),
    "offsets are three": content({"w": row(offsets=(0, 16, 32))}),
    "offsets are not the shape's": content({"w": row(shape=(7,))}),
    "offsets beyond the file": content({"w": row(shape=(16,), offsets=(0, 64))}),
    "bytes before": content({"w": row(shape=(4,), offsets=(16, 32))}),
    "bytes after": content({"w": row(shape=(4,), offsets=(0, 16))}),
    "gap": content({"a": row(shape=(2,), offsets=(0, 8)), "b": row(shape=(4,), offsets=(16, 32))}),
    "overlap": content({"a": row(), "b": row(shape=(4,), offsets=(16, 32))}),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_of_the_header_are_source_errors(tmp_path, lie):
    with pytest.raises(SourceError, match="safetensors") as caught:
        opened(tmp_path, LIES[lie])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_name_the_tensor(tmp_path, value):
    data = EIGHT.copy()
    data[5] = value
    file = opened(tmp_path, content({"layer.w": row()}, data.tobytes()))
    with pytest.raises(SourceError, match=r"layer\.w"):
        file.tensor("layer.w")


def test_dtypes(tmp_path):
    with pytest.raises(UnsupportedError, match="F3"):
        opened(tmp_path, content({"w": row(dtype="F3")}))
    with pytest.raises(UnsupportedError, match="dtype"):
        opened(tmp_path, content({"w": row(dtype=["F32"])}))
    file = opened(tmp_path, content({"w": row(dtype="I32")}))
    with pytest.raises(UnsupportedError, match="I32"):
        file.tensor("w")


def test_mutations_end_in_typed_errors(tmp_path, tiny):
    weights = tiny.pack({k: v for k, v in tiny.weights("llama").items() if "layers.0" in k})
    whole = tiny.safetensors(weights)
    header, rng = 8 + int.from_bytes(whole[:8], "little"), np.random.default_rng(5)
    refused = 0
    for _ in range(500):
        data = bytearray(whole)
        where = int(rng.integers(header))
        if rng.random() < 0.5:
            data[where] = int(rng.integers(256))
        else:
            del data[where : where + int(rng.integers(1, 2000))]
        try:
            file = opened(tmp_path, bytes(data))
            for name in file.tensors:
                file.tensor(name)
        except (SourceError, UnsupportedError):
            refused += 1
    assert refused > 250
