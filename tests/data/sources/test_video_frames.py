"""Reading the frames of videos and of directories."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from ssl_vit.data.sources.video_frames import FolderFrames, VideoFrames, open_frames

av = pytest.importorskip("av")
from tests.helpers.videos import frame_numbers, make_frame, read_video, write_video  # noqa: E402


def test_open_frames_reads_a_video_with_its_times(tmp_path):
    video = open_frames(write_video(tmp_path / "clip.mp4"), fps=99)
    frames = list(video.read(pytest.fail))
    assert (video.rate, video.count) == (25, 12)
    assert frame_numbers(frames) == list(range(12))
    assert [frame.time for frame in frames] == [Fraction(number, 25) for number in range(12)]
    assert all(frame.image.shape == (3, 48, 64) and frame.image.dtype == torch.uint8 for frame in frames)


@pytest.mark.parametrize(("rotation", "corner"), [(90, "bottom left"), (-90, "top right"), (180, "bottom right")])
def test_video_frames_applies_the_display_rotation(tmp_path, rotation, corner):
    frame = read_video(write_video(tmp_path / "clip.mp4", 1, rotation=rotation))[0].image
    assert frame.shape == ((3, 48, 64) if rotation == 180 else (3, 64, 48))
    ends = {"top": slice(5), "bottom": slice(-5, None), "left": slice(5), "right": slice(-5, None)}
    reds = {f"{v} {h}": frame[0, ends[v], ends[h]].float().mean() for v in ("top", "bottom") for h in ("left", "right")}
    assert max(reds, key=reds.get) == corner
    assert sorted(reds.values())[2] < 50
    assert reds[corner] > 200


def test_folder_frames_are_in_natural_order(tmp_path):
    for number in (10, 2, 1, 11, 9):
        make_frame(number).save(tmp_path / f"frame{number}.png")
    frames = list(FolderFrames(tmp_path, 12.5).read(pytest.fail))
    assert [frame.name for frame in frames] == [f"frame{number}.png" for number in (1, 2, 9, 10, 11)]
    assert [float(frame.time) for frame in frames] == [0, 0.08, 0.16, 0.24, 0.32]


def test_video_frames_skips_and_reports_a_damaged_part(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 24)
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    start, size = packets[8]  # a key frame: the third
    content[start : start + size] = np.random.default_rng(0).bytes(size)
    path.write_bytes(content)
    skipped = []
    frames = list(VideoFrames(path).read(skipped.append))
    assert skipped
    assert all(re.match(r"(packet|frame) \d+: ", str(broken)) for broken in skipped)
    assert frame_numbers(frames)[:8] == list(range(8))
    assert frame_numbers(frames)[-12:] == list(range(12, 24))


def test_video_frames_reads_a_truncated_file_up_to_its_end(tmp_path):
    path = write_video(tmp_path / "clip.mkv", 24)
    path.write_bytes(path.read_bytes()[:-600])
    frames = list(VideoFrames(path).read(lambda broken: None))
    assert 4 < len(frames) < 24
    assert frame_numbers(frames) == list(range(len(frames)))
