"""The target "hog": against scikit-image, and which frames and cells a token's target has."""

import numpy as np
import pytest
import torch
from einops import rearrange

from clips.gradients import oriented_gradients
from modeling_pretrain import create_pretrain_model
from targets import create_target
from utils import SettingError


@pytest.mark.parametrize("normalize", [True, False])
def test_histograms_are_those_of_scikit_image(normalize):
    """Of noise and of a smooth picture, in whole cells; flat cells are 0 in both."""
    feature = pytest.importorskip("skimage.feature", reason="scikit-image is not installed (requirements-test.txt)")
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:40, :64]
    smooth = (np.sin(rows / 7) + np.cos(columns / 5 + rows / 9) + 2) / 4
    noise = rng.integers(0, 256, (40, 64)) / 255
    noise[8:24, 16:40] = 0.5  # its inner cell is flat
    for frame in (smooth, noise):
        settings = {"orientations": 9, "pixels_per_cell": (8, 8), "cells_per_block": (1, 1), "feature_vector": False}
        if normalize:
            theirs = feature.hog(frame, block_norm="L2", **settings)[:, :, 0, 0]  # (5,8,9)
        else:  # scikit-image has no such choice: its normalisation of all cells as one block keeps their ratios
            theirs = feature.hog(frame, block_norm="L2", **settings | {"cells_per_block": (5, 8)})[0, 0]
        ours = oriented_gradients(torch.from_numpy(frame), normalize=normalize).numpy()
        if not normalize:
            ours = ours / np.sqrt(np.square(ours).sum() + 1e-10)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)  # theirs are added up in float32


def test_float32_hardly_differs():
    frames = torch.randint(0, 256, (2, 3, 32, 48), generator=torch.Generator().manual_seed(0)) / 255
    torch.testing.assert_close(oriented_gradients(frames), oriented_gradients(frames.double()).float())


@pytest.mark.parametrize(("patch", "width"), [(8, 27), (16, 108)])
def test_a_token_has_the_cells_of_its_first_frame(patch, width):
    pixels, masked = torch.rand(2, 3, 4, 32, 48), torch.tensor([[1, 4], [0, 5]])
    target = create_target("hog", patch=patch)
    found = target(pixels, masked)
    assert found.shape == (2, 2, width) and target.width == width
    cells = oriented_gradients(pixels)  # (2,3,4,4,6,9)
    window, side = (2, 32 // patch, 48 // patch), patch // 8
    t, h, w = np.unravel_index(5, window)
    own = cells[1, :, 2 * t, h * side : (h + 1) * side, w * side : (w + 1) * side]
    assert torch.equal(found[1, 1], rearrange(own, "c p q o -> (p q c o)"))
    norms = found.unflatten(2, (-1, 9)).norm(dim=3)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_tokens_of_no_whole_cells_are_refused():
    with pytest.raises(SettingError, match="--target hog needs tokens of whole cells of 8 pixels, --model has 14"):
        create_pretrain_model("pretrain_mae_st_huge_patch14_224", target="hog")
