"""Worker for openvino-genai, which reads the GGUF file itself; run with ``python -m``."""

from __future__ import annotations

import importlib
import time
from importlib import metadata
from typing import Any

from forerun.apps.bench.machine import peak_rss_mb
from forerun.apps.bench.worker import serve


class _Peer:
    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        # By name: only the extra `peers` has it.
        genai: Any = importlib.import_module("openvino_genai")
        self._genai = genai
        scheduler = genai.SchedulerConfig()
        # By default it remembers prompts, so that reading one twice would look like 6000 tok/s.
        scheduler.enable_prefix_caching = False
        # What it looks up and how far it drafts; none of it is plain decoding.
        self._lookup: dict[str, int] = request.get("prompt_lookup") or {}
        self._pipeline = None  # two at once would take twice the memory
        self._pipeline = genai.LLMPipeline(
            request["model"],
            "CPU",
            scheduler_config=scheduler,
            INFERENCE_NUM_THREADS=request["threads"],
            **({"prompt_lookup": True} if self._lookup else {}),
        )
        return {"version": metadata.version("openvino-genai")}

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        ids = np.asarray([request["prompt"]], np.int64)
        tensor: Any = importlib.import_module("openvino").Tensor
        inputs = self._genai.TokenizedInputs(tensor(ids), tensor(np.ones_like(ids)))
        config = self._genai.GenerationConfig()
        config.max_new_tokens = request["tokens"]
        config.do_sample = False
        config.ignore_eos = not request.get("eos")
        config.stop_token_ids = set(request.get("eos") or ())
        for name, value in self._lookup.items():
            setattr(config, name, value)
        config.apply_chat_template = False
        stamps: list[float] = []
        start = time.perf_counter()
        assert self._pipeline is not None
        result = self._pipeline.generate(inputs, config, _stamp(self._genai, stamps))
        steps = len(stamps) - 1
        return {
            "prefill_s": stamps[0] - start,
            "first_token_s": stamps[0] - start,
            "decode_s": stamps[-1] - stamps[0],
            "steps": steps,
            "tokens": [int(token) for token in result.tokens[0]],
            # Tokens of one round come together.
            "rounds": len(set(stamps)) - 1,
        }

    def memory(self, _request: dict[str, Any]) -> dict[str, Any]:
        return {"peak_rss_mb": peak_rss_mb()}


def _stamp(genai: Any, stamps: list[float]) -> Any:
    """A streamer that notes when each token came."""

    class Stamp(genai.StreamerBase):
        def write(self, token: int | list[int]) -> Any:
            count = len(token) if isinstance(token, list) else 1
            stamps.extend([time.perf_counter()] * count)
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    return Stamp()


def main() -> None:
    """Serve requests until told to quit."""
    peer = _Peer()
    serve({"load": peer.load, "measure": peer.measure, "memory": peer.memory})


if __name__ == "__main__":
    main()
