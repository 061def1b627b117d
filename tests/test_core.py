"Bad input and bad disks: what is read is either right or refused in words, and what is written is whole or not there."
import contextlib, errno, json, os, struct, subprocess, sys, warnings, zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from namedmask import core
from namedmask.core import (BadPhoto, RunFolder, UserError, append_jsonl, cache_home, decode_rle, encode_rle, list_photos, locked, mask_file,
                            pick_device, read_archive, read_json, read_jsonl, read_mask, read_names, read_photo, slug, sweep, write_archive, write_atomic,
                            write_json, write_mask)


# Photographs

def noise(size=(40, 30), mode="RGB"):
    "A smooth coloured picture."
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize(size).convert(mode)


def close(a, b, by=8): return np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() < by


@pytest.mark.parametrize("content, reason", [
    (b"", "0 bytes"), (b"<html>not found</html>", "not an image"), (b"\xff\xd8\xff\xe0" + bytes(40), "not an image|damaged"), (bytes(5000), "not an image")])
def test_what_is_no_photograph(tmp_path, content, reason):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(BadPhoto) as e: read_photo(tmp_path / "a.jpg")
    assert any(r in e.value.reason for r in reason.split("|")) and e.value.path == tmp_path / "a.jpg" and "\n" not in str(e.value)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_cut_files(tmp_path, fmt, part):
    "A cut file is refused in words, at whatever byte; Pillow's own errors never come through."
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(tmp_path / "whole", fmt)
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:int(part * len(whole))])
    with pytest.raises(BadPhoto): read_photo(tmp_path / "cut")


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_files_with_wrong_bytes(tmp_path, fmt):
    "Thirty files with a few bytes overwritten: a picture or a BadPhoto."
    rng = np.random.default_rng(2)
    noise((80, 60)).save(tmp_path / "whole", fmt)
    whole = np.frombuffer((tmp_path / "whole").read_bytes(), np.uint8)
    for _ in range(30):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), 6)] = rng.integers(0, 256, 6)
        (tmp_path / "damaged").write_bytes(damaged.tobytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try: assert read_photo(tmp_path / "damaged").mode == "RGB"
            except BadPhoto as bad: assert bad.reason


def test_the_size_guard(tmp_path):
    noise((40, 30)).save(tmp_path / "a.png")
    assert read_photo(tmp_path / "a.png", max_pixels=1200).size == (40, 30)
    with pytest.raises(BadPhoto, match="40×30 is above the size guard"): read_photo(tmp_path / "a.png", max_pixels=1199)
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")                      # 200 megapixels in some kilobytes
    with pytest.raises(BadPhoto, match="size guard of 64 megapixels"): read_photo(tmp_path / "bomb.png")


@pytest.mark.parametrize("mode, ending", [("L", "png"), ("L", "jpg"), ("1", "png"), ("P", "png"), ("P", "gif"), ("RGBA", "png"), ("RGBA", "webp"), ("LA", "png"),
                                          ("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "jpg"), ("LAB", "tif"), ("I;16", "png"), ("I", "tif"), ("F", "tif")])
def test_every_mode_is_eight_bit_rgb(tmp_path, mode, ending):
    im = noise()
    if mode in ("I;16", "I", "F"): im = Image.fromarray((np.asarray(im.convert("L")) * 257.).astype(dict(I=np.int32, F=np.float32).get(mode, np.uint16)))
    elif mode == "LAB":
        from PIL import ImageCms
        im = ImageCms.profileToProfile(im, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    else: im = im.convert(mode)
    im.save(tmp_path / f"a.{ending}")
    got = read_photo(tmp_path / f"a.{ending}")
    assert got.mode == "RGB" and got.size == (40, 30)
    wanted = noise(mode="L").convert("RGB") if mode in ("L", "LA", "I;16", "I", "F") else im.convert("RGB") if mode in ("1", "P") else noise()
    if mode != "LAB": assert close(got, wanted, 14), mode


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_what_is_transparent_is_white(tmp_path, mode):
    black = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    black.paste((200, 0, 0, 255), (0, 0, 10, 10))
    if mode == "P":
        im = Image.new("P", (20, 10), 1); im.putpalette([200, 0, 0, 0, 0, 0]); im.paste(0, (0, 0, 10, 10))
        im.save(tmp_path / "a.png", transparency=1)
    elif mode == "L":
        im = Image.new("L", (20, 10), 7); im.paste(60, (0, 0, 10, 10))
        im.save(tmp_path / "a.png", transparency=7)
    else: black.convert(mode).save(tmp_path / "a.png")
    x = np.asarray(read_photo(tmp_path / "a.png"))
    assert (x[:, 10:] == 255).all() and (x[:, :10] < 210).all()


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation(tmp_path, turn, ending):
    upright = noise((48, 32))
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = upright.transpose(getattr(Image.Transpose, undo[turn])) if turn > 1 else upright
    exif = Image.Exif()
    exif[274] = turn
    stored.save(tmp_path / f"a.{ending}", exif=exif, **(dict(quality=95) if ending != "png" and ending != "tif" else {}))
    got = read_photo(tmp_path / f"a.{ending}")
    assert got.size == (48, 32) and close(got, upright)
    assert read_photo(tmp_path / f"a.{ending}", at_least=12).size in [(48, 32), (24, 16)]


def test_broken_exif_does_not_cost_the_photograph(tmp_path):
    for k, exif in enumerate([b"Exif\0\0" + b"rubbish" * 9, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(9), b"Exif\0\0II*\0\xff\xff\xff\xff"]):
        noise().save(tmp_path / f"{k}.jpg", exif=exif)
        assert read_photo(tmp_path / f"{k}.jpg").size == (40, 30), exif


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_of_moving_pictures_the_first(tmp_path, ending):
    frames = [Image.new("RGB", (20, 10), c) for c in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
    assert close(read_photo(tmp_path / f"a.{ending}"), frames[0])


def test_drafts_keep_the_wanted_size(tmp_path):
    noise((1600, 1200)).save(tmp_path / "a.jpg")
    noise((1600, 1200), "CMYK").save(tmp_path / "cmyk.jpg")
    assert read_photo(tmp_path / "a.jpg", at_least=256).size == (400, 300)
    for p in ("a.jpg", "cmyk.jpg"): assert min(read_photo(tmp_path / p, at_least=500).size) >= 500
    assert read_photo(tmp_path / "a.jpg").size == (1600, 1200)


def test_what_is_there_but_cannot_be_opened(tmp_path, monkeypatch):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "round.jpg").symlink_to("round.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    for p, reason in (("folder.jpg", "a folder"), ("link.jpg", "gone"), ("gone.jpg", "gone"), ("round.jpg", ""), ("pipe.jpg", "0 bytes"), ("a\0b.jpg", "")):
        with pytest.raises(BadPhoto) as e: read_photo(tmp_path / p)
        assert reason in e.value.reason
    noise().save(tmp_path / "a.jpg")
    def refuse(*args, **kw): raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(core.Image, "open", refuse)
    with pytest.raises(BadPhoto, match="permission"): read_photo(tmp_path / "a.jpg")


@pytest.mark.parametrize("content, words", [
    (b"<!DOCTYPE html><title>404</title>", "web page"), (b"\n <html>", "web page"), (b"\0\0\0\x18ftypheic" + bytes(30), "HEIC"), (b"\0\0\0\x18ftypisom" + bytes(30), "video"),
    (b"%PDF-1.4", "PDF"), (b"PK\x03\x04abc", "zip"), (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"), (b"<svg xmlns=''/>", "SVG"),
    (b"version https://git-lfs.github.com/spec/v1", "LFS"), (bytes(9000), "zeros")])
def test_the_reason_names_what_it_is(tmp_path, content, words):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(BadPhoto, match=words): read_photo(tmp_path / "a.jpg")


def test_a_bomb_is_refused_unread_and_without_noise(tmp_path):
    chunk = lambda t, d: struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d))
    for side in (10_000, 200_000):
        (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(99))))
        with pytest.raises(BadPhoto, match="size guard of 64 megapixels"): read_photo(tmp_path / "b.png")
    code = "import sys; from namedmask.core import *\ntry: read_photo(sys.argv[1])\nexcept BadPhoto: pass"
    Image.new("1", (10_000, 9_500)).save(tmp_path / "c.png")                          # where Pillow would warn
    assert not subprocess.run([sys.executable, "-c", code, str(tmp_path / "c.png")], capture_output=True, check=True).stderr


@pytest.mark.parametrize("values", [(0, 1), (0, 255), (0, 65535), (-400, 8600), (0, 1e6)])
def test_wide_numbers_keep_their_order(tmp_path, values):
    x = np.linspace(*values, 40 * 30, dtype=np.float32).reshape(30, 40)
    Image.fromarray(x).save(tmp_path / "a.tif")
    got = np.asarray(read_photo(tmp_path / "a.tif"))[..., 0].ravel().astype(int)
    assert (np.diff(got) >= 0).all() and got[0] == 0 and got[-1] == 255
    x[3, 3] = np.nan
    Image.fromarray(x).save(tmp_path / "a.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert np.asarray(read_photo(tmp_path / "a.tif"))[20:].max() == 255


def test_two_pictures_in_one_file(tmp_path):
    "MPO, as some telephones and stereo cameras write it, under its own name and as .jpg."
    for n in ("a.mpo", "b.jpg"): noise().save(tmp_path / n, "MPO", save_all=True, append_images=[noise().rotate(180)])
    assert list_photos(tmp_path)[0] == ["a.mpo", "b.jpg"] and all(close(read_photo(tmp_path / n), noise(), 14) for n in ("a.mpo", "b.jpg"))


def test_a_link_to_itself_has_a_reason(tmp_path):
    (tmp_path / "a.jpg").symlink_to("a.jpg")
    with pytest.raises(BadPhoto, match="leads back to itself"): read_photo(tmp_path / "a.jpg")


# Folders of photographs

def test_files_that_only_look_like_photographs(tmp_path):
    for n in ("Thumbs.db", "desktop.ini", "._a.jpg", ".DS_Store"): (tmp_path / n).write_bytes(b"x")
    for n in ("a.HEIC", "b.CR2", "c.eps", "d.pdf", "e.jpg."): (tmp_path / n).write_bytes(b"x")
    photos, skipped = list_photos(tmp_path)
    assert not photos and [s["photo"] for s in skipped] == ["a.HEIC", "b.CR2", "c.eps", "d.pdf", "e.jpg."]
    assert "convert it" in skipped[0]["reason"] and "raw camera file" in skipped[1]["reason"]


def test_deep_folders(tmp_path):
    deep = tmp_path / "/".join(["d"] * 30)
    deep.mkdir(parents=True)
    noise().save(deep / "a.png")
    assert list_photos(tmp_path)[0] == ["/".join(["d"] * 30 + ["a.png"])]


def test_listing(tmp_path):
    names = ["b.JPG", "a.jpeg", "c.png", "sub/deeper/ü ñ 猫.webp", "sub/quote'\" $x;#.jpg", "-rf.jpg", "sub/a.jpeg", "two.dots.jpg", " .jpg", "new\nline.png"]
    for n in names:
        (tmp_path / n).parent.mkdir(parents=True, exist_ok=True)
        noise().save(tmp_path / n, "PNG")
    for n in ("notes.txt", "sub/movie.mp4", "none", ".hidden.jpg", ".git/a.jpg"):
        (tmp_path / n).parent.mkdir(exist_ok=True)
        (tmp_path / n).write_text("x")
    photos, skipped = list_photos(tmp_path)
    assert photos == sorted(names)
    assert [s["photo"] for s in skipped] == ["none", "notes.txt", "sub/movie.mp4"] and all("ending" in s["reason"] for s in skipped)
    assert all(read_photo(tmp_path / p).size == (40, 30) for p in photos)
    assert len({mask_file("m", p) for p in photos}) == len(names)                     # one stem, two endings: two masks


def test_names_that_are_not_utf8(tmp_path):
    odd = os.fsdecode(b"caf\xe9.jpg")
    noise().save(tmp_path / odd)
    photos, _ = list_photos(tmp_path)
    assert photos == [odd] and read_photo(tmp_path / odd).size == (40, 30)
    write_archive(tmp_path / "archive.json", {"café": photos})
    write_mask(mask_file(tmp_path / "m", odd), np.eye(4, dtype=bool))
    write_json(tmp_path / "a.json", photos, indent=1)
    append_jsonl(tmp_path / "a.jsonl", dict(photo=odd))
    assert read_archive(tmp_path / "archive.json") == {"café": [odd]} and read_json(tmp_path / "a.json") == [odd]
    assert read_jsonl(tmp_path / "a.jsonl") == [dict(photo=odd)] and (read_mask(mask_file(tmp_path / "m", odd)) == np.eye(4)).all()


def test_links_are_followed_but_not_round(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    for d in (root / "sub", other): d.mkdir(parents=True)
    noise().save(other / "a.jpg")
    (root / "there").symlink_to(other)
    (root / "sub" / "up").symlink_to(root)
    (root / "sub" / "self").symlink_to("self")
    (root / "b.jpg").symlink_to(other / "a.jpg")
    photos, skipped = list_photos(root)
    assert photos == ["b.jpg", "there/a.jpg"] and all("self" in s["photo"] for s in skipped)


def test_a_folder_that_cannot_be_read_is_listed(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    noise().save(tmp_path / "a.jpg")
    scandir = os.scandir
    def refuse(path):
        if str(path).endswith("locked"): raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    photos, skipped = list_photos(tmp_path)
    assert photos == ["a.jpg"] and skipped == [dict(photo="locked", reason="folder cannot be read: Permission denied")]


def test_no_folder(tmp_path):
    (tmp_path / "file").touch()
    for p in ("gone", "file", "a\0b"):
        with pytest.raises(UserError, match="not a folder"): list_photos(tmp_path / p)
    assert list_photos(tmp_path)[0] == []


# Writing

def litter(folder): return [p.name for p in Path(folder).rglob(".writing-*")]


def test_a_write_is_whole_or_not_there(tmp_path):
    path = tmp_path / "deep" / "er" / "a.txt"
    with write_atomic(path) as tmp: tmp.write_text("old")
    for error in (RuntimeError, KeyboardInterrupt, UserError):
        with pytest.raises(error), write_atomic(path) as tmp:
            tmp.write_text("half of the n")
            raise error("stop")
    assert path.read_text() == "old" and not litter(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o666 & ~core._umask()


@pytest.mark.parametrize("code, words", [("ENOSPC", "no space left"), ("EDQUOT", "quota"), ("EROFS", "read-only"), ("EACCES", "permission"), ("EFBIG", "larger than")])
@pytest.mark.parametrize("moment", ["mkstemp", "write", "replace"])
def test_disks_that_refuse(tmp_path, monkeypatch, code, words, moment):
    (tmp_path / "a.json").write_text("1")
    def refuse(*args, **kw): raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
    target = dict(mkstemp=(core.tempfile, "mkstemp"), write=(Path, "write_bytes"), replace=(os, "replace"))[moment]
    monkeypatch.setattr(*target, refuse)
    with pytest.raises(UserError, match=words) as e: write_json(tmp_path / "a.json", 2)
    assert str(tmp_path / "a.json") in str(e.value) and not litter(tmp_path) and (tmp_path / "a.json").read_text() == "1"


def test_a_library_that_hides_the_full_disk(tmp_path, monkeypatch):
    "PyTorch and safetensors report a full disk in errors of their own."
    monkeypatch.setattr(core.shutil, "disk_usage", lambda p: type("", (), dict(free=0)))
    with pytest.raises(UserError, match="no space left"), write_atomic(tmp_path / "a") as tmp: raise RuntimeError("unexpected pos 64 vs 0")
    assert not litter(tmp_path)


@contextlib.contextmanager
def small_disk(folder, options):
    "A file system of its own, where the tests may mount one."
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode: pytest.skip("nothing can be mounted here")
    try: yield folder
    finally: subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's tmpfs")
def test_a_disk_that_is_full(tmp_path):
    with small_disk(tmp_path / "disk", "size=64k") as disk:
        write_json(disk / "a.json", "small")
        for make in (lambda: write_json(disk / "a.json", "x" * 100_000), lambda: write_mask(disk / "a.json", np.random.default_rng(0).random((900, 900)) > .5)):
            with pytest.raises(UserError, match="no space left"): make()
        assert read_json(disk / "a.json") == "small" and not litter(disk)
        with pytest.raises(UserError, match="no space left"):
            for _ in range(100): append_jsonl(disk / "a.jsonl", dict(x="y" * 1000))
        assert all(r == dict(x="y" * 1000) for r in read_jsonl(disk / "a.jsonl"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's tmpfs")
def test_a_disk_that_may_only_be_read(tmp_path):
    with small_disk(tmp_path / "disk", "ro") as disk:
        for make in (lambda: write_json(disk / "a.json", 1), lambda: write_json(disk / "b" / "a.json", 1), lambda: append_jsonl(disk / "a.jsonl", {}),
                     lambda: locked(disk).__enter__(), lambda: locked(disk / "b").__enter__()):
            with pytest.raises(UserError, match="read-only"): make()


def test_files_and_folders_in_each_others_place(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    for path in ("file/a.json", "file/deep/a.json", "dangling/a.json"):
        with pytest.raises(UserError, match="is a file, not a folder"): write_json(tmp_path / path, 1)
    with pytest.raises(UserError, match="folder"): write_json(tmp_path / "folder", 1)
    with pytest.raises(UserError, match="too long"): write_json(tmp_path / ("x" * 300) / "a.json", 1)
    with pytest.raises(UserError): append_jsonl(tmp_path / "folder", {})
    assert (tmp_path / "file").read_text() == "mine" and not litter(tmp_path)


def test_the_sweep_takes_litter_alone(tmp_path):
    for p in (".writing-a-.tmp", "masks/saliency/.writing-999999999-b.tmp", "masks/a.jpg.json", ".lock", "writing-c.tmp"):
        (tmp_path / p).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / p).touch()
    sweep(tmp_path)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"a.jpg.json", ".lock", "writing-c.tmp"}


def test_one_process_at_a_time(tmp_path):
    hold = subprocess.Popen([sys.executable, "-c", f"from namedmask.core import locked\nwith locked({str(tmp_path)!r}): print('held', flush=True); input()"],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert hold.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="Another process"), locked(tmp_path): pass
    hold.kill(); hold.wait()
    with locked(tmp_path): pass                                                       # a lock dies with its holder
    with locked(tmp_path / "new" / "folder"): assert (tmp_path / "new" / "folder").is_dir()
    with pytest.raises(ZeroDivisionError), locked(tmp_path): 1 / 0
    with locked(tmp_path): pass


# Reading what was written

def test_damaged_json(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match="no file"): read_json(path)
    for text in (b"", b"{", b'{"a": ', b"\xff\xfe\x00", b"[" * 100_000):
        path.write_bytes(text)
        with pytest.raises(UserError, match="a.json"): read_json(path)
    with pytest.raises(UserError): read_json(tmp_path)


def test_a_log_cut_by_a_kill(tmp_path):
    path = tmp_path / "a.jsonl"
    assert read_jsonl(path) == []
    for k in range(3): append_jsonl(path, dict(step=k, name="ü"))
    path.write_bytes(path.read_bytes()[:-7])
    assert [r["step"] for r in read_jsonl(path)] == [0, 1]
    append_jsonl(path, dict(step=2))                                                  # written after half a line
    append_jsonl(path, dict(step=3))
    assert [r["step"] for r in read_jsonl(path)][-1] == 3
    path.write_bytes(b'{"step": 0}\n\xff\xfe\n{"step": 1}\n')
    assert [r["step"] for r in read_jsonl(path)] == [0, 1]


def test_masks_go_round(tmp_path):
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (1, 50), (50, 1), (37, 61), (480, 640)):
        for mask in (rng.random(shape) > 0.5, np.zeros(shape, bool), np.ones(shape, bool)):
            write_mask(tmp_path / "m.json", mask)
            got = read_mask(tmp_path / "m.json")
            assert got.dtype == bool and got.shape == shape and (got == mask).all()
    assert (decode_rle(dict(size=[2, 3], counts=[1, 2, 3])) == [[0, 1, 0], [1, 0, 0]]).all()
    assert json.loads((tmp_path / "m.json").read_text()).keys() == {"size", "counts"}


@pytest.mark.parametrize("damage", [
    b"", b"[]", b"7", b"null", b'{"size": [4, 4]}', b'{"counts": "04"}', b'{"size": [4], "counts": "0"}', b'{"size": "44x", "counts": "0"}', b'{"size": [4, 4], "counts": 3}',
    b'{"size": [4, 4], "counts": null}', b'{"size": [4, 4], "counts": "\\u00fc"}', b'{"size": [4, 4], "counts": [1, "x"]}', b'{"size": [4, 4], "counts": [99]}',
    b'{"size": [4, 4], "counts": "oooooooo"}', b'{"size": [-4, 4], "counts": "0"}', b'{"size": [null, 4], "counts": "0"}', b'{"size": [4, 4], "counts": ""}',
    b'{"size": [4, 4], "counts": [3]}', b'{"size": [4, 4], "counts": {"a": 1}}', b'{"size": [4, 4], "counts": [-1, 17]}', b'{"size": [1000000, 1000000000], "counts": "0"}'])
def test_damaged_masks(tmp_path, damage):
    (tmp_path / "m.json").write_bytes(damage)
    with pytest.raises(UserError, match="m.json"): read_mask(tmp_path / "m.json")


def test_archives(tmp_path):
    archive = {"tv/monitor": ["a.jpg", "ü/b.png"], "none": []}
    write_archive(tmp_path / "a.json", archive)
    assert read_archive(tmp_path / "a.json") == archive and list(read_archive(tmp_path / "a.json")) == list(archive)
    for wrong in ([], {"a": "b.jpg"}, {"a": [1]}, {"a": None}, "x", 3):
        write_json(tmp_path / "a.json", wrong)
        with pytest.raises(UserError, match="not an archive"): read_archive(tmp_path / "a.json")


# Names

@pytest.mark.parametrize("given, wanted", [
    ("cat, dog", ["cat", "dog"]), ("  cat ,, dog , ", ["cat", "dog"]), ("cat", ["cat"]), (["cat", "teddy  bear"], ["cat", "teddy bear"]), (("a",), ["a"]),
    ("tv/monitor, Café, 猫, cat's eye", ["tv/monitor", "Café", "猫", "cat's eye"]), ({"cat": ["tabby", "kitten"]}, ["cat"]), ("photos.d, a.b", ["photos.d", "a.b"]),
    (", ".join(f"name {i}" for i in range(1000)), [f"name {i}" for i in range(1000)]), ("a\0b", ["a\0b"])])
def test_names(given, wanted): assert list(read_names(given)) == wanted


@pytest.mark.parametrize("given, words", [
    ("", "No names"), (" , ,", "No names"), ([], "No names"), ({}, "No names"), ([""], "No names"), ("cat, dog, cat", '"cat" is given twice'),
    ("cat, Cat", "twice"), ("tv/monitor, tv monitor", "twice"), ("background, cat", "background"), ("gone.txt", "no names file gone.txt"), (Path("gone"), "no names file gone")])
def test_names_that_will_not_do(given, words):
    with pytest.raises(UserError, match=words): read_names(given)


def test_a_file_of_names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeff# things at home\r\n\r\ntv/monitor: television, computer monitor\r\n  cat  \r\nteapot:\r\nCafé # with cake\r\n".encode())
    assert read_names(path) == read_names(str(path)) == {"tv/monitor": ["television", "computer monitor"], "cat": ["cat"], "teapot": ["teapot"], "Café": ["Café"]}
    for content, words in ((b"", "No names"), (b"# nothing\n\n", "No names"), (b"caf\xe9\n", "UTF-8"), (b"cat\n dog\ncat: tabby\n", "twice")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words): read_names(path)
    with pytest.raises(UserError): read_names(tmp_path)                               # a folder is no list of names


def test_slugs_are_file_names():
    names = ["tv/monitor", "..", "a/../b", "C:\\x", "aux?", "*", "猫", "a" * 300, "b" * 299 + "/", "x\0y", "New York", "%41", "é" * 100]
    slugs = [slug(n) for n in names]
    assert slug("tv/monitor") == "tv_monitor" and len(set(slugs)) == len(names)
    assert all(0 < len(s.encode()) <= 120 and not set(s) & set('/\\\0?*:"<>|\n') and not s.startswith(".") for s in slugs)


# The rest

def test_devices():
    assert pick_device("cpu").type == "cpu" and pick_device().type in ("cpu", "cuda")
    for wrong in ("gpu", "", "tpu:0", "meta", "cuda:x"):
        with pytest.raises(UserError): pick_device(wrong)
    import torch
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="No CUDA"): pick_device("cuda")


def test_the_cache_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.setenv("NAMEDMASK_HOME", str(tmp_path))
    assert cache_home() == tmp_path
    monkeypatch.setenv("NAMEDMASK_HOME", "")
    assert cache_home() == Path.home() / ".cache" / "namedmask"


@pytest.mark.parametrize("rle", [dict(size=[10**6, 10**6], counts="04"), dict(size=[65536, 65536], counts=[0]), dict(size=[4, 4], counts=[20, -4]),
                                 dict(size=[-1, 4], counts=[]), dict(size=[4, 4], counts="~~~~")])
def test_a_mask_of_an_impossible_size_is_refused_before_it_is_decoded(tmp_path, rle):
    write_json(tmp_path / "m.json", rle)
    with pytest.raises(UserError, match="m.json"): read_mask(tmp_path / "m.json")


def test_masks_of_photographs_with_the_longest_names(tmp_path):
    "A file name may have 255 bytes, and `.json` comes on top; two that begin alike do not meet."
    names = ["sub/" + "é" * 125 + end for end in (".jpg", ".png")] + ["x" * 251 + ".jpg"]
    for k, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True); (tmp_path / name).touch()
        write_mask(mask_file(tmp_path, name), np.eye(4, 5 + k, dtype=bool))
    assert [read_mask(mask_file(tmp_path, n)).shape[1] for n in names] == [5, 6, 7] and mask_file("m", "a/b.jpg") == Path("m/a/b.jpg.json")


def test_a_hash_inside_a_name_is_no_comment(tmp_path):
    (tmp_path / "n.txt").write_text("C# book\n# a comment\ncat # another\n")
    assert list(read_names(tmp_path / "n.txt")) == ["C# book", "cat"]


def test_prompts_cannot_stand_in_a_line_of_names():
    "Its commas would be taken for those between names."
    with pytest.raises(core.UsageError, match="names file"): read_names("tv/monitor: television, computer monitor")
    assert read_names(["tv/monitor: television, computer monitor"]) == {"tv/monitor": ["television", "computer monitor"]}
