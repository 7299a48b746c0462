"""Frames of one clip on disk: a video, decoded by PyAV (the extra `video`), or a folder of pictures in the order of their numbers.

Frames are counted, not timed: in a video of varying rate the tenth frame is the tenth, whenever it is shown.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from compressvit.data.bands import require_shape
from compressvit.data.files import natural_key
from compressvit.data.levels import BrokenPicture, Read
from compressvit.data.pictures import EXTENSIONS, read_picture, refuse_shortage, to_channels
from compressvit.errors import UserError

INSTALL = "pip install av, or compressvit[video]"
SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv")
# Containers of one video. FFmpeg reads the content, not the name, and knows lists of others' files and addresses too.
_OPENED = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg",
    "protocol_whitelist": "file",
}
_STEADY = 1.5  # times the shortest of a video's frames that the longest may last

Choose = Callable[[int], Sequence[int]]  # from the number of frames that there are to those that are wanted


def require_decoder(paths: Sequence[str], where: str) -> None:
    """Raise a `UserError` where one of these is a video, and PyAV is not there to read it.

    Args:
        where: the list that names them, for the message.
    """
    if importlib.util.find_spec("av") is not None:
        return
    video = next((path for path in paths if not os.path.isdir(path)), None)
    if video is not None:
        raise UserError(
            f"{where}: {video} is a video, and reading one needs PyAV: {INSTALL}; folders of frames need no package"
        )


def read_frames(path: str, choose: Choose) -> tuple[list[np.ndarray], Read]:
    """Frames of a video or of a folder of pictures, uint8 (H, W, 3) each, and what is to be told of them.

    Args:
        choose: what is wanted, by its number from 0; called once the number of frames is known, and again where fewer can be decoded than
            the file has.

    Raises:
        BrokenPicture: it is damaged, has no frames, or has some of several sizes.
        MemoryError, TooManyFiles: memory or file handles ran out, which says nothing of the file.
    """
    try:
        frames, done = _of_folder(path, choose) if os.path.isdir(path) else _of_video(path, choose)
    except BrokenPicture:
        raise
    except Exception as error:  # FFmpeg's errors are of many kinds, and a damaged header leads to more
        refuse_shortage(error, path)
        raise BrokenPicture(f"it is no video that can be read: {_reason(error)}") from error
    if len({frame.shape for frame in frames}) > 1:
        sizes = sorted({f"{frame.shape[1]}×{frame.shape[0]}" for frame in frames})
        raise BrokenPicture(f"its frames are of several sizes: {', '.join(sizes)}")
    return frames, done


def _reason(error: Exception) -> str:
    """What an error says without its number and the path, which stands in the message already."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _of_folder(path: str, choose: Choose) -> tuple[list[np.ndarray], Read]:
    with os.scandir(path) as entries:  # a pipe would block
        pictures = [entry.name for entry in entries if entry.name.lower().endswith(EXTENSIONS) and entry.is_file()]
    names = sorted(pictures, key=natural_key)
    if not names:
        raise BrokenPicture("it is a folder without pictures, so a clip without frames")
    wanted, done, found = choose(len(names)), Read(0), dict[int, np.ndarray]()
    for index in dict.fromkeys(wanted):
        try:
            picture, how = read_picture(os.path.join(path, names[index]))
        except BrokenPicture as error:
            raise BrokenPicture(f"its frame {names[index]}: {error}") from error
        found[index], done = np.asarray(to_channels(picture, 3)), done | how
    return [found[index] for index in wanted], done


def _of_video(path: str, choose: Choose) -> tuple[list[np.ndarray], Read]:
    import av

    with av.open(path, options=_OPENED) as container:
        if not container.streams.video:
            raise BrokenPicture("it has no video stream, so no frames")
        stream = container.streams.video[0]
        require_shape((stream.height, stream.width, 3), 1)
        count = sum(packet.size > 0 for packet in container.demux(stream))
    if not count:
        raise BrokenPicture("it has a video stream without frames")
    wanted = choose(count)
    found, done, decoded = _decoded(path, wanted, count)
    if decoded is not None:  # what a container counts need not all be frames
        wanted = choose(decoded)
        found, done, _ = _decoded(path, wanted, decoded)
    return [found[index] for index in wanted], done


def _decoded(path: str, wanted: Sequence[int], count: int) -> tuple[dict[int, np.ndarray], Read, int | None]:
    """The wanted frames by their numbers, what is to be told, and how many there are where that is fewer than are wanted."""
    import av

    found: dict[int, np.ndarray] = {}
    times: list[int] = []
    last, keep, number = max(wanted), set(wanted), -1
    with av.open(path, options=_OPENED) as container:
        try:
            for number, frame in enumerate(container.decode(container.streams.video[0])):
                times += [] if frame.pts is None else [frame.pts]
                if number in keep:
                    found[number] = frame.to_ndarray(format="rgb24")
                if number == last:
                    return found, _rate(times), None
        except Exception as error:  # FFmpeg's, as above
            refuse_shortage(error, path)
            raise BrokenPicture(f"it is damaged after {number + 1} of {count} frames: {_reason(error)}") from error
    if number < 0:
        raise BrokenPicture(f"none of its {count} frames can be decoded")
    return found, _rate(times), number + 1


def _rate(times: Sequence[Any]) -> Read:
    """Whether frames that are shown at these times, in any unit, last differently long."""
    lasting = [after - before for before, after in pairwise(times) if after > before]
    return Read.VARYING if lasting and max(lasting) > _STEADY * min(lasting) else Read(0)
