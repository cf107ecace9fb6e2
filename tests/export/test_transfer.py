import hashlib
import io
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

from forerun.errors import DownloadError, OptionError, SpaceError
from forerun.export import transfer
from forerun.export.transfer import copy_checked, download, space_errors

DATA = np.random.default_rng(1).bytes(3_000_000)
SHA = hashlib.sha256(DATA).hexdigest()
LIMIT = len(DATA) + 1000


def ignore(done, total):
    pass


@pytest.fixture
def server(monkeypatch):
    """A server of DATA; `breaks` holds after how many bytes each answer ends."""
    monkeypatch.setattr(transfer, "time", SimpleNamespace(sleep=lambda seconds: None))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            web.ranges.append(self.headers.get("Range"))
            if web.status:
                self.send_error(web.status)
                return
            start = (
                int(re.findall(r"\d+", self.headers["Range"])[0]) if self.headers["Range"] else 0
            )
            start = start if web.ranged else 0
            if start >= len(DATA):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(DATA)}")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(DATA) - start))
            self.end_headers()
            end = start + web.breaks.pop(0) if web.breaks else None
            self.wfile.write(DATA[start:end])

        def log_message(self, *args):
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.socket.settimeout(1)
    web.handle_error = lambda *args: None
    web.ranges, web.breaks, web.ranged, web.status = [], [], True, 0
    web.url = f"http://127.0.0.1:{web.server_port}/w.whl"
    thread = threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield web
    web.shutdown()
    web.server_close()
    thread.join()


def test_download_counts_bytes_and_renames(tmp_path, server):
    seen = []
    download(server.url, tmp_path / "w", SHA, LIMIT, lambda *counts: seen.append(counts))
    assert (tmp_path / "w").read_bytes() == DATA and seen[-1] == (len(DATA), len(DATA))
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


def test_a_broken_connection_goes_on_where_it_ended(tmp_path, server):
    server.breaks = [1_000_000, 500_000]
    download(server.url, tmp_path / "w", SHA, LIMIT, ignore)
    assert (tmp_path / "w").read_bytes() == DATA
    assert server.ranges == [None, "bytes=1000000-", "bytes=1500000-"]


def test_an_earlier_run_is_continued(tmp_path, server):
    (tmp_path / "w.partial").write_bytes(DATA[:2_999_000])
    download(server.url, tmp_path / "w", SHA, LIMIT, ignore)
    assert (tmp_path / "w").read_bytes() == DATA and server.ranges == ["bytes=2999000-"]


def test_a_complete_partial_file_is_accepted(tmp_path, server):
    (tmp_path / "w.partial").write_bytes(DATA)
    download(server.url, tmp_path / "w", SHA, LIMIT, ignore)
    assert (tmp_path / "w").read_bytes() == DATA


def test_a_too_long_partial_file_is_begun_again(tmp_path, server):
    (tmp_path / "w.partial").write_bytes(DATA + b"x")
    download(server.url, tmp_path / "w", SHA, LIMIT, ignore)
    assert (tmp_path / "w").read_bytes() == DATA


def test_servers_without_ranges_begin_again(tmp_path, server):
    server.ranged = False
    (tmp_path / "w.partial").write_bytes(DATA[:1_000_000])
    download(server.url, tmp_path / "w", SHA, LIMIT, ignore)
    assert (tmp_path / "w").read_bytes() == DATA


def test_another_hash_is_refused_and_removed(tmp_path, server):
    (tmp_path / "w.partial").write_bytes(b"\0" * 1000)
    with pytest.raises(DownloadError, match="SHA-256"):
        download(server.url, tmp_path / "w", SHA, LIMIT, ignore)
    assert not list(tmp_path.iterdir())


def test_a_connection_that_always_breaks_is_given_up(tmp_path, server):
    server.breaks = [10] * 50
    with pytest.raises(DownloadError, match=r"broke off|cannot be fetched"):
        download(server.url, tmp_path / "w", SHA, LIMIT, ignore)
    assert (tmp_path / "w.partial").stat().st_size > 0 and not (tmp_path / "w").exists()


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (401, 1), (503, transfer.ATTEMPTS)])
def test_refusals(tmp_path, server, status, tries):
    server.status = status
    with pytest.raises(DownloadError, match=str(status)):
        download(server.url, tmp_path / "w", SHA, LIMIT, ignore)
    assert len(server.ranges) == tries


def test_more_than_expected_is_not_downloaded(tmp_path, server):
    with pytest.raises(DownloadError, match="at most"):
        download(server.url, tmp_path / "w", SHA, 1000, ignore)
    assert not list(tmp_path.iterdir())


def test_file_urls(tmp_path):
    (tmp_path / "a").write_bytes(DATA)
    (tmp_path / "w.partial").write_bytes(DATA[:5])
    download((tmp_path / "a").as_uri(), tmp_path / "w", SHA, LIMIT, ignore)
    assert (tmp_path / "w").read_bytes() == DATA


@pytest.mark.parametrize("data", [DATA[:-1], DATA + b"x", DATA[:-1] + b"x", b""])
def test_copies_must_be_exact(tmp_path, data):
    with pytest.raises(DownloadError):
        copy_checked(io.BytesIO(data), tmp_path / "w", len(DATA), SHA, ignore)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_errors_of_the_disk(tmp_path):
    with pytest.raises(SpaceError, match="full"), space_errors(tmp_path):
        raise OSError(28, "No space left on device")
    with pytest.raises(SpaceError, match="full"), space_errors(tmp_path):
        np.zeros(100_000).tofile("/dev/full")
    with pytest.raises(OptionError, match="FORERUN_HOME"), space_errors(tmp_path):
        raise PermissionError(13, "Permission denied")
    with pytest.raises(OSError, match="odd"), space_errors(tmp_path):
        raise OSError(5, "odd")
