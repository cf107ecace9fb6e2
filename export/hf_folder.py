"""A folder in Hugging Face layout as a weight source: config.json, safetensors, tokenizer.json."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forerun.errors import SourceError, UnsupportedError
from forerun.export.fields import Fields, read_json
from forerun.export.hf_config import read_config
from forerun.export.safetensors_file import SafetensorsFile
from forerun.export.sources import check_config, check_shapes
from forerun.runtime.manifest import file_sha256

if TYPE_CHECKING:
    from forerun.export.tokenizer import TokenizerSource

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Buffers that older versions of transformers stored; they follow from the settings.
_BUFFERS = (".rotary_emb.inv_freq", ".self_attn.bias", ".self_attn.masked_bias")


class FolderSource:
    """Weights of a folder in Hugging Face layout; see `WeightSource`."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder = folder
        self._sha256 = ""
        self.origin = name or folder.resolve().name
        self.config = read_config(folder)
        check_config(self.config, str(folder))
        self.files = open_weights(folder)
        self._names = check_shapes(self.config, self._shapes(), str(folder))

    @property
    def sha256(self) -> str:
        """SHA-256 over the sorted names and hashes of the files that define the model."""
        self._sha256 = self._sha256 or self._hash()
        return self._sha256

    def _hash(self) -> str:
        digest = hashlib.sha256()
        used = {file.path.name for file in self.files.values()}
        extra = ("config.json", "generation_config.json", "tokenizer.json", INDEX)
        used |= {name for name in extra if (self.folder / name).is_file()}
        for name in sorted(used):
            digest.update(f"{file_sha256(self.folder / name)}  {name}\n".encode())
        return digest.hexdigest()

    def names(self) -> frozenset[str]:
        """Names of all tensors the model needs."""
        return self._names

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as float32, as it is stored."""
        return self.files[name].tensor(name)

    def tokenizer_files(self) -> TokenizerSource:
        """The path of tokenizer.json.

        Raises:
            UnsupportedError: there is none.
        """
        from forerun.export.tokenizer import TokenizerSource

        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise UnsupportedError(
                f"{self.folder} has no tokenizer.json; save it with transformers' fast tokenizer"
            )
        return TokenizerSource(json_path=path, gguf=None)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        skipped = _BUFFERS + (("lm_head.weight",) if self.config.tied else ())
        return {
            name: file.tensors[name].shape
            for name, file in self.files.items()
            if not name.endswith(skipped)
        }


def open_weights(folder: Path) -> dict[str, SafetensorsFile]:
    """Map every tensor name to the opened file that holds it.

    Raises:
        SourceError: a file is missing or damaged, or the index and the files disagree.
        UnsupportedError: there are no safetensors files.
    """
    if (folder / INDEX).is_file():
        return _open_indexed(folder)
    if (folder / SINGLE).is_file():
        file = SafetensorsFile(folder / SINGLE)
        return dict.fromkeys(file.tensors, file)
    raise UnsupportedError(
        f"{folder} holds neither {SINGLE} nor {INDEX}; other formats (pickles) are not read"
    )


def _open_indexed(folder: Path) -> dict[str, SafetensorsFile]:
    index = Fields(read_json(folder / INDEX), str(folder / INDEX))
    table = index.raw("weight_map")
    if not isinstance(table, dict) or not table:
        raise index.error("weight_map", table, "an object of tensor and file names")
    for name, file in table.items():
        if not _plain_name(file):
            raise SourceError(
                f"{folder / INDEX}: tensor {name} is in {file!r}; only files in the folder itself "
                "are allowed"
            )
    opened = {file: SafetensorsFile(folder / file) for file in sorted(set(table.values()))}
    for name, file in table.items():
        if name not in opened[file].tensors:
            raise SourceError(f"{folder / INDEX}: tensor {name} is not in {file}")
    for file, content in opened.items():
        for name in content.tensors:
            if table.get(name) != file:
                raise SourceError(f"{folder / INDEX}: tensor {name} of {file} is not listed")
    return {name: opened[file] for name, file in table.items()}


def _plain_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not any(mark in name for mark in "/\\:\0")
        and not name.startswith(".")
    )
