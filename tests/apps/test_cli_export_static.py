"""`forerun export --static`: a bundle for devices that need static shapes."""

import json

from forerun.runtime.manifest import load_manifest
from forerun.runtime.static_runner import StaticRunner


def test_a_static_form_and_fewer_layers_can_be_asked_for(forerun, hf_source, tmp_path):
    out = tmp_path / "npu"
    done = forerun("export", hf_source, out, "--static", "--layers", 1, "--capacity", 32, "--json")
    assert done.returncode == 0, done.stderr
    metrics = [check["metric"] for check in json.loads(done.stdout)["checks"]]
    assert metrics == ["max_abs_error", "max_abs_error_npu"]
    manifest = load_manifest(out)
    manifest.check_files(out)
    assert "the first 1 of 1 layers" in manifest.source.origin
    runner = StaticRunner(manifest, out, threads=1)
    assert chr(int(runner.step([ord("a"), ord("b")]).argmax())) == "c"


def test_wrong_use_is_refused(forerun, hf_source, tmp_path):
    done = forerun("export", hf_source, tmp_path / "x", "--static", "--layers", 2)
    assert done.returncode == 2 and "the model has 1 layers" in done.stderr
    done = forerun("export", hf_source, tmp_path / "x", "--static", "--via", "optimum")
    assert done.returncode == 2 and "--static" in done.stderr
    assert not (tmp_path / "x").exists()
