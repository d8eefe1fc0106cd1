"""Small video files."""

from fractions import Fraction
from pathlib import Path

import numpy as np


def write_video(path: Path, frames: int, codec: str = "mpeg4", left: int = 0, **options: str) -> Path:
    """Grey frames of 32 × 48 pixels; frame i has brightness 20 + 20 · (i mod 12), and its left half is brighter."""
    import av

    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=Fraction(25))
        stream.width, stream.height = 48, 32
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.bit_rate = 2_000_000
        for i in range(frames):
            pixels = np.full((32, 48, 3), 20 + 20 * (i % 12), np.uint8)
            pixels[:, :24] += left
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        container.start_encoding()
        for packet in stream.encode():
            container.mux(packet)
    return path


def write_audio(path: Path) -> Path:
    """A tone without pictures."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return path
