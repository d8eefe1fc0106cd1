"""Videos in class folders and in CSV lists."""

from pathlib import Path

import pytest

from mtr_lab import UserError
from mtr_lab.data.video.sources import open_videos


def touch(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"")
    return root


def entries(source) -> list[tuple[str, int]]:
    return [(source.id(i), source.label(i)) for i in range(len(source))]


def test_class_folders_of_a_split_or_of_the_root(tmp_path: Path) -> None:
    root = touch(tmp_path, "val/run/b.mp4", "val/run/a.avi", "val/walk/c.MKV", "val/walk/notes.txt", "train/run/d.mp4")
    source = open_videos(root, "val")
    assert (source.classes, source.num_images) == (["run", "walk"], 3)
    assert entries(source) == [("run/a.avi", 0), ("run/b.mp4", 0), ("walk/c.MKV", 1)]
    assert entries(open_videos(root / "val", "val")) == entries(source)
    fingerprint = source.fingerprint()
    touch(root, "val/walk/new.mp4")
    assert open_videos(root, "val").fingerprint() != fingerprint


@pytest.mark.parametrize(
    ("lines", "expected", "classes"),
    [
        ("a.mp4,walk\nsub/b.mp4,run\n\n", [("a.mp4", 1), ("sub/b.mp4", 0)], ["run", "walk"]),
        ("a.mp4 1\nsub/b.mp4 0", [("a.mp4", 1), ("sub/b.mp4", 0)], None),
        ("path,class\na b.mp4, walk\nc.mp4,run", [("a b.mp4", 1), ("c.mp4", 0)], ["run", "walk"]),
    ],
)
def test_lists(tmp_path: Path, lines: str, expected: list, classes: list | None) -> None:
    (tmp_path / "val.csv").write_text(lines)
    source = open_videos(tmp_path, "val")
    assert entries(source) == expected
    assert source.classes == classes


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.mp4,run\nb.mp4\n", "line 2: 'b.mp4' is not PATH,CLASS"),
        ("a.mp4,run,0\n", "line 1: 'a.mp4,run,0' is not PATH,CLASS"),
        (",run\n", "line 1: ',run' is not PATH,CLASS"),
        ("\n", "lists no video"),
        ("a.mp4,run\na.mp4,jump\n", "lists the video 'a.mp4' more than once"),
        ("a.mp4,0\n./a.mp4,0\n", "lists the video 'a.mp4' more than once"),
        (f"a.mp4,{'9' * 5000}\n", "line 1: the class 9{20} is not the number of a class"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "val.csv").write_text(lines)
    with pytest.raises(UserError, match=message) as mistake:
        open_videos(tmp_path, "val")
    assert str(tmp_path / "val.csv") in str(mistake.value)


def test_a_listed_file_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "val.csv").write_text("gone.mp4,run\n")
    with pytest.raises(UserError, match=r"val\.csv names gone\.mp4, which cannot be read"):
        open_videos(tmp_path, "val").fingerprint()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "neither val.csv nor class folders"),
        (["train/run/a.mp4"], "neither val.csv nor val/"),
        (["val/run/a.txt"], "no videos in the class folders"),
    ],
)
def test_a_directory_without_videos_is_refused(tmp_path: Path, files: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_videos(touch(tmp_path, *files), "val")
