import dataclasses
import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import edit_manifest

from forerun.apps.cli.main import main
from forerun.devices.home import VARIANTS, find_bundle, installed, model_folder
from forerun.errors import ExportMismatch, OptionError, SpaceError, TermsError, UnknownModelError
from forerun.export import bundle
from forerun.export import pull as pull_module
from forerun.export.catalog import CatalogEntry, CatalogFile, FileSource
from forerun.export.lock import try_locked
from forerun.export.pull import pull
from forerun.export.recipe import RECIPE
from forerun.quant import quantize as quantize_module
from forerun.runtime.manifest import Quantization, load_manifest, seal


def entry_of(path, **more):
    data = path.read_bytes()
    files = (CatalogFile(path.name, len(data), hashlib.sha256(data).hexdigest()),)
    source = FileSource("file", path=str(path.parent))
    return CatalogEntry("tiny", "text", "MIT", "", 60_000, files, (source,), **more)


def fake_quantize(folder, out, *, weights, progress):
    """What the quantizer promises, without its measurement: a tiny model has no quality."""
    manifest = load_manifest(folder)
    assert manifest.quantization.method == "none"
    progress("quantize", 1, 1)
    shutil.copytree(folder, out)
    seal(out, dataclasses.replace(manifest, quantization=Quantization(weights, int(weights[3:]))))


@pytest.fixture
def place(tmp_path, monkeypatch, tiny):
    """A home, a catalog of one tiny model, and the stages that were run."""
    (tmp_path / "shelf").mkdir()
    path = tiny.gguf(tmp_path / "shelf" / "tiny.gguf")
    monkeypatch.setenv("FORERUN_HOME", str(tmp_path / "home"))
    found = SimpleNamespace(
        home=tmp_path / "home", path=path, entry=entry_of(path), stages=[], notes=[]
    )
    monkeypatch.setattr(pull_module, "find_entry", lambda name: found.entry)
    monkeypatch.setattr(quantize_module, "quantize", fake_quantize)

    def progress(stage, done, total):
        found.stages += [stage] if stage not in found.stages else []

    def run(**options):
        found.stages.clear()
        found.notes.clear()
        return pull("tiny", progress=progress, note=found.notes.append, **options)

    found.pull = run
    return found


def leftovers(place):
    return [p.name for p in (place.home / "models").iterdir() if p.name.startswith(".partial")]


def test_a_pulled_model_is_found_by_name(place):
    folder = place.pull(variant="fp32")
    assert folder == find_bundle("tiny:fp32") == place.home / "models/tiny/fp32"
    manifest = load_manifest(folder)
    manifest.check_files(folder, full=True)
    assert manifest.name == "tiny" and manifest.source.origin == "tiny (tiny.gguf)"
    assert manifest.source.sha256 == place.entry.files[0].sha256
    assert place.stages[0] == "download" and {"export", "check"} <= set(place.stages)
    assert not leftovers(place)


def test_quantized_models_do_not_keep_the_float32_bundle(place):
    folder = place.pull()
    assert load_manifest(folder).quantization.method == "int4"
    assert installed() == ["tiny:int4"] and not leftovers(place)
    assert place.stages[-2:] == ["quantize", "measure threads"]


def test_an_installed_float32_bundle_is_the_input(place):
    place.pull(variant="fp32")
    shutil.rmtree(place.home / "downloads")
    place.path.unlink()
    place.pull(variant="int8")
    assert place.stages == ["quantize", "measure threads"]
    assert installed() == ["tiny:fp32", "tiny:int8"]


def test_a_second_pull_does_nothing_unless_forced(place):
    folder = place.pull(variant="fp32")
    before = (folder / "manifest.json").stat().st_mtime_ns
    place.pull(variant="fp32")
    assert place.stages == [] and (folder / "manifest.json").stat().st_mtime_ns == before
    place.pull(variant="fp32", force=True)
    assert "export" in place.stages and (folder / "manifest.json").stat().st_mtime_ns > before
    assert not leftovers(place)


@pytest.mark.parametrize("damage", ["manifest.json", "model.onnx"])
def test_a_damaged_bundle_is_made_again(place, damage):
    folder = place.pull(variant="fp32")
    (folder / damage).write_bytes(b"{")
    place.pull(variant="fp32")
    load_manifest(folder).check_files(folder, full=True)


def test_another_capacity_is_an_error_for_what_is_installed(place):
    folder = place.pull(variant="fp32", capacity=64)
    assert load_manifest(folder).kv.capacity == 64
    assert place.pull(variant="fp32") == folder
    with pytest.raises(OptionError, match="capacity 64, not 128"):
        place.pull(variant="fp32", capacity=128)
    place.pull(variant="int4", capacity=128)
    assert "export" in place.stages
    place.pull(variant="fp32", capacity=128, force=True)
    assert load_manifest(folder).kv.capacity == 128


def test_a_failed_export_installs_nothing(place, monkeypatch):
    def wrong(*args, **kwargs):
        raise ExportMismatch("logits", 1.0, 0.1)

    monkeypatch.setattr(quantize_module, "quantize", wrong)
    with pytest.raises(ExportMismatch):
        place.pull()
    assert installed() == [] and not leftovers(place)


def test_terms_lie_beside_the_weights(place):
    place.entry = entry_of(place.path, terms="gemma.txt", terms_summary="no evil")
    with pytest.raises(TermsError):
        place.pull()
    assert not place.home.exists()
    folder = place.pull(variant="fp32", accept_terms=True)
    assert (folder.parent / "TERMS.txt").read_text().startswith("Gemma Terms of Use")
    assert place.pull(variant="fp32") == folder
    with pytest.raises(TermsError):
        place.pull(variant="fp32", force=True)


def test_user_errors_come_before_any_work(place, monkeypatch):
    with pytest.raises(OptionError, match="int3"):
        place.pull(variant="int3")
    monkeypatch.setattr(bundle.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(SpaceError, match="tiny:int4"):
        place.pull()
    assert place.stages == [] and not (place.home / "downloads").exists()
    monkeypatch.undo()
    with pytest.raises(UnknownModelError):
        pull("unknown")


def test_a_home_that_cannot_be_used(place, monkeypatch):
    blocked = place.path.parent / "file"
    blocked.write_text("")
    monkeypatch.setenv("FORERUN_HOME", str(blocked))
    with pytest.raises(OptionError, match="FORERUN_HOME"):
        place.pull()


def test_what_dead_pulls_left_is_removed(place):
    for name in ("tiny-int4-exact", "other-fp32"):
        (place.home / f"models/.partial-{name}/fp32").mkdir(parents=True)
    place.pull(variant="fp32")
    assert leftovers(place) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_living_pull_of_another_model_has_is_kept(variant, place):
    (place.home / f"models/.partial-other-{variant}").mkdir(parents=True)
    with pull_module.locked(place.home / "models/.other.lock"):
        place.pull(variant="fp32")
    assert leftovers(place) == [f".partial-other-{variant}"]


def aged(folder, recipe=0):
    """Make a bundle one of another revision, otherwise undamaged."""
    edit_manifest(folder, lambda data: data.update(recipe=recipe))
    return folder


def again(label):
    return f"{label} was made by an older forerun; making it again"


def test_a_bundle_of_an_older_forerun_is_made_again(place):
    folder = aged(place.pull(variant="fp32"))
    edit_manifest(folder, lambda data: data.pop("recipe"))
    assert place.pull(variant="fp32") == folder
    assert place.notes == [again("tiny:fp32")] and {"export", "measure threads"} <= set(
        place.stages
    )
    assert load_manifest(folder).recipe == RECIPE and not leftovers(place)
    place.pull(variant="fp32")
    assert place.stages == place.notes == []


def test_what_is_made_again_keeps_its_capacity_unless_forced(place):
    folder = aged(place.pull(variant="int4", capacity=64))
    with pytest.raises(OptionError, match="capacity 64, not 128"):
        place.pull(variant="int4", capacity=128)
    place.pull(variant="int4")
    assert place.notes == [again("tiny:int4")] and load_manifest(folder).kv.capacity == 64
    aged(folder)
    place.pull(variant="int4", force=True)
    assert place.notes == [] and load_manifest(folder).kv.capacity == 128


def test_a_bundle_of_a_newer_forerun_is_kept(place):
    aged(place.pull(variant="fp32"), RECIPE + 1)
    place.pull(variant="fp32")
    assert place.stages == place.notes == []
    folder = place.pull(variant="int8")
    assert place.stages == ["quantize", "measure threads"] and place.notes == []
    assert load_manifest(folder).quantization.method == "int8"


def test_an_old_float32_bundle_is_made_again_before_it_is_quantized(place):
    whole, small = place.pull(variant="fp32"), place.pull(variant="int8")
    aged(whole)
    place.pull(variant="int8")
    assert place.stages == place.notes == [], "what is asked for is there"
    aged(small)
    place.pull(variant="int8")
    assert place.notes == [again("tiny:int8"), again("tiny:fp32")]
    assert [load_manifest(folder).recipe for folder in (whole, small)] == [RECIPE] * 2
    assert not leftovers(place)
    aged(whole)
    place.pull(variant="int4", capacity=64)
    assert place.notes == [] and load_manifest(whole).recipe == 0, "of another capacity"


def test_what_could_not_be_made_again_is_still_there(place, monkeypatch):
    folder = aged(place.pull(variant="fp32"))

    def still_there():
        assert load_manifest(folder).recipe == 0 and not leftovers(place)
        load_manifest(folder).check_files(folder, full=True)

    def stop(stage, done, total):
        still_there_while_working.append(load_manifest(folder).recipe)
        if stage == "check":
            raise KeyboardInterrupt

    still_there_while_working = []
    with pytest.raises(KeyboardInterrupt):
        pull("tiny", variant="fp32", progress=stop)
    assert set(still_there_while_working) == {0}
    still_there()

    rename = Path.rename

    def interrupted(self, target):
        if Path(target) == folder and self.name == "fp32":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            place.pull(variant="fp32")
    still_there()
    with monkeypatch.context() as patch:
        patch.setattr(bundle.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(SpaceError, match="tiny:fp32"):
            place.pull(variant="fp32")
    still_there()


def test_what_was_killed_between_two_renames_is_put_back(place):
    folder = place.pull(variant="fp32")
    work = place.home / "models/.partial-tiny-fp32"
    work.mkdir()
    folder.rename(work / "replaced")
    assert place.pull(variant="fp32") == folder
    assert place.stages == [] and not leftovers(place)
    load_manifest(folder).check_files(folder, full=True)


def test_the_command_says_that_it_makes_it_again(place, capsys):
    aged(place.pull(variant="fp32"))
    assert main(["pull", "tiny:fp32"]) == 0
    told = capsys.readouterr()
    assert f"forerun: {again('tiny:fp32')}\n" in told.err
    assert told.out.strip() == str(model_folder("tiny", "fp32"))
    assert main(["pull", "tiny:fp32"]) == 0
    assert capsys.readouterr().err == ""


def test_drafters_are_installed_under_the_lock(place, monkeypatch):
    place.pull(variant="fp32")
    held = []

    def install(name):
        with try_locked(place.home / "models/.tiny.lock") as mine:
            held.append((name, not mine))

    monkeypatch.setattr(pull_module, "missing_drafters", lambda name: {"there": "here"})
    monkeypatch.setattr(pull_module, "install_drafters", install)
    place.pull(variant="fp32")
    place.pull(variant="int4")
    assert held == [("tiny", True)] * 2

    def full(name):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(pull_module, "install_drafters", full)
    with pytest.raises(SpaceError, match="is full"):
        place.pull(variant="fp32")
    monkeypatch.setattr(pull_module, "missing_drafters", lambda name: {})
    assert place.pull(variant="fp32") == model_folder("tiny", "fp32")


WORKER = """
    import os, signal, sys
    sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
    from pathlib import Path
    from forerun.export import pull as module
    from test_pull import entry_of

    module.find_entry = lambda name: entry_of(Path(sys.argv[2]))

    def progress(stage, done, total):
        if stage == sys.argv[3] and done:
            os.kill(os.getpid(), signal.SIGKILL)

    print(module.pull("tiny", variant="fp32", progress=progress))
"""


def worker(place, stage):
    arguments = [os.path.dirname(__file__), str(place.path), stage]
    command = [sys.executable, "-c", textwrap.dedent(WORKER), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("stage", ["export", "check"])
def test_a_killed_pull_is_completed_by_the_next(place, stage):
    process = worker(place, stage)
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL
    assert installed() == [] and leftovers(place) == [".partial-tiny-fp32"]
    place.pull(variant="fp32")
    assert installed() == ["tiny:fp32"] and not leftovers(place)
    assert "download" not in place.stages


def test_two_processes_install_once(place):
    workers = [worker(place, "never"), worker(place, "never")]
    told = [process.communicate(timeout=100)[0].strip() for process in workers]
    assert told == [str(model_folder("tiny", "fp32"))] * 2
    assert [process.returncode for process in workers] == [0, 0] and not leftovers(place)
