import struct
import tracemalloc
import warnings

import numpy as np
import pytest

from forerun.errors import SourceError, UnsupportedError
from forerun.export.gguf_file import GGUFFile
from forerun.export.sources import open_source

QUANTS = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


def raw_file(keys=b"", key_count=0, tensors=b"", tensor_count=0, data=b"", version=3):
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count) + keys + tensors
    return head + b"\0" * (-len(head) % 32) + data


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def tensor(name, shape, kind=0, offset=0):
    dims = struct.pack(f"<{len(shape)}Q", *shape[::-1])
    return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def opened(folder, content):
    path = folder / "case.gguf"
    path.write_bytes(content)
    return GGUFFile(path)


@pytest.mark.parametrize("kind", QUANTS)
def test_every_quantization_is_read_as_gguf_reads_it(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    quant = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quant]
    rng = np.random.default_rng(7)
    # Exponent bits of every 16-bit word are kept small, so that scales are finite.
    raw = rng.integers(0, 256, (3, 512 // block * size), np.uint8) & 0x3F
    file = opened(
        tmp_path,
        raw_file(tensors=tensor("w", (3, 512), int(quant)), tensor_count=1, data=raw.tobytes()),
    )
    wanted = gguf.quants.dequantize(raw, quant)
    assert file.tensor("w").dtype == np.float32
    np.testing.assert_array_equal(file.tensor("w"), wanted)


def test_metadata_of_every_type_is_read(tmp_path):
    values = {
        b"u8": (0, struct.pack("<B", 200), 200),
        b"i16": (3, struct.pack("<h", -5), -5),
        b"u64": (10, struct.pack("<Q", 1 << 63), 1 << 63),
        b"f32": (6, struct.pack("<f", 0.5), 0.5),
        b"bool": (7, b"\x01", True),
        b"text": (8, text("grün"), "grün"),
        b"list": (9, struct.pack("<IQ", 8, 2) + text("a") + text(""), ["a", ""]),
    }
    keys = b"".join(text(k) + struct.pack("<I", t) + raw for k, (t, raw, _) in values.items())
    file = opened(tmp_path, raw_file(keys, len(values)))
    assert file.metadata == {key.decode(): wanted for key, (_, _, wanted) in values.items()}
    assert type(file.metadata["bool"]) is bool


KEY = text("a") + struct.pack("<I", 4) + b"\1\0\0\0"
ONE = np.ones(64, np.float32).tobytes()
BAD = {
    "empty": b"",
    "magic": b"GGML" + b"\0" * 60,
    "tensor count": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + b"\0" * 64,
    "key count": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + b"\0" * 64,
    "string length": raw_file(struct.pack("<Q", 1 << 62) + b"abc" * 20, 1),
    "key not utf-8": raw_file(text(b"\xff\xfe") + struct.pack("<I", 4) + b"\1\0\0\0", 1),
    "key twice": raw_file(KEY + KEY, 2),
    "array length": raw_file(text("a") + struct.pack("<IIQ", 9, 8, 1 << 61) + b"\0" * 64, 1),
    "number array length": raw_file(text("a") + struct.pack("<IIQ", 9, 12, 1 << 58), 1),
    "array of arrays": raw_file(text("a") + struct.pack("<IIQ", 9, 9, 1) + b"\0" * 64, 1),
    "value type": raw_file(text("a") + struct.pack("<I", 99) + b"\0" * 64, 1),
    "alignment": raw_file(
        text("general.alignment") + struct.pack("<II", 4, 12), 1, tensor("w", (4,)), 1, ONE
    ),
    "rank": raw_file(tensors=tensor("w", (1,) * 9), tensor_count=1, data=ONE),
    "rank 0": raw_file(tensors=tensor("w", ()), tensor_count=1, data=ONE),
    "dimension 0": raw_file(tensors=tensor("w", (0, 4)), tensor_count=1, data=ONE),
    "size": raw_file(tensors=tensor("w", (1 << 31, 1 << 31)), tensor_count=1, data=ONE),
    "size overflow": raw_file(tensors=tensor("w", (1 << 63, 1 << 63, 4)), tensor_count=1, data=ONE),
    "beyond the end": raw_file(tensors=tensor("w", (32,), offset=160), tensor_count=1, data=ONE),
    "offset": raw_file(tensors=tensor("w", (8,), offset=1 << 63), tensor_count=1, data=ONE),
    "misaligned": raw_file(tensors=tensor("w", (8,), offset=4), tensor_count=1, data=ONE),
    "broken block": raw_file(tensors=tensor("w", (33,), kind=8), tensor_count=1, data=ONE),
    "overlap": raw_file(
        tensors=tensor("a", (16,)) + tensor("b", (8,), offset=32), tensor_count=2, data=ONE
    ),
    "name twice": raw_file(
        tensors=tensor("a", (8,)) + tensor("a", (8,), offset=32), tensor_count=2, data=ONE
    ),
    "name empty": raw_file(tensors=tensor("", (8,)), tensor_count=1, data=ONE),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_source_errors(tmp_path, case):
    with pytest.raises(SourceError, match=r"case\.gguf") as caught:
        opened(tmp_path, BAD[case])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "content",
    [
        raw_file(version=1) + b"\0" * 32,
        raw_file(version=3 << 24) + b"\0" * 32,
        raw_file(tensors=tensor("w", (8,), kind=4242), tensor_count=1, data=ONE),
    ],
)
def test_other_versions_and_types_are_unsupported(tmp_path, content):
    with pytest.raises(UnsupportedError):
        opened(tmp_path, content)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_name_the_tensor(tmp_path, value):
    data = np.array([1, value, 3, 4], np.float32).tobytes()
    file = opened(tmp_path, raw_file(tensors=tensor("w", (4,)), tensor_count=1, data=data))
    with pytest.raises(SourceError, match="tensor w"):
        file.tensor("w")


def test_integer_tensors_are_not_weights(tmp_path):
    file = opened(
        tmp_path, raw_file(tensors=tensor("w", (8,), kind=26), tensor_count=1, data=b"\0" * 32)
    )
    with pytest.raises(UnsupportedError, match="I32"):
        file.tensor("w")


def read_all(path):
    source = open_source(path)
    for name in source.names():
        assert np.isfinite(source.tensor(name)).all()


def test_a_file_cut_anywhere_is_refused(tmp_path, tiny):
    path = tiny.gguf(tmp_path / "whole.gguf", types={"ffn": "Q4_1", "token_embd": "Q8_0"})
    content = path.read_bytes()
    file = GGUFFile(path)
    header = min(entry.offset for entry in file.tensors.values())
    end = max(entry.offset + entry.nbytes for entry in file.tensors.values())
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, header, 3), *range(header, end, 997), end - 1]:
        cut.write_bytes(content[:length])
        with pytest.raises(SourceError):
            open_source(cut)


EXTREMES = (0, 1, 2, 255, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 62, 1 << 63, (1 << 64) - 1)


def mutate(content, header, rng):
    """One of: flip bits, put an extreme number, cut, remove or double a stretch."""
    data = bytearray(content)
    where = int(rng.integers(header if rng.random() < 0.8 else len(data)))
    kind = rng.integers(5)
    if kind == 0:
        data[where] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        width = int(rng.choice([4, 8]))
        value = EXTREMES[rng.integers(len(EXTREMES))] % (1 << 8 * width)
        data[where : where + width] = value.to_bytes(width, "little")
    elif kind == 2:
        del data[where:]
    elif kind == 3:
        del data[where : where + int(rng.integers(1, 64))]
    else:
        data[where:where] = data[where : where + int(rng.integers(1, 64))]
    return bytes(data)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_thousand_mutations_end_in_typed_errors(tmp_path, tiny, arch):
    whole = tiny.gguf(
        tmp_path / "whole.gguf", arch, types={"ffn": "Q4_1", "attn_q.": "Q5_0", "tok": "Q8_0"}
    )
    content = whole.read_bytes()
    header = min(entry.offset for entry in GGUFFile(whole).tensors.values())
    rng = np.random.default_rng(20260101)
    path, refused = tmp_path / "mutated.gguf", 0
    tracemalloc.start()
    try:
        for _ in range(1000):
            path.write_bytes(mutate(content, header, rng))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    read_all(path)
                except (SourceError, UnsupportedError):
                    refused += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Many flips hit a weight or a token, which stays a valid file.
    assert refused > 500
    assert peak < 50 * len(content) + (8 << 20)
