"""Folders of images as they are: links, hidden folders, files of other kinds, names that are not UTF-8."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, features

from mtr_lab.data import ImageDataModule
from mtr_lab.data.folders import find_root
from mtr_lab.data.video.sources import open_videos
from mtr_lab.errors import UserError

Folders = Callable[..., Path]
Module = Callable[..., ImageDataModule]


def ids(data: ImageDataModule) -> list[str]:
    return [id for batch in data.test_dataloader() for id in batch["id"]]


def skipped(data: ImageDataModule) -> list[str]:
    return [id for batch in data.test_dataloader() for id in batch["skipped"]]


@pytest.mark.parametrize("target", [".", "..", "../..", "sub/.."])
@pytest.mark.parametrize("place", ["a", "a/sub", "."])
def test_links_that_loop(folders: Folders, module: Module, tmp_path: Path, target: str, place: str) -> None:
    root = folders("val", a=2, b=1)
    (root / "val/a/sub").mkdir()
    (root / "val/sub").mkdir()
    for name in ("l0", "l1"):  # two links to their own folder once never ended
        (root / "val" / place / name).symlink_to(target)
    leads = r"val/.*l0 leads back to a folder above.*dataset\.on_error=skip"
    if (place, target) == (".", "sub/..") or (place, target) == ("a/sub", "sub/.."):
        leads = r"leads (back to a folder above|to nothing)"
    with pytest.raises(UserError, match=leads):
        module(root=str(root))
    assert ids(module(root=str(root), on_error="skip")) == ["a/0.jpg", "a/1.jpg", "b/0.jpg"]


def test_links_to_other_folders_are_followed(folders: Folders, module: Module, tmp_path: Path) -> None:
    folders("elsewhere", c=2)
    root = folders("val", a=1)
    (root / "val/c").symlink_to(tmp_path / "elsewhere/c")
    (root / "val/a/more").symlink_to(tmp_path / "elsewhere")
    assert ids(module(root=str(root))) == ["a/0.jpg", "a/more/c/0.jpg", "a/more/c/1.jpg", "c/0.jpg", "c/1.jpg"]


def test_links_to_nothing(folders: Folders, module: Module, capsys: pytest.CaptureFixture[str]) -> None:
    root = folders("val", a=1, c=1)
    (root / "val/a/x.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(
        UserError, match=r"cannot decode image a/x\.jpg of .*: No such file or directory.*on_error=skip"
    ):
        ids(module(root=str(root)))
    (root / "val/a/self").symlink_to("self")
    (root / "val/b").symlink_to("/nowhere")
    with pytest.raises(UserError, match=r"the link .*val/a/self leads to nothing.*on_error=skip"):
        module(root=str(root))
    data = module(root=str(root), on_error="skip")
    assert data.class_names == ["a", "b", "c"]  # the labels of later classes do not change
    assert (ids(data), skipped(data)) == (["a/0.jpg", "c/0.jpg"], ["a/x.jpg"])
    assert "left out: links that lead to nothing: 2 (a/self, b)" in capsys.readouterr().out
    assert data.fingerprint() == module(root=str(root), on_error="skip").fingerprint()


def test_files_that_vanish(folders: Folders, module: Module) -> None:
    root = folders("val", a=2)
    kept, strict = (module(root=str(root), on_error=how) for how in ("skip", "fail"))
    before = kept.fingerprint()
    (root / "val/a/0.jpg").unlink()
    assert (ids(kept), skipped(kept)) == (["a/1.jpg"], ["a/0.jpg"])
    assert kept.fingerprint() != before
    with pytest.raises(UserError, match=r"cannot decode image a/0\.jpg"):
        ids(strict)


@pytest.mark.parametrize("folder", ["val", "val/b", "val/b/sub"])
@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_folder_that_cannot_be_read(
    folders: Folders, module: Module, monkeypatch: pytest.MonkeyPatch, folder: str, on_error: str
) -> None:
    root = folders("val", a=2, b=2)
    (root / "val/b/sub").mkdir()
    scandir = os.scandir

    def refusing(path: str | Path) -> object:
        if Path(path) == root / folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root may read every folder
    with pytest.raises(UserError, match=rf"cannot read the folder .*{folder}: Permission denied"):
        module(root=str(root), on_error=on_error)


def test_hidden_folders_and_stray_images(folders: Folders, module: Module, capsys: pytest.CaptureFixture[str]) -> None:
    root = folders("val", **{"a": 1, "b": 1, ".ipynb_checkpoints": 2, "a/.ipynb_checkpoints": 1, "__MACOSX": 1})
    (root / "val/b/._0.jpg").write_bytes(b"a resource fork")
    (root / "val/b/notes.txt").touch()
    (root / "val/stray.jpg").touch()
    os.mkfifo(root / "val/b/pipe.jpg")  # opening it would block
    data = module(root=str(root))
    assert data.class_names == ["a", "b"]
    assert ids(data) == ["a/0.jpg", "b/0.jpg"]
    said = capsys.readouterr().out
    for part in (
        "hidden folders: 3 (.ipynb_checkpoints, __MACOSX, a/.ipynb_checkpoints)",
        "hidden files: 1 (b/._0.jpg)",
        "files beside the class folders: 1 (stray.jpg)",
        "other files: 2 (b/notes.txt, b/pipe.jpg)",
    ):
        assert said.count(part) == 1


def test_images_without_class_folders(folders: Folders, module: Module) -> None:
    with pytest.raises(UserError, match=r"val holds images, but no class folders.*DIR/val/<class>/<image>"):
        module(root=str(folders(val=2)))


def test_every_ending(folders: Folders, module: Module) -> None:
    root = folders("val", a=1)
    endings = ["JPG", "jpeg", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm"]
    names = [f"{ending}.{ending}" for ending in endings + (["avif"] if features.check("avif") else [])]
    for name in names:
        format = "JPEG" if name.endswith("jfif") else None
        Image.new("RGB", (20, 20)).save(root / "val/a" / name, format)
    assert ids(module(root=str(root), batch_size=20)) == sorted(["a/0.jpg", *(f"a/{name}" for name in names)])


def test_names_that_are_not_utf8(folders: Folders, module: Module, tmp_path: Path) -> None:
    root = folders("val", a=2, b=2)
    (root / "val/b").rename(root / "val" / os.fsdecode(b"b\xe9"))
    (root / "val/a/0.jpg").rename(root / "val/a" / os.fsdecode(b"\xff.jpg"))
    data = module(root=str(root), holdout=0.5)
    expected = ["a/1.jpg", "a/\\udcff.jpg", "b\\udce9/0.jpg", "b\\udce9/1.jpg"]
    assert ids(data) == expected
    assert data.class_names == ["a", "b\\udce9"]
    assert data.fingerprint() == module(root=str(root)).fingerprint()
    for content in (b"a/\xff.jpg\nb\xe9/1.jpg\n", "\n".join(expected[1::2]).encode()):
        (tmp_path / "list.txt").write_bytes(content)
        assert ids(module(root=str(root), include=str(tmp_path / "list.txt"))) == expected[1::2]
    (tmp_path / "list.txt").write_bytes(b"a/\xfe.jpg\n")
    with pytest.raises(UserError, match=r"lists .*1 images that are not in .*save the list as UTF-8"):
        module(root=str(root), include=str(tmp_path / "list.txt"))


def test_folders_and_lists_of_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same rules as for images."""
    frames = [Image.new("L", (20, 20), shade) for shade in range(4)]
    for name in ("a/0.gif", "b/0.gif", ".cache/0.gif", "a/._0.gif"):
        path = tmp_path / "val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        frames[0].save(path, save_all=True, append_images=frames[1:])
    (tmp_path / "val/b/0.gif").rename(tmp_path / "val/b" / os.fsdecode(b"\xe9.gif"))
    (tmp_path / "val/a/loop").symlink_to("..")
    (tmp_path / "val/a/dead.gif").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"the link .*a/loop leads back to a folder above"):
        open_videos(tmp_path, "val")
    videos = open_videos(tmp_path, "val", on_error="skip")
    assert videos.classes == ["a", "b"]
    assert [videos.id(index) for index in range(len(videos))] == ["a/0.gif", "a/dead.gif", "b/\\udce9.gif"]
    assert "hidden files: 1 (a/._0.gif); hidden folders: 1 (.cache)" in capsys.readouterr().out
    assert videos.fingerprint()
    clip, _ = videos.read(2, lambda available: [0, available - 1])
    assert clip[:, 0, 0, 0].tolist() == [0, 3]
    (tmp_path / "val.csv").write_bytes("val/a/0.gif,x\nval/b/nothing.gif,y\n".encode("utf-16"))
    listed = open_videos(tmp_path, "val")
    assert (listed.classes, len(listed)) == (["x", "y"], 2)
    with pytest.raises(UserError, match=r"names val/b/nothing\.gif, which cannot be read.*on_error=skip"):
        listed.fingerprint()
    assert open_videos(tmp_path, "val", on_error="skip").fingerprint()


@pytest.mark.parametrize("root", ["pkg://no_such_package/x", "pkg://os/x", "pkg://", "pkg://ours/x"])
def test_a_package_that_is_none_is_named_and_nothing_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    (tmp_path / "ours.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=rf"dataset\.root={root}: expected pkg://PACKAGE/PATH of a package"):
        find_root("camvid", root)


def test_a_folder_of_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_root("camvid", "pkg://mine/images") == tmp_path / "mine" / "images"
