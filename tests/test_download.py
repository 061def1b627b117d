"Downloads from a server that misbehaves in every way we could think of: the right file, or a clear message and nothing half-written."
import io, json, multiprocessing, os, shutil, stat, threading, time, zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from namedmask import weights
from namedmask.core import UserError, locked
from namedmask.weights import (PUBLISHED, Published, Unreachable, download, downloads_table, fetch, fetch_group, find, published_path,
                               record_path, unpack)


def zip_bytes(*members, compress=zipfile.ZIP_DEFLATED):
    "A zip file of (name or ZipInfo, content)."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as z:
        for name, content in members: z.writestr(name, content)
    return out.getvalue()


WEIGHT = zip_bytes(("w/data.pkl", b"a pickle"), ("w/data/0", os.urandom(3_000_000)), compress=zipfile.ZIP_STORED)
MASKS = zip_bytes(("n01440764/n01440764_1.json", '{"size": [2, 2], "counts": "04"}'), ("n01440764/", ""), ("./n02/a b/ö.json", "{}"))
ARCHIVE = json.dumps({"cat": ["n/a.jpg", "n/b.jpg"]}).encode()
BODY = {"w.pt": WEIGHT, "masks.zip": MASKS, "archive.json": ARCHIVE}
HTML = b"<!DOCTYPE html><html><head><title>404</title></head><body>The page is gone</body></html>"


class Handler(BaseHTTPRequestHandler):
    "A proper server with ranges and an ETag, unless the test gives it something else to do."
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.body = BODY.get(self.path.rsplit("/", 1)[-1], b"")
        self.server.asked.append(dict(self.headers) | {"path": self.path})
        (self.server.act or Handler.good)(self)

    def good(self, etag='"v1"', **kw):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if self.headers.get("If-Range", etag) != etag: start = 0
        if start >= len(self.body): return self.give(b"", 416)
        span = {"Content-Range": f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"} if start else {}
        self.give(self.body[start:], 206 if start else 200, ETag=etag, **span, **kw)

    def give(self, body, code=200, length=True, cut=None, **headers):
        self.send_response(code)
        headers = {k.replace("_", "-"): v for k, v in headers.items()}
        if length: headers = {"Content-Length": str(len(body))} | headers
        for k, v in headers.items(): self.send_header(k, v)
        self.end_headers()
        try: self.wfile.write(body[:cut])
        except OSError: pass
        self.close_connection = True

    def log_message(self, *args): pass


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    def handle_error(self, request, address): pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    "A server on loopback that is the mirror of everything, an empty cache, and three published files."
    s = QuietServer(("127.0.0.1", 0), Handler)
    s.act, s.asked, s.url = None, [], f"http://127.0.0.1:{s.server_port}"
    threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=.01), daemon=True).start()
    monkeypatch.setenv("NAMEDMASK_MIRROR", s.url)
    monkeypatch.setenv("NAMEDMASK_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NAMEDMASK_OFFLINE", raising=False)
    for name, file in ("w", "w.pt"), ("masks", "masks.zip"), ("archive", "archive.json"):
        monkeypatch.setitem(PUBLISHED, name, Published("tests", f"https://host.example/some/{file}", name))
    yield s
    s.shutdown(); s.server_close()


def get(name="w", **kw): return fetch(name, **dict(timeout=.4, tries=2, pause=0) | kw)


def nothing_taken(name="w"):
    "No file under its own name, and none that a later call would take for it."
    path = published_path(name)
    assert not path.exists() and not path.with_suffix("").exists()
    left = {p.name for p in path.parent.iterdir()} if path.parent.exists() else set()
    assert left <= {".lock", path.name + ".part", path.name + ".part.json"}


def fails(words, name="w", kind=UserError, **kw):
    with pytest.raises(kind, match=words) as error: get(name, **kw)
    assert "Traceback" not in str(error.value) and name in str(error.value)
    nothing_taken(name)
    return str(error.value)


def test_a_file_and_its_record(server):
    path = get()
    assert path.read_bytes() == WEIGHT and path == published_path("w")
    assert server.asked[0]["path"] == "/host.example/some/w.pt"
    record = json.loads(record_path(path).read_text())
    assert record["size"] == len(WEIGHT) and len(record["sha256"]) == 64 and record["url"] == PUBLISHED["w"].url
    assert {p.name for p in path.parent.iterdir()} == {".lock", "w.pt", "w.pt.sha256.json"}
    assert get() == path and len(server.asked) == 1
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444 & ~weights_umask()


def weights_umask():
    mask = os.umask(0o22); os.umask(mask)
    return mask


def test_a_zip_becomes_a_folder(server):
    folder = get("masks")
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.json")) == ["n01440764/n01440764_1.json", "n02/a b/ö.json"]
    assert get("masks") == folder and len(server.asked) == 1
    published_path("masks").unlink()                       # to save its room
    assert get("masks", offline=True) == folder


def test_an_archive(server): assert json.loads(get("archive").read_text()) == {"cat": ["n/a.jpg", "n/b.jpg"]}


# ---- going on

def test_a_cut_connection_goes_on_where_it_stopped(server):
    def cut_once(h): h.good(cut=1_500_000 if len(server.asked) == 1 else None)
    server.act = cut_once
    assert get().read_bytes() == WEIGHT
    assert [a.get("Range") for a in server.asked] == [None, "bytes=1500000-"] and server.asked[1]["If-Range"] == '"v1"'


def test_a_later_call_goes_on_where_an_earlier_one_stopped(server):
    server.act = lambda h: h.good(cut=1_000_000) if not h.headers.get("Range") else h.give(b"", 503)
    fails("503")
    server.act = None
    assert get().read_bytes() == WEIGHT and server.asked[-1]["Range"] == "bytes=1000000-"


def test_the_file_changed_meanwhile(server):
    server.act = lambda h: h.good(etag='"v0"', cut=1_000_000) if not h.headers.get("Range") else h.give(b"", 503)
    fails("503")
    server.act = None                                      # the ETag is "v1" now: everything comes again
    assert get().read_bytes() == WEIGHT


def test_a_server_that_ignores_the_condition_but_tells_the_version(server):
    server.act = lambda h: h.good(etag='"v0"', cut=1_000_000) if not h.headers.get("Range") else h.give(b"", 503)
    fails("503")
    server.act = lambda h: (h.headers.replace_header("If-Range", '"v1"') if "If-Range" in h.headers else None, h.good())
    assert get(tries=3).read_bytes() == WEIGHT


@pytest.mark.parametrize("total", [3_000_001, 7])
def test_a_server_that_changes_the_length(server, total):
    def act(h):
        if not h.headers.get("Range"): return h.give(WEIGHT, cut=1_000_000, Last_Modified="Monday")
        h.give(WEIGHT[1_000_000:], 206, Content_Range=f"bytes 1000000-{total - 1}/{total}")
    server.act = act
    fails("changed meanwhile|ended after")


def test_a_server_without_ranges(server):
    server.act = lambda h: h.give(h.body, ETag='"v1"', cut=1_000_000 if len(server.asked) == 1 else None)
    assert get().read_bytes() == WEIGHT


def test_a_server_that_goes_on_from_another_place(server):
    def act(h):
        if not h.headers.get("Range"): return h.good(cut=1_000_000)
        h.give(WEIGHT[5:], 206, Content_Range=f"bytes 5-{len(WEIGHT) - 1}/{len(WEIGHT)}")
    server.act = act
    fails("another place")


@pytest.mark.parametrize("span", ["", "bytes", "bytes 1000000-/", "items 1-2/3", "bytes a-b/c"])
def test_a_nonsensical_range(server, span):
    server.act = lambda h: h.good(cut=1_000_000) if not h.headers.get("Range") else h.give(WEIGHT[1_000_000:], 206, Content_Range=span)
    fails("another place")


def test_a_part_that_is_longer_than_the_whole_is_dropped(server):
    server.act = lambda h: h.good(cut=1_000_000) if not h.headers.get("Range") else h.give(b"", 503)
    fails("503")
    with open(published_path("w").with_name("w.pt.part"), "ab") as f: f.write(bytes(9_000_000))
    server.act = None
    assert get().read_bytes() == WEIGHT


def test_a_kill_before_the_last_step(server):
    "Everything has come, the record stands, and then a kill: nothing has to come again."
    def killed(a, b):
        if str(a).endswith(".part"): raise KeyboardInterrupt
        os.rename(a, b)
    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(weights.os, "replace", killed)
        get()
    assert not published_path("w").exists()
    assert get().read_bytes() == WEIGHT and len(server.asked) == 1


def test_a_kill_while_it_comes(server, tmp_path):
    "SIGKILL in the middle of a download; the next process goes on."
    server.act = lambda h: (h.give(WEIGHT, cut=2_000_000, ETag='"v1"'), h.wfile.flush(), time.sleep(3))
    child = multiprocessing.get_context("fork").Process(target=get, kwargs=dict(timeout=30))
    child.start()
    part = published_path("w").with_name("w.pt.part")
    deadline = time.time() + 10
    while not (part.exists() and part.stat().st_size == 2_000_000) and time.time() < deadline: time.sleep(.01)
    child.kill(); child.join()
    nothing_taken()
    server.act = None
    assert get().read_bytes() == WEIGHT and server.asked[-1]["Range"] == "bytes=2000000-"


# ---- the server fails

def test_not_found_is_not_tried_again(server):
    server.act = lambda h: h.give(HTML, 404)
    text = fails("404 Not Found")
    assert len(server.asked) == 1 and "by hand" in text and str(published_path("w")) in text


@pytest.mark.parametrize("code, tried", [(403, 1), (410, 1), (500, 2), (503, 2), (429, 2)])
def test_other_codes(server, code, tried):
    server.act = lambda h: h.give(b"no", code)
    fails(str(code))
    assert len(server.asked) == tried


def test_a_failure_that_passes(server):
    server.act = lambda h: h.give(b"", 503) if len(server.asked) == 1 else h.good()
    assert get().read_bytes() == WEIGHT


def test_a_server_that_says_nothing(server):
    server.act = lambda h: time.sleep(1)
    start = time.time()
    fails("stalls", kind=Unreachable, timeout=.2)
    assert time.time() - start < 3


def test_a_server_that_stops_in_the_middle(server):
    server.act = lambda h: (h.give(WEIGHT, cut=1000), h.wfile.flush(), time.sleep(1))
    fails("stalls", timeout=.2)


def test_a_server_that_drips(server):
    def drip(h):
        h.send_response(200); h.send_header("Content-Length", str(len(WEIGHT))); h.end_headers()
        try:
            h.wfile.write(WEIGHT[:600])
            for i in range(600, 700): h.wfile.write(WEIGHT[i:i + 1]); h.wfile.flush(); time.sleep(.02)
        except OSError: pass
    server.act = drip
    start = time.time()
    fails("stalls", timeout=.3)
    assert time.time() - start < 5


def test_a_redirection_is_followed(server):
    server.act = lambda h: h.good() if h.path.startswith("/there") else h.give(b"", 302, Location="/there/w.pt")
    assert get().read_bytes() == WEIGHT


def test_redirections_in_a_circle(server):
    server.act = lambda h: h.give(b"", 302, Location=h.path)
    fails("circle")


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/w.pt", "data:,hello"])
def test_redirections_to_elsewhere(server, to):
    server.act = lambda h: h.give(b"", 302, Location=to)
    fails("not followed|not allowed")


def test_an_endless_chain_of_redirections(server):
    server.act = lambda h: h.give(b"", 302, Location=f"{h.path}x")
    fails("circle")


def test_connection_refused(server, monkeypatch):
    server.shutdown(); server.server_close()
    assert "refuses" in fails("refuses the connection", kind=Unreachable)


def test_no_such_host(server, monkeypatch):
    monkeypatch.setenv("NAMEDMASK_MIRROR", "http://nowhere.invalid")
    fails("cannot be resolved", kind=Unreachable)


@pytest.mark.parametrize("mirror", ["file:///tmp", "ftp://x", "nonsense"])
def test_a_mirror_that_is_none(server, monkeypatch, mirror):
    monkeypatch.setenv("NAMEDMASK_MIRROR", mirror)
    with pytest.raises(UserError, match="NAMEDMASK_MIRROR"): get()


def test_no_http_at_all(server):
    server.act = lambda h: h.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
    fails("broke off")


def test_a_connection_that_is_reset(server):
    import socket, struct
    def reset(h):
        h.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)); h.connection.close()
    server.act = reset
    fails("broke off|reset")


# ---- the content is not what it should be

@pytest.mark.parametrize("name", ["w", "masks", "archive"])
@pytest.mark.parametrize("kind", ["text/html", "application/octet-stream"])
def test_a_page_in_place_of_the_file(server, name, kind):
    server.act = lambda h: h.give(HTML, Content_Type=kind)
    text = fails("web page", name)
    assert "The page is gone" in text and len(server.asked) == 1
    assert not published_path(name).with_name(published_path(name).name + ".part").exists()


@pytest.mark.parametrize("name", ["w", "masks", "archive"])
@pytest.mark.parametrize("body", [b"", b"Internal error", b"\0" * 10_000])
def test_something_else_in_place_of_the_file(server, name, body):
    server.act = lambda h: h.give(body)
    fails("is not the file", name)


def test_an_archive_that_is_an_error_in_json(server):
    server.act = lambda h: h.give(b'{"error": "no such key"}')
    fails("damaged or not whole", "archive")


@pytest.mark.parametrize("name", ["w", "masks", "archive"])
def test_too_short_with_the_length_told(server, name):
    server.act = lambda h: h.give(h.body[:-20], Content_Length=str(len(h.body)))
    fails("the connection ended after", name)


@pytest.mark.parametrize("name", ["w", "masks", "archive"])
def test_too_short_with_no_length_told(server, name):
    server.act = lambda h: h.give(h.body[:-20], length=False)
    fails("damaged or not whole", name)
    assert not published_path(name).with_name(published_path(name).name + ".part").exists()


def test_the_length_told_is_too_small(server):
    server.act = lambda h: h.give(WEIGHT, Content_Length=str(len(WEIGHT) - 1000))
    fails("damaged or not whole")


def test_the_length_told_is_too_large(server):
    "The rest does not come, however often it is asked for; and the part that the server cannot go on from does not make it try for ever."
    long = dict(Content_Length=str(len(WEIGHT) + 2_000_000), ETag='"v1"')
    server.act = lambda h: h.give(b"", 416) if h.headers.get("Range") else h.give(WEIGHT, **long)
    fails("ended after|416")
    assert len(server.asked) < 8


def test_no_length_told_at_all(server):
    server.act = lambda h: h.give(h.body, length=False)
    assert get().read_bytes() == WEIGHT


def test_chunked(server):
    def chunked(h, last=b"0\r\n\r\n"):
        h.send_response(200); h.send_header("Transfer-Encoding", "chunked"); h.end_headers()
        for i in range(0, len(WEIGHT), 500_000): h.wfile.write(b"%x\r\n%s\r\n" % (len(WEIGHT[i:i + 500_000]), WEIGHT[i:i + 500_000]))
        h.wfile.write(last); h.close_connection = True
    server.act = chunked
    assert get().read_bytes() == WEIGHT
    shutil.rmtree(published_path("w").parent)
    server.act = lambda h: chunked(h, b"80\r\nhalf a chunk")
    fails("broke off|damaged")


@pytest.mark.parametrize("length", ["-5", "many", "²", ""])
def test_a_nonsensical_length(server, length):
    server.act = lambda h: h.give(h.body, Content_Length=length)
    assert get().read_bytes() == WEIGHT


def test_compressed_on_the_way(server):
    server.act = lambda h: h.good(Content_Encoding="gzip")
    fails("compressed")


# ---- the SHA-256

def test_another_sha_than_the_published_one(server, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "w", Published("tests", "https://host.example/some/w.pt", "w", sha256="0" * 64))
    fails("was published")
    assert not published_path("w").with_name("w.pt.part").exists()


def test_a_file_that_changed_on_disk(server):
    path = get()
    path.write_bytes(WEIGHT[:-1] + b"!")
    with pytest.raises(UserError, match="recorded when it was first used"): get()
    path.write_bytes(WEIGHT)
    assert get() == path


def test_a_zip_that_changed_on_disk(server):
    get("masks")
    published_path("masks").write_bytes(MASKS + b"!")
    with pytest.raises(UserError, match="recorded"): get("masks")


def test_a_file_that_changed_on_the_server(server, monkeypatch):
    path = get()
    path.unlink()
    monkeypatch.setitem(BODY, "w.pt", zip_bytes(("w/data.pkl", b"another")))
    with pytest.raises(UserError, match="recorded when it was first used"): get()
    assert not path.exists() and record_path(path).exists()
    record_path(path).unlink()                             # as the message says
    assert get() == path


def test_a_damaged_record(server):
    path = get()
    for text in "", "[]", '{"sha256": 3}':
        record_path(path).write_text(text)
        with pytest.raises(UserError, match="sha256.json"): get()


def test_a_file_put_there_by_hand(server):
    path = published_path("w")
    path.parent.mkdir(parents=True); path.write_bytes(WEIGHT)
    assert get(offline=True) == path and record_path(path).exists() and not server.asked
    record_path(path).unlink()
    path.write_bytes(WEIGHT[:-100])
    with pytest.raises(UserError, match="damaged or not whole"): get(offline=True)


# ---- the disk

def test_no_room(server, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: usage(10**9, 0, 1_000_000))
    fails("needs 3.0 MB, but only 1.0 MB are free")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_fills_up(server):
    path = published_path("w")
    path.parent.mkdir(parents=True)
    real = weights.Part.begin
    def begin(self, *args): real(self, *args); self.path.symlink_to("/dev/full")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(weights.Part, "begin", begin)
        with pytest.raises(UserError, match="no space left"): get()
    nothing_taken()
    assert len(server.asked) == 1
    path.with_name("w.pt.part").unlink()
    assert get().read_bytes() == WEIGHT


def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("NAMEDMASK_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="Cannot write"): get()


def test_a_disk_that_fills_up_while_unpacking(server, monkeypatch):
    path = get("w") and published_path("masks")
    path.parent.mkdir(parents=True); path.write_bytes(MASKS)
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(weights.shutil, "copyfileobj", full)
    with pytest.raises(UserError, match="no space left"): get("masks")
    assert not path.with_suffix("").exists() and not list(path.parent.glob(".unpacking*"))


# ---- unpacking

def refused(tmp_path, body, words, **kw):
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in" / "x.zip").write_bytes(body)
    with pytest.raises(UserError, match=words): unpack(tmp_path / "in" / "x.zip", tmp_path / "in" / "x", **kw)
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["x.zip"] and {p.name for p in tmp_path.iterdir()} == {"in"}


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "//evil", "..", "a\\..\\..\\evil", "C:\\evil", "C:evil"])
def test_no_path_leaves_its_folder(tmp_path, name): refused(tmp_path, zip_bytes(("good", "1"), (name, "x")), "would leave the folder")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_no_links_and_devices(tmp_path, kind):
    info = zipfile.ZipInfo("link")
    info.create_system, info.external_attr = 3, (kind | 0o777) << 16
    refused(tmp_path, zip_bytes((info, "/etc/passwd"), ("link/passwd", "x")), "link or a device")


def test_bombs(tmp_path):
    refused(tmp_path, zip_bytes(("zeros", bytes(70_000_000))), "archive bomb")
    refused(tmp_path, zip_bytes(*[(f"{i}", "") for i in range(200)]), "200 files, more than 100", max_files=100)


def test_a_bomb_that_lies_about_its_size(tmp_path):
    body = bytearray(zip_bytes(("zeros", bytes(5_000_000))))
    for at in (22, body.index(b"PK\1\2") + 24): body[at:at + 4] = (10).to_bytes(4, "little")     # both headers say: 10 bytes
    refused(tmp_path, bytes(body), "damaged")


def test_too_much_for_the_disk(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: usage(10**9, 0, 1000))
    refused(tmp_path, zip_bytes(("a", "1")), "needs 4.1 kB, but only 1.0 kB are free")


def test_damaged_zips(tmp_path):
    refused(tmp_path, b"", "damaged")
    refused(tmp_path, b"PK\3\4 and then nothing", "damaged")
    refused(tmp_path, MASKS[:-30], "damaged")
    stored = zip_bytes(("a", b"x" * 1000), compress=zipfile.ZIP_STORED)
    refused(tmp_path, stored.replace(b"x" * 10, b"y" * 10, 1), "damaged.*CRC")
    with pytest.warns(UserWarning): twice = zip_bytes(("a", "1"), ("a", "2"))
    refused(tmp_path, twice, "twice")
    refused(tmp_path, zip_bytes(("a", "1"), ("a/b", "2")), "Cannot write")
    refused(tmp_path, zip_bytes(("a" * 300, "1")), "too long")
    refused(tmp_path, zip_bytes(("a", "1"), compress=zipfile.ZIP_LZMA), "unusual")
    encrypted = bytearray(zip_bytes(("a", "1")))
    encrypted[6] |= 1; encrypted[encrypted.index(b"PK\1\2") + 8] |= 1
    refused(tmp_path, bytes(encrypted), "encrypted")


def test_what_a_kill_left_is_swept(tmp_path):
    (tmp_path / "x.zip").write_bytes(MASKS)
    (tmp_path / ".unpacking-x-1").mkdir(); (tmp_path / ".unpacking-x-1" / "half").write_text("")
    unpack(tmp_path / "x.zip", tmp_path / "x")
    assert {p.name for p in tmp_path.iterdir()} == {"x", "x.zip"}


# ---- without a network; names; several processes

def test_offline(server, monkeypatch):
    fails("network is forbidden", offline=True)
    monkeypatch.setenv("NAMEDMASK_OFFLINE", "1")
    text = fails("network is forbidden")
    assert PUBLISHED["w"].url in text and str(published_path("w")) in text and not server.asked
    monkeypatch.setenv("NAMEDMASK_OFFLINE", "0")
    path = get()
    monkeypatch.setenv("NAMEDMASK_OFFLINE", "1")
    assert get() == path


def test_find(server, tmp_path, monkeypatch):
    mine = tmp_path / "mine.pt"; mine.write_bytes(WEIGHT)
    assert find(mine) == find(str(mine)) == mine and not server.asked
    assert find("w", timeout=1).read_bytes() == WEIGHT
    with pytest.raises(UserError, match="There is no file .*other.pt"): find(tmp_path / "other.pt")
    with pytest.raises(UserError, match="Did you mean namedmask_voc2012"): find("namedmask_voc_2012")
    with pytest.raises(UserError, match="namedmask download"): find("xyzzy")


def test_download_several(server):
    kw = dict(timeout=1, tries=1, pause=0)
    assert list(fetch_group("tests", **kw)) == ["w", "masks", "archive"] == list(download(["w", "tests"], **kw))
    shutil.rmtree(published_path("w").parent.parent)
    server.act = lambda h: h.give(b"", 404) if h.path.endswith("w.pt") else h.good()
    with pytest.raises(UserError, match="404"): download(["tests"], **kw)
    assert published_path("archive").exists()              # one that is missing does not keep back the others
    with pytest.raises(UserError, match="neither a file nor"): download(["archive", "nonsense"])
    with pytest.raises(UserError, match="no group"): fetch_group("nonsense")


def test_an_unreachable_server_is_not_asked_again(server):
    server.act = lambda h: h.give(b"", 500)
    with pytest.raises(UserError, match="answers 500") as error: download("tests", tries=1, pause=0)
    assert len(server.asked) == 1 and str(error.value).count("was not asked for: host.example cannot be reached") == 2


def test_a_dead_server_does_not_hide_the_others(server, monkeypatch):
    "What succeeds is told as it is there; what fails is told together, at the end."
    monkeypatch.setitem(PUBLISHED, "masks", Published("tests", "https://other.example/masks.zip", "masks"))
    def some(h):
        if "other.example" in h.path: return h.good()
        h.give(b"", 500)
    server.act, told = some, []
    with pytest.raises(UserError) as error: download("tests", lambda *x: told.append(x), tries=1, pause=0)
    assert told == [("masks", published_path("masks").with_suffix(""))]
    assert "answers 500" in str(error.value) and "archive was not asked for: host.example cannot be reached" in str(error.value)


@pytest.mark.parametrize("trick", ["headers", "continue", "redirect", "chunk line"])
def test_a_server_that_keeps_one_waiting(server, trick):
    "A byte now and then in headers, promises to answer, a redirect or a chunk's length: none resets the clock."
    def drip(h):
        try:
            if trick == "redirect" and h.path.endswith("w.pt"):
                h.send_response(302); h.send_header("Location", h.path + "/next.pt"); h.end_headers()
                for _ in range(100): h.wfile.write(b"x" * 1000); time.sleep(.02)
            elif trick == "continue":
                for _ in range(100): h.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n"); time.sleep(.05)
            elif trick == "chunk line":
                h.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n" + WEIGHT[:4] + b"\r\n")
                for _ in range(100): h.wfile.write(b"0"); time.sleep(.05)
            else:
                h.wfile.write(b"HTTP/1.1 200 OK\r\n")
                for _ in range(100): h.wfile.write(b"X-a: b\r\n"); time.sleep(.05)
        except OSError: pass
        h.close_connection = True
    server.act, start = drip, time.monotonic()
    assert "stalls" in fails("stalls", kind=Unreachable) or trick == "redirect"
    assert time.monotonic() - start < 4


def test_a_stream_without_end(server, monkeypatch):
    "Far more than was published is not believed, told or not; and what nothing could go on from is not left on the disk."
    monkeypatch.setitem(PUBLISHED, "w", Published("tests", "https://host.example/some/w.pt", "w", size=1000))
    def endless(h):
        h.send_response(200); h.end_headers()
        try:
            h.wfile.write(WEIGHT)
            while True: h.wfile.write(bytes(2**20))
        except OSError: pass
        h.close_connection = True
    server.act = endless
    fails("far longer than the file that was published")
    assert not published_path("w").with_name("w.pt.part").exists()
    server.act = lambda h: h.give(WEIGHT, Content_Length=str(10**9))
    fails("far longer than the file that was published")


def test_answers_in_parts(server):
    "A server may give less than was asked for, as long as it says so; each part is progress."
    def capped(h):
        start = int(h.headers.get("Range", "bytes=0-")[6:-1])
        stop = min(start + 300_000, len(h.body))
        if not start: return h.give(h.body, cut=300_000, ETag='"v1"')
        h.give(h.body[start:stop], 206, ETag='"v1"', Content_Range=f"bytes {start}-{stop - 1}/{len(h.body)}")
    server.act = capped
    assert get(tries=2).read_bytes() == WEIGHT and len(server.asked) == 1 + -(-(len(WEIGHT) - 300_000) // 300_000)


def test_a_length_that_is_told_only_on_the_way(server):
    "The first answer has none, the second tells it: then it counts, and a third request brings the rest."
    def late(h):
        start = int(h.headers.get("Range", "bytes=0-")[6:-1])
        if not start:
            h.send_response(200); h.send_header("ETag", '"v1"'); h.send_header("Transfer-Encoding", "chunked"); h.end_headers()
            h.wfile.write(b"f4240\r\n" + h.body[:1_000_000]); h.close_connection = True      # a chunk, and no end
            return
        stop = len(h.body) - 100 if len(server.asked) == 2 else None
        h.give(h.body[start:], 206, ETag='"v1"', cut=stop and stop - start, Content_Range=f"bytes {start}-{len(h.body) - 1}/{len(h.body)}")
    server.act = late
    assert get(tries=3).read_bytes() == WEIGHT


def test_more_than_was_promised(server):
    "Bytes beyond the end that was told are no part of the file."
    def long(h):
        start = int(h.headers.get("Range", "bytes=0-")[6:-1])
        if not start: return h.give(h.body, cut=300_000, ETag='"v1"')
        h.give(h.body[start:] + b"more", 206, ETag='"v1"', Content_Range=f"bytes {start}-{len(h.body) - 1}/{len(h.body)}")
    server.act = long
    assert get().read_bytes() == WEIGHT


def test_an_old_checkpoint_that_was_cut(server, monkeypatch):
    "The format before PyTorch 1.6 has no table of contents: that its numbers are all there shows when they are read."
    import torch
    out = io.BytesIO(); torch.save(dict(a=torch.rand(300_000)), out, _use_new_zipfile_serialization=False)
    monkeypatch.setitem(BODY, "w.pt", out.getvalue()[:900_000])
    server.act = lambda h: h.give(h.body, length=False)
    fails("damaged or not whole")
    assert not record_path(published_path("w")).exists()
    monkeypatch.setitem(BODY, "w.pt", out.getvalue())
    server.act = None
    assert get().stat().st_size == len(out.getvalue())


def test_a_broken_table_of_contents(server, monkeypatch):
    "A zip file whose table of contents would begin before the file does: damaged, and fetched again the next time."
    i = MASKS.index(b"PK\5\6")
    monkeypatch.setitem(BODY, "masks.zip", MASKS[:i + 16] + b"\xf0\xff\xff\x7f" + MASKS[i + 20:])
    fails("damaged or not whole", "masks")
    monkeypatch.setitem(BODY, "masks.zip", MASKS)
    assert get("masks").is_dir()


def test_a_checkpoint_that_swells(server, monkeypatch, tmp_path):
    from namedmask.weights import read_weights
    bomb = zip_bytes(("w/data.pkl", b"x"), ("w/data/0", bytes(2**27)))
    monkeypatch.setitem(BODY, "w.pt", bomb)
    fails("archive bomb")
    (tmp_path / "mine.pt").write_bytes(bomb)
    with pytest.raises(UserError, match="archive bomb"): read_weights(tmp_path / "mine.pt")


@pytest.mark.parametrize("name, body", [("archive", b"{}"), ("archive", b'{"error": []}'), ("archive", b'{"error": ["no such key"]}'), ("archive", b'{"a": ["n/a.jpg"], "a": ["n/b.jpg"]}'),
                                        ("masks", zip_bytes()), ("w", zip_bytes(("readme.txt", "nothing here")))])
def test_nothing_in_it(server, monkeypatch, name, body):
    monkeypatch.setitem(BODY, PUBLISHED[name].file, body)
    fails("damaged or not whole", name)
    assert not record_path(published_path(name)).exists()


def test_a_broken_record_costs_no_download(server):
    record = record_path(published_path("w"))
    record.parent.mkdir(parents=True); record.write_text("")
    with pytest.raises(UserError, match="is damaged. Delete it"): get()
    assert not server.asked
    record.unlink()
    assert get().exists()


def test_what_came_is_kept_where_its_record_cannot_be_written(server, monkeypatch):
    def full(path, value, **kw):
        if path.name.endswith(".sha256.json"): raise UserError(f"Cannot write {path}: no space left")
        return real(path, value, **kw)
    real = weights.write_json
    monkeypatch.setattr(weights, "write_json", full)
    with pytest.raises(UserError, match="no space left"): get()
    monkeypatch.setattr(weights, "write_json", real)
    assert get().read_bytes() == WEIGHT and len(server.asked) == 1


def test_another_version_of_a_zip_is_unpacked_anew(server, monkeypatch):
    old = get("masks")
    monkeypatch.setitem(BODY, "masks.zip", zip_bytes(("n01440764/n01440764_1.json", "new")))
    published_path("masks").unlink(); record_path(published_path("masks")).unlink()
    assert get("masks") == old and [p.read_text() for p in old.rglob("*.json")] == ["new"]
    published_path("masks").write_bytes(MASKS); record_path(published_path("masks")).unlink()      # by hand
    assert len(list(get("masks").rglob("*.json"))) == 2
    weights.note_of(old).write_text("{")                                                           # a damaged note: unpacked again
    assert len(list(get("masks").rglob("*.json"))) == 2 and json.loads(weights.note_of(old).read_text())


def test_the_table(server):
    from rich.console import Console
    get("archive")
    out = io.StringIO()
    Console(file=out, width=200).print(downloads_table())
    for name, item in PUBLISHED.items(): assert name in out.getvalue() and item.licence in out.getvalue()
    line, = (l for l in out.getvalue().splitlines() if l.split("│")[1:2] and l.split("│")[1].strip() == "archive")
    assert "yes" in line


def test_two_processes(server):
    "Both get the file, and it comes once."
    server.act = lambda h: (time.sleep(.2), h.good())
    children = [multiprocessing.get_context("fork").Process(target=get, kwargs=dict(timeout=10)) for _ in range(3)]
    for c in children: c.start()
    for c in children: c.join()
    assert [c.exitcode for c in children] == [0, 0, 0] and published_path("w").read_bytes() == WEIGHT and len(server.asked) == 1


def test_two_threads(server):
    server.act = lambda h: (time.sleep(.1), h.good())
    threads = [threading.Thread(target=get, args=("masks",), kwargs=dict(timeout=10)) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(server.asked) == 1 and published_path("masks").with_suffix("").is_dir()
    with locked(published_path("masks").parent): pass      # nobody holds it any more
