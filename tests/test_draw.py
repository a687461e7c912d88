"""Pictures: letters, grids of videos, drawn paths."""
import numpy as np
import pytest
from scenes import clip

from data.draw import draw_paths, grid, text_mask, upscale


def test_glyphs_differ():
    glyphs = {text_mask(chr(c)).tobytes() for c in range(32, 127)}
    assert len(glyphs) == 95 and not text_mask(" ").any()
    assert (text_mask("é") == text_mask("?")).all()
    assert text_mask("ab", 2).shape == (16, 24)


def test_grid():
    a, b = clip(5), clip(3)
    enlarged = [upscale(a, 2), upscale(b, 2)]
    out = grid(enlarged, ["left", "a caption that is much too long for one line"])
    strip = out.shape[1] - 96
    assert out.shape == (5, strip + 96, 2 * 128 + 4, 3) and strip >= 20
    assert (out[:, strip:, :128] == enlarged[0]).all()
    right = out[:, strip:, 132:]
    assert (right[:3] == enlarged[1]).all() and (right[3:] == right[2]).all()
    assert (out[:, :strip].max() == 235) and (out[0, :strip] == out[4, :strip]).all()
    with pytest.raises(ValueError, match="2 videos, 1 labels"):
        grid([a, b], ["left"])


def test_paths_are_drawn_where_the_cameras_are():
    c2w = np.tile(np.eye(4), (9, 1, 1))
    c2w[:, 0, 3] = np.linspace(0, 1, 9)  # one metre to the right
    video = np.zeros((9, 150, 200, 3), np.uint8)
    out = draw_paths(video, [c2w])
    assert out.shape == video.shape and not video.any()
    assert not out[:, :100].any() and not out[:, :, :150].any()  # only the lower right third is drawn on
    rows = out[:, -25:-15, -50:].sum((1, 3)).astype(float) ** 4  # (9, 50)
    x = [np.average(np.arange(50), weights=row) for row in rows]
    assert (np.diff(x) > 1).all()  # moves to the right
    up = draw_paths(video, [np.tile(np.eye(4), (9, 1, 1))])[0, -50:, -50:].astype(int).sum(-1)
    assert up[:24, 24:26].sum() > 2 * up[27:40, 24:26].sum()  # looks forward: upwards
