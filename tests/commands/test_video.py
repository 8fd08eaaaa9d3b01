"""`ssl-vit video`: overlays of videos and of directories of frames, errors and interruption."""

import builtins
import signal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.cli import main
from ssl_vit.runtime.outputs import record_outputs
from ssl_vit.visualization import attention_video
from ssl_vit.visualization.attention_video import AttentionRenderer

av = pytest.importorskip("av")
from tests.helpers.videos import make_frame, read_video, write_sound, write_video  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def run_video(tiny_model, video: Path, out: Path, *argv: str) -> int:
    return main(["video", f"checkpoint={tiny_model}", f"video={video}", f"out={out}", *argv])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("empty.mp4", lambda path: path.touch(), "an empty file"),
        ("junk.mp4", lambda path: path.write_bytes(bytes(range(256)) * 20), "not a readable video"),
        ("notes.txt", lambda path: path.write_text("hello\n" * 99), "a text file"),
        ("sound.m4a", write_sound, "sound but no video"),
        ("folder", lambda path: path.mkdir(), "there is no image in this folder"),
        ("nowhere", lambda path: None, "there is no such file or directory"),
    ],
)
def test_video_reports_files_that_are_not_videos(tmp_path, tiny_model, capsys, name, make, message):
    make(tmp_path / name)
    out = tmp_path / "results" / "out.mp4"
    assert run_video(tiny_model, tmp_path / name, out) == 2
    error = capsys.readouterr().err
    assert message in error
    assert name in error
    assert not out.parent.exists()


def test_video_keeps_size_rate_and_number_of_frames(tmp_path, tiny_model, capsys):
    out = tmp_path / "out.mp4"
    assert run_video(tiny_model, write_video(tmp_path / "clip.mp4", 12, rate=30), out) == 0
    assert "12 frames in" in (message := capsys.readouterr().out)
    assert "(libx264)" in message
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate, stream.frames) == (64, 48, 30, 12)
    frames = read_video(out)
    assert [frame.time for frame in frames] == [Fraction(number, 30) for number in range(12)]
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_video_keeps_uneven_times_and_applies_the_limit(tmp_path, tiny_model):
    times = [0, 40, 80, 200, 210, 500, 540, 580, 620, 1000]
    path = write_video(tmp_path / "clip.mkv", 10, times=times)
    assert run_video(tiny_model, path, tmp_path / "out.mp4", "limit=7") == 0
    assert [round(frame.time * 1000) for frame in read_video(tmp_path / "out.mp4")] == times[:7]


def test_video_writer_pads_odd_sides_and_fits_frames_of_other_sizes(tmp_path, tiny_model):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, size in enumerate([(61, 47), (61, 47), (47, 61), (122, 94)]):
        make_frame(20, *size).save(folder / f"{number}.png")
    assert run_video(tiny_model, folder, tmp_path / "out.mp4", "fps=10") == 0
    frames = read_video(tmp_path / "out.mp4")
    assert [tuple(frame.image.shape) for frame in frames] == [(3, 48, 62)] * 4
    assert frames[2].image[:, :, :8].float().mean() < 20  # black beside the one on its side
    assert frames[2].image[:, 20:28, 27:35].float().mean() > 40
    assert [float(frame.time) for frame in frames] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_image_writer_needs_no_pyav_and_reports_unusable_frames(tmp_path, tiny_model, capsys, monkeypatch):
    folder, out = tmp_path / "frames", tmp_path / "overlays"
    folder.mkdir()
    for number in range(4):
        make_frame(number, 41, 33).save(folder / f"shot{number}.png")
    (folder / "shot2.png").write_bytes(b"\x89PNG no image")
    make_frame(4, 6, 40).save(folder / "shot4.png")  # smaller than a patch
    without_av(monkeypatch)
    assert run_video(tiny_model, folder, out) == 0
    message = capsys.readouterr().out
    assert "3 frames in" in message
    assert "2 frames could not be used: shot2.png: " in message
    assert "shot4.png: 6 x 40 pixels: a side is smaller than one patch of 8" in message
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
def test_video_without_pyav_reports_how_to_install_it(tmp_path, tiny_model, capsys, monkeypatch, source, out):
    (tmp_path / "frames").mkdir()
    make_frame(3).save(tmp_path / "frames" / "0.png")
    write_video(tmp_path / "clip.mp4", 2)
    without_av(monkeypatch)
    assert run_video(tiny_model, tmp_path / source, tmp_path / out) == 2
    assert "pip install 'ssl-vit[video]'" in capsys.readouterr().err
    assert not (tmp_path / out).exists()


def test_video_codec_falls_back_to_mpeg4(tmp_path, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(attention_video, "CODECS", {"no such codec": {}, "mpeg4": attention_video.CODECS["mpeg4"]})
    assert run_video(tiny_model, write_video(tmp_path / "clip.mp4", 5), tmp_path / "out.mp4") == 0
    assert "(mpeg4)" in capsys.readouterr().out
    assert len(read_video(tmp_path / "out.mp4")) == 5
    monkeypatch.setattr(attention_video, "CODECS", {"no such codec": {}})
    assert run_video(tiny_model, tmp_path / "clip.mp4", tmp_path / "none.mp4") == 2
    assert "write images into a directory" in capsys.readouterr().err


def test_video_stopped_by_ctrl_c_keeps_the_finished_frames(tmp_path, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(attention_video, "BATCH_PIXELS", 64 * 48 * 3)  # batches of 3
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
    record_outputs([out], "video")
    assert run_video(tiny_model, write_video(tmp_path / "clip.mp4", 12), out) == 130
    assert signal.getsignal(signal.SIGINT) is before
    stopped = tmp_path / "out-stopped.mp4"
    assert f"the first 6 of 12 frames are in {stopped}" in capsys.readouterr().out
    assert len(read_video(stopped)) == 6
    assert out.read_bytes() == b"the old one"


def test_video_leaves_an_existing_file_unchanged_on_failure(tmp_path, tiny_model, monkeypatch):
    out = tmp_path / "out.mp4"
    out.write_bytes(b"the old one")
    record_outputs([out], "video")
    write_video(tmp_path / "clip.mp4", 3)

    def fail(self, batch):
        raise RuntimeError("no more")

    monkeypatch.setattr(AttentionRenderer, "draw", fail)
    with pytest.raises(RuntimeError, match="no more"):
        run_video(tiny_model, tmp_path / "clip.mp4", out)
    assert out.read_bytes() == b"the old one"
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["out=overlay.gif"], "must be a video file (.mp4, .m4v, .mov, .mkv), or a folder"),
        (["head=3"], "the model has 3 heads, numbered from 0"),
        (["fps=0"], "fps"),
    ],
)
def test_video_reports_invalid_options(tmp_path, tiny_model, capsys, argv, message):
    write_video(tmp_path / "clip.mp4", 2)
    assert run_video(tiny_model, tmp_path / "clip.mp4", tmp_path / "out.mp4", *argv) == 2
    assert message in capsys.readouterr().err


def test_video_rejects_its_input_as_output(tmp_path, tiny_model, capsys):
    path = write_video(tmp_path / "clip.mp4", 2)
    assert run_video(tiny_model, path, path) == 2
    assert "would be written over video=" in capsys.readouterr().err
    assert run_video(tiny_model, tmp_path, tmp_path / "overlays") == 2
    assert "would be written over video=" in capsys.readouterr().err


def test_video_draws_one_head(tmp_path, tiny_model):
    path = write_video(tmp_path / "clip.mp4", 2)
    assert run_video(tiny_model, path, tmp_path / "mean") == 0
    assert run_video(tiny_model, path, tmp_path / "head", "head=1") == 0
    mean, head = (np.asarray(Image.open(tmp_path / name / "000001.jpg")).astype(int) for name in ("mean", "head"))
    assert mean.shape == head.shape == (48, 64, 3)
    assert np.abs(mean - head).max() > 20
