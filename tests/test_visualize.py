"""``python -m mtr_lab.visualize``: files and options first, Hydra overrides anywhere."""

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from mtr_lab.visualization import SAMPLE_IMAGES
from mtr_lab.visualize import DEFAULT_POLICIES, main

SAMPLE = Path(str(resources.files("mtr_lab") / "assets" / "imagenette_sample"))
TINY = ["backbone.pretrained=false", "backbone.depth=6", "backbone.embed_dim=16", "mtr.ratio=0.3"]


@pytest.fixture
def visualize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_command: Callable):
    """Call the program in an empty folder: ``visualize("dog.jpg", "mtr.ratio=0.3")`` -> exit code, texts, folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> SimpleNamespace:
        return SimpleNamespace(**vars(run_command(main, *arguments)), folder=tmp_path)

    return run


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_the_bundled_images_without_any_argument(visualize) -> None:
    run = visualize(*TINY)
    assert run.code == 0, run.err
    stems = [Path(name).stem for name in SAMPLE_IMAGES]
    expected = {
        f"{stem}_{what}" for stem in stems for what in ("mtr.png", "mtr.svg", "mtr.gif", "policies.png", "policies.svg")
    }
    assert {path.name for path in (run.folder / "pictures").iterdir()} == expected
    first, *written = run.out.splitlines()
    assert "mtr, fovea, write, random; writing to pictures" in first
    assert {line.removeprefix("wrote pictures/") for line in written} == expected


def test_the_contracts_command_line(visualize) -> None:
    """Overrides may follow a list, stand between files, and name any group."""
    dog = SAMPLE / SAMPLE_IMAGES[0]
    chosen = ["--blocks", 1, 2, 3, "--policies", "mtr", "tome", "-o", "out"]
    run = visualize(dog, *chosen, "backbone=vim_nano", *TINY, "reduction=hsa", "mtr.first_block=0")
    assert run.code == 0, run.err
    assert {path.name for path in (run.folder / "out").iterdir()} == {
        f"{dog.stem}_{what}" for what in ("hsa.png", "hsa.svg", "hsa.gif", "policies.png", "policies.svg")
    }
    sheet, strip = (picture_size(run.folder / "out" / f"{dog.stem}_{what}.png") for what in ("hsa", "policies"))
    panel = 112 * 3
    assert 3 * panel < sheet[1] < 4 * panel
    assert 3 * panel < strip[0] < 4 * panel
    with Image.open(run.folder / "out" / f"{dog.stem}_hsa.gif") as animation:
        assert animation.n_frames == 3  # of the blocks 0, 2 and 4


def test_files_of_one_name_are_numbered_and_may_hold_an_equals_sign(visualize, tmp_path: Path) -> None:
    for folder in ("a", "b=c"):
        (tmp_path / folder).mkdir()
        Image.new("L", (150, 90), 100).save(tmp_path / folder / "x.png")
    run = visualize("a/x.png", "b=c/x.png", *TINY, "--policies", "random", "--blocks", "1")
    assert run.code == 0, run.err
    assert sorted(path.name for path in (run.folder / "pictures").glob("*_policies.png")) == [
        "00_x_policies.png",
        "01_x_policies.png",
    ]


def test_images_that_are_not_square_and_patches_that_overlap(visualize) -> None:
    tiny = ["backbone=videomamba_ti", *TINY, "backbone.img_size=[64,96]", "backbone.stride=8", "--policies", "mtr"]
    run = visualize(SAMPLE / SAMPLE_IMAGES[0], *tiny)
    assert run.code == 0, run.err
    (strip,) = (run.folder / "pictures").glob("*_policies.png")
    assert 2 * 96 * 4 < picture_size(strip)[0] < 3 * 96 * 4
    assert 64 * 4 < picture_size(strip)[1] < 2 * 64 * 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere.jpg"], ["cannot read the image nowhere.jpg"]),
        (["broken.jpg"], ["cannot read the image broken.jpg"]),
        (["--blocks", "6"], ["no block 6: the model has blocks 0 to 5"]),
        (["--blocks", "x"], ["invalid int value: 'x'"]),
        (["--policies", "mtr", "mtrr"], ["unknown reduction 'mtrr'", "'mtr'"]),
        (["--policies", "mtr", "hsa", "mtr.policy=mtr"], ["mtr.policy=mtr only labels the result"]),
        (["--colour"], ["unknown option --colour"]),
        (["mtr.ratoi=0.3"], ["unknown key 'mtr.ratoi'"]),
        (["+foo=1"], ["unknown key 'foo'"]),
        (["~mtr.score"], ["the key mtr.score is missing"]),
        (["mtr.ratio=[0.2"], ["cannot parse the override 'mtr.ratio=[0.2'"]),
        (["mtr.ratio=0.99"], ["out of reach"]),
        (["mtr.ratio=0"], ["nothing to draw"]),
        (["backbone=vim_xs"], ["unknown backbone 'vim_xs'"]),
        (["backbone.checkpoint=nowhere.pth"], ["nowhere.pth does not exist"]),
        (["ops.backend=cuda"], ["unknown ops.backend 'cuda'"]),
        (["trainer.accelerator=abacus"], ["abacus"]),
        (["-o", "/dev/null/x"], ["cannot write /dev/null/x"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_gets_one_clear_message_and_code_2(visualize, tmp_path: Path, arguments, expected) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    run = visualize(*TINY, "--policies", "mtr", "-o", "pictures", *arguments)
    assert run.code == 2, run.err
    assert "Traceback" not in run.err
    for text in expected:
        assert text in run.err
    assert not (tmp_path / "pictures").exists()


VIDEO = ["backbone=videomamba_ti", *TINY, "backbone.img_size=32", "backbone.num_frames=4"]


def write_clip(path: Path, frames: int) -> None:
    pages = [Image.new("RGB", (50, 40), (40 * i, 100, 200)) for i in range(frames)]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=100)


def test_videos_from_a_gif_and_from_a_folder(visualize, tmp_path: Path) -> None:
    """Random weights: which tokens go means nothing here, but all of it is drawn."""
    write_clip(tmp_path / "pan.gif", 6)
    (tmp_path / "walk.v1").mkdir()
    for i in range(4):
        Image.new("RGB", (40, 60), (40 * i, 100, 200)).save(tmp_path / "walk.v1" / f"{i}.png")
    run = visualize("pan.gif", "walk.v1", *VIDEO, "--policies", "mtr", "tome", "--blocks", "1", "3")
    assert run.code == 0, run.err
    folder = run.folder / "pictures"
    expected = {
        f"{stem}_{what}"
        for stem in ("pan", "walk.v1")
        for what in ("mtr.png", "mtr.svg", "mtr.gif", "policies.png", "policies.svg")
    }
    assert {path.name for path in folder.iterdir()} == expected
    with Image.open(folder / "pan_mtr.gif") as animation:
        assert animation.n_frames == 4
    for sheet in ("pan_mtr.png", "pan_policies.png"):  # four frames beside, the input and two rows below each other
        width, height = picture_size(folder / sheet)
        assert 4 * 160 < width < 6 * 160
        assert 3 * 160 < height < 5 * 160


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["backbone.num_frames=4 takes videos", "an animated GIF or a folder of frames"]),
        (["short.gif"], ["short.gif has too few frames (3)"]),
        (["empty"], ["empty has too few frames (0)"]),
        (["nowhere.gif"], ["cannot read the video nowhere.gif", "No such file"]),
        (["clip.mp4"], ["cannot read the video clip.mp4", "ffmpeg -i VIDEO"]),
        (["short.gif", "backbone=vim_ti"], ["num_frames=4: Vim takes images only"]),
        (["short.gif", "backbone.pretrained=true"], ["no weights are registered for videomamba_ti with num_frames"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_about_a_video_gets_one_clear_message_and_code_2(
    visualize, tmp_path: Path, arguments, expected
) -> None:
    write_clip(tmp_path / "short.gif", 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0 ftypisom")
    run = visualize(*VIDEO, "--policies", "mtr", "-o", "pictures", *arguments)
    assert run.code == 2, run.err
    assert "Traceback" not in run.err
    for text in expected:
        assert text in run.err
    assert not (tmp_path / "pictures").exists()


def test_help_names_what_is_compared_by_default(visualize) -> None:
    run = visualize("--help")
    assert run.code == 0
    assert ", ".join(DEFAULT_POLICIES) in " ".join(run.out.split())


def test_images_after_the_policies_are_not_taken_for_policies(visualize) -> None:
    image = SAMPLE / SAMPLE_IMAGES[0]
    run = visualize(*TINY, "--policies", "random", image)
    assert run.code == 2
    assert "give the images before --policies" in run.err
