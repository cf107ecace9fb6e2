"""`forerun export --via optimum`: models for which there is no architecture row.

What comes out is optimum's graph, not a bundle, and this is what is given up against a bundle of
ours (`GIVEN_UP` puts it into the report and the model card): the KV cache is not static and not
updated in place but comes back as new, longer outputs at every step; there is no manifest, so
`forerun generate`, `quantize` and `bench` refuse the folder and optimum's `ORTModelForCausalLM`
runs it; logits are computed for every row; the weights stay float32.

The promise that is kept: nothing appears that was not compared with its source. The exported
model is run by optimum's runtime against transformers at several lengths, with and without cache.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forerun.errors import ExportMismatch, UnsupportedError
from forerun.export.bundle import new_bundle

if TYPE_CHECKING:
    from collections.abc import Callable

    Progress = Callable[[str, int, int | None], None]

TASK = "text-generation-with-past"
GIVEN_UP = (
    "no static KV cache: every step returns new, longer keys and values",
    "no KV cache in place: each step copies what is cached",
    "no manifest: `forerun generate`, `quantize` and `bench` do not run it",
    "logits for every row, not only for those that are asked for",
    "no 4-bit or 8-bit weights: they stay float32",
)
_NEEDED = ("optimum", "optimum.exporters", "optimum.onnxruntime", "torch", "transformers")
_LENGTHS = (1, 7, 40)
_STEPS = 4
_RTOL = 2e-3
_SEED = 20261

_CARD = """# {name}

Exported with optimum from {source} (`{kind}`, task `{task}`), because forerun has no architecture
row for it. Checked against transformers: largest difference of a logit {error:.3g}, allowed
{bound:.3g}.

This is not a bundle of forerun. What it gives up:

{given_up}

Run it with optimum:

```python
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

model = ORTModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=40)[0]))
```
"""


def export_via_optimum(
    source: str | Path, out: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Export a decoder with optimum and check it; see the module for what is given up.

    Code that a model brings along is never run.

    Args:
        source: a folder in Hugging Face layout, or a hub id that `huggingface_hub` can fetch.
        out: folder to write; it must not exist, and appears only when everything succeeded.
        progress: called with (stage, done, total); stages "export" and "check".

    Returns:
        A report with `out`, `source`, `model_type`, `task`, `graph`, `bytes`, `max_abs_error`,
        `bound`, `runs_with` and `given_up`, the last a list of sentences.

    Raises:
        UnsupportedError: the extra `optimum` is not installed, or optimum has no exporter for the
            model either.
        OptionError: `out` exists.
        ExportMismatch: optimum's graph computes something else than transformers.
        SpaceError: the disk is too small.
    """
    _require_extra()
    report: Progress = progress or (lambda stage, done, total: None)
    with new_bundle(Path(out)) as folder:
        report("export", 0, 1)
        _export(str(source), folder)
        report("export", 1, 1)
        kind, error, bound = _check(str(source), folder, report)
        found = _describe(source, Path(out), folder) | {
            "model_type": kind,
            "max_abs_error": error,
            "bound": bound,
        }
        (folder / "README.md").write_text(_card(Path(out).name, found), encoding="utf-8")
    return found


def _describe(source: str | Path, out: Path, folder: Path) -> dict[str, Any]:
    return {
        "out": str(out),
        "source": Path(source).name if Path(source).exists() else str(source),
        "task": TASK,
        "graph": "model.onnx",
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "runs_with": "optimum.onnxruntime.ORTModelForCausalLM",
        "given_up": list(GIVEN_UP),
    }


def _require_extra() -> None:
    for name in _NEEDED:
        try:
            here = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            here = False
        if not here:
            raise UnsupportedError(
                f"--via optimum needs {name}, which is not installed; "
                "install the extra: pip install 'forerun[optimum]'"
            )


def _export(source: str, folder: Path) -> None:
    from optimum.exporters.onnx import main_export  # pyright: ignore[reportMissingImports]

    try:
        main_export(
            source,
            folder,
            task=TASK,
            do_validation=False,
            trust_remote_code=False,
            library_name="transformers",
        )
    except OSError as error:
        if error.errno is not None:
            raise
        # transformers raises plain OSError when a model is not where it should be.
        raise UnsupportedError(f"{source} cannot be read: {_line(error)}") from error
    except (ValueError, KeyError, NotImplementedError, AttributeError) as error:
        raise UnsupportedError(f"optimum cannot export {source}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _check(source: str, folder: Path, report: Progress) -> tuple[str, float, float]:
    """Return model type, largest error, and the bound it kept."""
    from optimum.onnxruntime import ORTModelForCausalLM  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    theirs = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False).float().eval()
    ours = ORTModelForCausalLM.from_pretrained(folder, use_io_binding=False)
    rng = np.random.default_rng(_SEED)
    worst = bound = 0.0
    for done, length in enumerate(_LENGTHS):
        ids = rng.integers(0, theirs.config.vocab_size, length + _STEPS)
        expected, found = _logits(theirs, ids, [len(ids)]), _logits(ours, ids, [length, _STEPS])
        bound = max(bound, _RTOL * float(expected.std()))
        error = float(np.abs(found - expected).max())
        # NaN must not pass for small.
        worst = max(worst, error if np.isfinite(error) else float("inf"))
        if not worst <= bound:
            raise ExportMismatch("logits", worst, bound, f"optimum, {length} + {_STEPS} tokens")
        report("check", done + 1, len(_LENGTHS))
    return str(theirs.config.model_type), worst, bound


def _logits(model: Any, ids: np.ndarray, widths: list[int]) -> np.ndarray:
    """Logits [T, V] of a text that is fed in pieces, each behind the cache of those before."""
    import torch  # pyright: ignore[reportMissingImports]

    cache, rows, start = None, [], 0
    with torch.inference_mode():
        for width in widths:
            out = model(
                input_ids=torch.from_numpy(ids[None, start : start + width]),
                attention_mask=torch.ones((1, start + width), dtype=torch.long),
                past_key_values=cache,
                use_cache=True,
            )
            cache, start = out.past_key_values, start + width
            rows.append(np.asarray(out.logits[0]))
    return np.concatenate(rows)


def _card(name: str, found: dict[str, Any]) -> str:
    return _CARD.format(
        name=name,
        source=found["source"],
        kind=found["model_type"],
        task=found["task"],
        error=found["max_abs_error"],
        bound=found["bound"],
        given_up="\n".join(f"- {sentence}" for sentence in found["given_up"]),
    )
