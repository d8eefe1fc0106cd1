"""A pipe or a device where a dataset, a result or a configuration has a file: one line, where reading would not end."""

import os
import sys
from pathlib import Path

import pytest

from mtr_lab.cli.targets import check_files
from mtr_lab.data.clips import read_clip
from mtr_lab.data.detection.coco import CocoSource
from mtr_lab.data.detection.voc import read_annotation
from mtr_lab.data.pictures import open_picture
from mtr_lab.data.video.decoding import Unreadable, read_frames
from mtr_lab.data.walk import LeftOut, files_below, printable
from mtr_lab.errors import UserError
from mtr_lab.regular_file import read_regular
from mtr_lab.report.dashboard.reader import Reader
from mtr_lab.results.schema import read_result

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no pipes of that kind")


@pytest.fixture(params=["pipe", "device"])
def at(request: pytest.FixtureRequest):
    """Put a pipe, or a link to a device that never ends, at a path."""

    def put(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path) if request.param == "pipe" else path.symlink_to("/dev/zero")
        return path

    return put


def test_a_list_of_files_has_none(at, tmp_path: Path) -> None:
    at(tmp_path / "class" / "a.jpg")
    (tmp_path / "class" / "b.jpg").touch()
    left_out = LeftOut("fail")
    assert files_below(tmp_path, "class", (".jpg",), left_out) == ["class/b.jpg"]
    assert str(left_out) == "other files: 1 (class/a.jpg)"


def test_readers_refuse_them(at, tmp_path: Path) -> None:
    for read, file in (
        (read_annotation, tmp_path / "a.xml"),
        (lambda _: CocoSource(tmp_path, "val", None), tmp_path / "annotations" / "instances_val.json"),
        (read_result, tmp_path / "run" / "result.json"),
        (lambda file: check_files(file.parent), tmp_path / "conf" / "a.yaml"),
    ):
        with pytest.raises(UserError, match=rf"{file}: it is a pipe or a device"):
            read(at(file))
    for read, file in (
        (open_picture, tmp_path / "a.png"),
        (lambda file: read_clip(file, 2), tmp_path / "b.gif"),
        (lambda file: read_frames(file, lambda available: [0]), tmp_path / "c.mp4"),
        (lambda file: read_frames(file, lambda available: [0]), tmp_path / "d.gif"),
    ):
        with pytest.raises((UserError, Unreadable), match="pipe or a device|Invalid argument"):
            read(at(file))
    with pytest.raises(UserError, match="pipe or a device"):
        Reader([tmp_path / "run"]).data()


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "link").symlink_to("a")
    assert read_regular(tmp_path / "link") == b"content"
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)


def test_a_name_is_one_line() -> None:
    assert printable("a\nb\x1b[31m é \udce9.jpg") == r"a\x0ab\x1b[31m é \udce9.jpg"


def test_a_name_that_is_too_long_has_no_results() -> None:
    with pytest.raises(UserError, match="aaa does not exist"):
        Reader([Path("a" * 5000)]).data()
