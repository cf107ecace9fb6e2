"""Bundles are written to the side: what fails or is killed leaves what was there, and no more."""

import os
import subprocess
import sys

import pytest

from forerun.errors import OptionError
from forerun.export.bundle import folder_aside, new_bundle

# Says where it writes, and waits to be killed.
WRITER = """
import sys, time
from pathlib import Path
from forerun.export.bundle import folder_aside
with folder_aside(Path(sys.argv[1])) as folder:
    (folder / "weights.bin").write_bytes(b"half")
    print(folder, flush=True)
    time.sleep(60)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_takes_its_place_when_it_is_whole(tmp_path):
    for content in ("one", "two"):
        with folder_aside(tmp_path / "q") as folder:
            (folder / "manifest.json").write_text(content)
            assert folder.parent == tmp_path
        assert names(tmp_path) == ["q"]
    assert (tmp_path / "q" / "manifest.json").read_text() == "two"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_an_error_leaves_what_was_there(error, tmp_path):
    with new_bundle(tmp_path / "q") as folder:
        (folder / "manifest.json").write_text("one")
    with pytest.raises(error), new_bundle(tmp_path / "q") as folder:
        (folder / "manifest.json").write_text("two")
        raise error
    assert names(tmp_path) == ["q"]
    assert (tmp_path / "q" / "manifest.json").read_text() == "one"


@pytest.mark.skipif(os.name == "nt", reason="nothing is cleaned there")
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "q")]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    left = writer.stdout.readline().strip()
    with folder_aside(tmp_path / "q"):
        assert os.path.exists(left), "its process lives"
    writer.kill()
    writer.communicate()
    with folder_aside(tmp_path / "other"):
        assert os.path.exists(left), "it is of another bundle"
    with folder_aside(tmp_path / "q"):
        assert not os.path.exists(left)
    assert names(tmp_path) == ["other", "q"]


@pytest.mark.skipif(os.name == "nt", reason="nothing is cleaned there")
def test_a_replacement_that_was_cut_short_is_undone(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with folder_aside(tmp_path / "q") as folder:
        prefix = folder.name.replace(f"-{os.getpid()}.", f"-{ended.pid}.").rpartition(".")[0]
        (folder / "manifest.json").write_text("one")
    (tmp_path / "q").rename(tmp_path / f"{prefix}.old")
    (tmp_path / f"{prefix}.abc_0123").mkdir()
    (tmp_path / ".q.mine").mkdir()
    with pytest.raises(ValueError), folder_aside(tmp_path / "q"):
        raise ValueError
    assert names(tmp_path) == [".q.mine", "q"]
    assert (tmp_path / "q" / "manifest.json").read_text() == "one"


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "notes.txt").write_text("mine")
    with pytest.raises(OptionError, match="not a bundle"), new_bundle(tmp_path / "q"):
        pytest.fail("nothing may be written")
    assert names(tmp_path / "q") == ["notes.txt"]
