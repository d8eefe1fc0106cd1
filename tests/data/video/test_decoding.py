"""Frames of video files, of damaged ones too."""

import struct
from pathlib import Path

import pytest
from PIL import Image
from videos import write_audio, write_video

from mtr_lab import UserError
from mtr_lab.data.video import decoding
from mtr_lab.data.video.decoding import Unreadable, read_frames


@pytest.fixture(params=["av", "cv2", "torchcodec"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each installed decoder as the only one."""
    name = request.param
    pytest.importorskip(name)
    if not decoding._works(name):
        pytest.skip(f"{name} does not run here")
    monkeypatch.setattr(decoding, "decoder", lambda indexed=True: name)
    return name


@pytest.mark.parametrize(("name", "codec"), [("clip.mp4", "mpeg4"), ("clip.avi", "mjpeg"), ("clip.mkv", "mpeg4")])
def test_chosen_frames(tmp_path: Path, decoder: str, name: str, codec: str) -> None:
    """Grey frames of rising brightness."""
    if decoder == "torchcodec" and name == "clip.avi":
        pytest.skip("read by another decoder")
    video, lengths = write_video(tmp_path / name, 12, codec), []
    frames = read_frames(video, lambda available: lengths.append(available) or [0, 5, 5, 11])
    assert lengths == [12]
    assert frames.shape == (4, 3, 32, 48)
    assert frames.float().mean((1, 2, 3)).tolist() == pytest.approx([20, 120, 120, 240], abs=6)


def test_a_file_that_ends_before_its_header_says_has_the_frames_that_it_has(tmp_path: Path) -> None:
    pytest.importorskip("av")
    whole, lengths = write_video(tmp_path / "clip.avi", 40, "mjpeg").read_bytes(), []
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    frames = read_frames(tmp_path / "cut.avi", lambda available: lengths.append(available) or [0, available - 1])
    assert lengths[0] == 40
    assert 10 < lengths[-1] < 30
    assert frames[1].float().mean() == pytest.approx(20 + 20 * ((lengths[-1] - 1) % 12), abs=6)


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "audio", "no frame", "header", "no data"])
def test_a_file_without_frames_is_refused(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("av")
    file = tmp_path / "clip.mp4"
    if kind == "empty":
        file.touch()
    elif kind == "text":
        file.write_text("no video")
    elif kind == "cut":
        file.write_bytes(write_video(tmp_path / "whole.mp4", 12, "mpeg4").read_bytes()[:200])
    elif kind == "audio":
        file = write_audio(tmp_path / "clip.mkv")
    elif kind == "header":  # Matroska lists its streams before the first frame
        file = write_video(tmp_path / "clip.mkv", 0)
    elif kind == "no data":  # the index promises twelve frames
        whole = write_video(tmp_path / "whole.mp4", 12, "mpeg4", movflags="faststart").read_bytes()
        file.write_bytes(whole[: whole.index(b"mdat") + 4])
    else:
        file = tmp_path / "clip"
        file.mkdir()
    reasons = {"empty": "the file is empty", "audio": "it has no video stream", "no frame": "it has no frame"}
    reasons |= {"header": "it has no frame", "no data": "it has no frame"}
    with pytest.raises(Unreadable, match=reasons.get(kind, "Invalid data")) as refusal:
        read_frames(file, lambda available: [0])
    assert str(tmp_path) not in str(refusal.value)


def test_animations_and_folders_take_no_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "DECODERS", {})
    pages = [Image.new("RGB", (6, 4), (10 * i, 0, 0)) for i in range(12)]
    pages[0].save(tmp_path / "clip.gif", save_all=True, append_images=pages[1:])
    (tmp_path / "clip").mkdir()
    for i, page in enumerate(pages):
        page.save(tmp_path / "clip" / f"frame{i}.png")
    for clip in (tmp_path / "clip.gif", tmp_path / "clip"):
        frames = read_frames(clip, lambda available: [0, available - 2, available - 1])
        assert frames[:, 0].float().mean((1, 2)).tolist() == [0, 100, 110]


def test_without_a_decoder_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoding.decoder.cache_clear()
    monkeypatch.setattr(decoding, "installed", lambda name: False)
    with pytest.raises(UserError, match=r"pip install 'mtr-lab\[video\]'"):
        read_frames(tmp_path / "clip.mp4", lambda available: [0])
    assert decoding.decoder_version() == ""
    decoding.decoder.cache_clear()


def test_turned_videos_are_read_upright(tmp_path: Path, decoder: str) -> None:
    """As a phone writes them: the pixels lie on their side, and the file says to turn them clockwise."""
    content = write_video(tmp_path / "clip.mp4", 3, left=60).read_bytes()
    identity, clockwise = (
        struct.pack(">9i", *matrix)
        for matrix in ([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], [0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30])
    )
    track = content.index(b"tkhd")
    turned = content[:track] + content[track:].replace(identity, clockwise, 1)
    assert turned != content
    (tmp_path / "turned.mp4").write_bytes(turned)
    (frame,) = read_frames(tmp_path / "turned.mp4", lambda available: [0]).float()
    assert frame.shape == (3, 48, 32)
    assert frame[:, :20].mean() == pytest.approx(80, abs=8)  # the brighter left becomes the top
    assert frame[:, 28:].mean() == pytest.approx(20, abs=8)
