"""`ssl-vit video`: frames in, overlays out, whatever the video is like and whatever happens on the way."""

import builtins
import re
import signal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.cli import main
from ssl_vit.data.sources.video_frames import FolderFrames, Frame, VideoFrames, open_frames
from ssl_vit.runtime.errors import UserError
from ssl_vit.visualization import attention_video as film
from ssl_vit.visualization.attention_video import AttentionRenderer, FrameAttention

av = pytest.importorskip("av")


@pytest.fixture(autouse=True)
def few_threads():
    torch.set_num_threads(1)


def picture(number: int, width: int = 64, height: int = 48) -> Image.Image:
    """Smooth, with a brightness that tells its number: 10 x number."""
    pixels = np.full((height, width, 3), 10 * number, dtype=np.uint8)
    pixels[: height // 2, : width // 2, 0] = 255  # red on top to the left: tells which side is up
    return Image.fromarray(pixels)


def write_video(path: Path, frames: int = 12, *, size=(64, 48), times=None, rate=25, rotation=0, codec="libx264"):
    """A video of `image(0)`, `image(1)`, ...; `times` are ticks of 1/1000 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "4", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            frame = av.VideoFrame.from_image(picture(number, *size))
            frame.pts, frame.time_base = (times[number], Fraction(1, 1000)) if times else (number, Fraction(1, rate))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        for number in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 1024 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(frames) -> list[int]:
    """Which images the frames are, by the brightness below to the right."""
    return [round(frame.image[:, -10:, -10:].float().mean().item() / 10) for frame in frames]


def read(path: Path) -> list[Frame]:
    return list(VideoFrames(path).read(pytest.fail))


def overlay(tiny_model, video: Path, out: Path, *words: str) -> int:
    return main(["video", f"checkpoint={tiny_model}", f"video={video}", f"out={out}", *words])


# --- reading ---


def test_a_video_is_read_frame_by_frame_with_its_times(tmp_path):
    video = open_frames(write_video(tmp_path / "clip.mp4"), fps=99)
    frames = list(video.read(pytest.fail))
    assert (video.rate, video.count) == (25, 12)
    assert numbers(frames) == list(range(12))
    assert [frame.time for frame in frames] == [Fraction(number, 25) for number in range(12)]
    assert all(frame.image.shape == (3, 48, 64) and frame.image.dtype == torch.uint8 for frame in frames)


@pytest.mark.parametrize(("rotation", "corner"), [(90, "bottom left"), (-90, "top right"), (180, "bottom right")])
def test_a_video_that_was_filmed_on_its_side_is_turned_upright(tmp_path, rotation, corner):
    frame = read(write_video(tmp_path / "clip.mp4", 1, rotation=rotation))[0].image
    assert frame.shape == ((3, 48, 64) if rotation == 180 else (3, 64, 48))
    ends = {"top": slice(5), "bottom": slice(-5, None), "left": slice(5), "right": slice(-5, None)}
    reds = {f"{v} {h}": frame[0, ends[v], ends[h]].float().mean() for v in ("top", "bottom") for h in ("left", "right")}
    assert max(reds, key=reds.get) == corner
    assert sorted(reds.values())[2] < 50
    assert reds[corner] > 200


def test_frames_of_a_folder_come_in_the_order_in_which_people_count(tmp_path):
    for number in (10, 2, 1, 11, 9):
        picture(number).save(tmp_path / f"frame{number}.png")
    frames = FolderFrames(tmp_path, 12.5)
    read = list(frames.read(pytest.fail))
    assert [frame.name for frame in read] == ["frame1.png", "frame2.png", "frame9.png", "frame10.png", "frame11.png"]
    assert [float(frame.time) for frame in read] == [0, 0.08, 0.16, 0.24, 0.32]


def test_a_damaged_piece_of_a_video_is_skipped_and_named_and_the_rest_is_read(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 24)
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    place, size = packets[8]  # a key frame: the third
    content[place : place + size] = np.random.default_rng(0).bytes(size)
    path.write_bytes(content)
    skipped = []
    frames = list(VideoFrames(path).read(skipped.append))
    assert skipped
    assert all(re.match(r"(packet|frame) \d+: ", str(broken)) for broken in skipped)
    assert numbers(frames)[:8] == list(range(8))
    assert numbers(frames)[-12:] == list(range(12, 24))


def test_a_video_that_was_cut_off_is_read_up_to_there(tmp_path):
    path = write_video(tmp_path / "clip.mkv", 24)
    path.write_bytes(path.read_bytes()[:-600])
    frames = list(VideoFrames(path).read(lambda broken: None))
    assert 4 < len(frames) < 24
    assert numbers(frames) == list(range(len(frames)))


@pytest.mark.parametrize(
    ("name", "make", "told"),
    [
        ("empty.mp4", lambda path: path.touch(), "an empty file"),
        ("junk.mp4", lambda path: path.write_bytes(bytes(range(256)) * 20), "no video that can be read"),
        ("notes.txt", lambda path: path.write_text("hello\n" * 99), "a text file"),
        ("sound.m4a", write_sound, "sound but no moving images"),
        ("folder", lambda path: path.mkdir(), "there is no image in this folder"),
        ("nowhere", lambda path: None, "there is no such file or folder"),
    ],
)
def test_what_is_no_video_is_told_and_nothing_is_written(tmp_path, tiny_model, capsys, name, make, told):
    make(tmp_path / name)
    out = tmp_path / "results" / "out.mp4"
    assert overlay(tiny_model, tmp_path / name, out) == 2
    error = capsys.readouterr().err
    assert told in error
    assert name in error
    assert not out.parent.exists()


# --- writing ---


def test_the_overlay_has_the_videos_size_rate_and_count_of_frames(tmp_path, tiny_model, capsys):
    out = tmp_path / "out.mp4"
    assert overlay(tiny_model, write_video(tmp_path / "clip.mp4", 12, rate=30), out) == 0
    assert "12 frames in" in (told := capsys.readouterr().out)
    assert "(libx264)" in told
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate, stream.frames) == (64, 48, 30, 12)
    frames = read(out)
    assert [frame.time for frame in frames] == [Fraction(number, 30) for number in range(12)]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []  # nothing temporary is left


def test_uneven_times_and_a_limit_are_kept(tmp_path, tiny_model):
    times = [0, 40, 80, 200, 210, 500, 540, 580, 620, 1000]
    path = write_video(tmp_path / "clip.mkv", 10, times=times)
    assert overlay(tiny_model, path, tmp_path / "out.mp4", "limit=7") == 0
    assert [round(frame.time * 1000) for frame in read(tmp_path / "out.mp4")] == times[:7]


def test_odd_sides_are_made_even_and_frames_of_other_sizes_fitted_in(tmp_path, tiny_model):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, size in enumerate([(61, 47), (61, 47), (47, 61), (122, 94)]):
        picture(20, *size).save(folder / f"{number}.png")
    assert overlay(tiny_model, folder, tmp_path / "out.mp4", "fps=10") == 0
    frames = read(tmp_path / "out.mp4")
    assert [tuple(frame.image.shape) for frame in frames] == [(3, 48, 62)] * 4
    assert frames[2].image[:, :, :8].float().mean() < 20  # black beside the one on its side
    assert frames[2].image[:, 20:28, 27:35].float().mean() > 40
    assert [float(frame.time) for frame in frames] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_a_folder_to_a_folder_needs_no_pyav_and_names_what_is_broken(tmp_path, tiny_model, capsys, monkeypatch):
    folder, out = tmp_path / "frames", tmp_path / "overlays"
    folder.mkdir()
    for number in range(4):
        picture(number, 41, 33).save(folder / f"shot{number}.png")
    (folder / "shot2.png").write_bytes(b"\x89PNG no image")
    picture(4, 6, 40).save(folder / "shot4.png")  # smaller than a patch
    without_av(monkeypatch)
    assert overlay(tiny_model, folder, out) == 0
    told = capsys.readouterr().out
    assert "3 frames in" in told
    assert "2 frames could not be used: shot2.png: " in told
    assert "shot4.png: 6 x 40 pixels: a side is smaller than one patch of 8" in told
    assert sorted(path.name for path in out.iterdir()) == ["shot0.jpg", "shot1.jpg", "shot3.jpg"]
    assert Image.open(out / "shot0.jpg").size == (41, 33)


def without_av(monkeypatch):
    original = builtins.__import__

    def imports(name, *rest, **more):
        if name == "av" or name.startswith("av."):
            raise ModuleNotFoundError("No module named 'av'")
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", imports)


@pytest.mark.parametrize(("source", "out"), [("clip.mp4", "overlays"), ("frames", "overlay.mp4")])
def test_without_pyav_a_video_is_refused_with_the_remedy(tmp_path, tiny_model, capsys, monkeypatch, source, out):
    (tmp_path / "frames").mkdir()
    picture(3).save(tmp_path / "frames" / "0.png")
    write_video(tmp_path / "clip.mp4", 2)
    without_av(monkeypatch)
    assert overlay(tiny_model, tmp_path / source, tmp_path / out) == 2
    assert "pip install 'ssl-vit[video]'" in capsys.readouterr().err
    assert not (tmp_path / out).exists()


def test_a_build_without_h264_writes_mpeg4_and_says_so(tmp_path, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(film, "CODECS", {"no such codec": {}, "mpeg4": film.CODECS["mpeg4"]})
    assert overlay(tiny_model, write_video(tmp_path / "clip.mp4", 5), tmp_path / "out.mp4") == 0
    assert "(mpeg4)" in capsys.readouterr().out
    assert len(read(tmp_path / "out.mp4")) == 5
    monkeypatch.setattr(film, "CODECS", {"no such codec": {}})
    assert overlay(tiny_model, tmp_path / "clip.mp4", tmp_path / "none.mp4") == 2
    assert "name a folder" in capsys.readouterr().err


def test_ctrl_c_leaves_a_video_that_plays_with_what_was_done(tmp_path, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(film, "BATCH_PIXELS", 64 * 48 * 3)  # batches of 3
    original = AttentionRenderer.draw
    batches = []

    def draw(self, batch):
        batches.append(batch)
        if len(batches) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, batch)

    monkeypatch.setattr(AttentionRenderer, "draw", draw)
    before = signal.getsignal(signal.SIGINT)
    out = tmp_path / "out.mp4"
    out.write_bytes(b"the old one")
    assert overlay(tiny_model, write_video(tmp_path / "clip.mp4", 12), out) == 130
    assert signal.getsignal(signal.SIGINT) is before
    stopped = tmp_path / "out-stopped.mp4"
    assert f"the first 6 of 12 frames are in {stopped}" in capsys.readouterr().out
    assert len(read(stopped)) == 6
    assert out.read_bytes() == b"the old one"


def test_a_failure_on_the_way_leaves_the_old_video_as_it_was(tmp_path, tiny_model, monkeypatch):
    out = tmp_path / "out.mp4"
    out.write_bytes(b"the old one")
    write_video(tmp_path / "clip.mp4", 3)

    def fail(self, batch):
        raise RuntimeError("no more")

    monkeypatch.setattr(AttentionRenderer, "draw", fail)
    with pytest.raises(RuntimeError, match="no more"):
        overlay(tiny_model, tmp_path / "clip.mp4", out)
    assert out.read_bytes() == b"the old one"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["out=overlay.gif"], "name a video (.mp4, .m4v, .mov, .mkv), or a folder"),
        (["head=3"], "the model has 3 heads, numbered from 0"),
        (["fps=0"], "fps"),
    ],
)
def test_mistakes_are_told(tmp_path, tiny_model, capsys, words, told):
    write_video(tmp_path / "clip.mp4", 2)
    assert overlay(tiny_model, tmp_path / "clip.mp4", tmp_path / "out.mp4", *words) == 2
    assert told in capsys.readouterr().err


def test_the_video_itself_and_a_place_among_its_frames_are_no_outputs(tmp_path, tiny_model, capsys):
    path = write_video(tmp_path / "clip.mp4", 2)
    assert overlay(tiny_model, path, path) == 2
    assert "is the video itself" in capsys.readouterr().err
    assert overlay(tiny_model, tmp_path, tmp_path / "overlays") == 2
    assert "lies inside" in capsys.readouterr().err


# --- colors ---


def peaked(height: float) -> FrameAttention:
    """A frame whose attention is `height` times uniform on some patches."""
    map_ = torch.full((10, 10), (100 - 2 * height) / 98 / 100)
    map_[5, 5:7] = height / 100
    return FrameAttention(Frame("0", torch.full((3, 80, 80), 99, dtype=torch.uint8), Fraction(0)), map_)


def test_colors_follow_slowly_and_do_not_flicker():
    painter = AttentionRenderer(0.6)
    list(painter.draw([peaked(20)] * 3))
    assert painter.top == pytest.approx(20)
    steady = list(painter.draw([peaked(20), peaked(40), peaked(20)]))
    assert painter.top == pytest.approx(20 + 0.05 * 20 * 0.95)
    jumping = AttentionRenderer(
        0.6
    )  # as every frame by its own scale would be: that of twice the attention, then this one
    list(jumping.draw([peaked(40)]))
    (jumped,) = jumping.draw([peaked(20)])
    first, third, jumped = (np.asarray(image).astype(int) for image in (steady[0], steady[2], jumped))
    assert 0 < np.abs(first - third).sum() < np.abs(first - jumped).sum() / 5
    for _ in range(100):
        list(painter.draw([peaked(40)]))
    assert painter.top == pytest.approx(40, rel=0.01)


def test_one_head_is_shown_when_asked_for(tmp_path, tiny_model):
    path = write_video(tmp_path / "clip.mp4", 2)
    assert overlay(tiny_model, path, tmp_path / "mean") == 0
    assert overlay(tiny_model, path, tmp_path / "head", "head=1") == 0
    mean, head = (np.asarray(Image.open(tmp_path / name / "000001.jpg")).astype(int) for name in ("mean", "head"))
    assert mean.shape == head.shape == (48, 64, 3)
    assert np.abs(mean - head).max() > 20


def test_frames_are_seen_as_images_are(tmp_path, tiny_model):
    """The map of a frame in a batch is the one that the attention of the image alone gives."""
    from ssl_vit.evaluation.segmentation.image_outputs import normalize
    from ssl_vit.models.attention_maps import extract_last_block
    from ssl_vit.models.checkpoint import load_backbone

    model = load_backbone(str(tiny_model))
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    frames = [Frame(str(number), frame, Fraction(number)) for number, frame in enumerate(pixels)]
    (batch,) = film.iter_attention(frames, model, head=None, max_side=None, skip=pytest.fail)
    for seen, frame in zip(batch, pixels, strict=True):
        alone = extract_last_block(model.backbone, normalize(frame[None] / 255, model))[0].cls
        assert torch.allclose(seen.map, alone.mean(0), atol=1e-6)
    with pytest.raises(UserError, match="numbered from 0"):
        list(film.iter_attention(frames, model, head=3, max_side=None, skip=pytest.fail))
