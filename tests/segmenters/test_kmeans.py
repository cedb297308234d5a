"""K-Means against plain Lloyd on all pixels and against OpenCV."""

import cv2
import numpy as np
import pytest
from skimage import data

from raypipe.segmenters._clusters import lloyd
from raypipe.segmenters.kmeans import Kmeans, coarsen, pack, unpack

CRITERIA = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 100, 1.0)


@pytest.fixture(scope="module", params=["astronaut", "coffee", "chelsea"])
def photo(request) -> np.ndarray:
    return cv2.resize(getattr(data, request.param)(), (150, 120), interpolation=cv2.INTER_AREA)


@pytest.fixture
def grey_photo() -> np.ndarray:
    return np.repeat(cv2.resize(data.camera(), (100, 100), interpolation=cv2.INTER_AREA)[..., None], 3, 2)


def whole(image: np.ndarray) -> np.ndarray:
    return np.ones(image.shape[:2], bool)


def cluster(image: np.ndarray, foreground: np.ndarray | None = None, **options):
    (found,) = Kmeans(**options).segment([image], [whole(image) if foreground is None else foreground])
    return found


def objective(image: np.ndarray, masks: np.ndarray) -> float:
    """Sum of squared distances of the pixels to the mean of their mask."""
    groups = [image[mask].astype(np.float64) for mask in masks if mask.any()]
    return sum(((group - group.mean(0)) ** 2).sum() for group in groups)


def plain_lloyd(pixels: np.ndarray, centres: np.ndarray, *, max_iter: int, eps: float):
    """One pixel at a time in OpenCV's order: assign, update, stop when no centre moved more than eps."""
    for _ in range(max_iter - 1):
        labels = np.array([((pixel - centres) ** 2).sum(1).argmin() for pixel in pixels])
        moved = np.array([pixels[labels == i].mean(0) for i in range(len(centres))])
        done = ((moved - centres) ** 2).sum(1).max() <= eps**2
        centres = moved
        if done:
            break
    return labels, centres, ((pixels - centres[labels]) ** 2).sum()


@pytest.mark.parametrize(("max_iter", "eps"), [(100, 1.0), (100, 0.0), (3, 0.0), (2, 1.0)])
def test_weighted_colours_give_what_all_pixels_give(max_iter, eps):
    pixels = data.coffee()[100:400:20, 100:500:20].reshape(-1, 3) // 16 * 16  # coarse, so that colours repeat
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    assert len(colours) < len(pixels) * 0.7
    start = np.array([[40.0, 30, 20], [120, 100, 80], [220, 210, 200]])
    labels, centres, spread = lloyd(colours.astype(float), counts, start[None], max_iter=max_iter, eps=eps)
    slow_labels, slow_centres, slow_spread = plain_lloyd(pixels.astype(float), start, max_iter=max_iter, eps=eps)
    of_colour = {tuple(colour): label for colour, label in zip(colours, labels[0], strict=True)}
    assert [of_colour[tuple(pixel)] for pixel in pixels] == slow_labels.tolist()
    np.testing.assert_allclose(centres[0], slow_centres)
    np.testing.assert_allclose(spread[0], slow_spread)


def test_attempts_run_together_are_those_run_alone(photo):
    codes, counts = np.unique(pack(photo), return_counts=True)
    colours = unpack(codes)
    starts = np.random.default_rng(0).uniform(-80, 330, (6, 4, 3))
    together = lloyd(colours, counts, starts, max_iter=30, eps=1.0)
    for i in range(6):
        alone = lloyd(colours, counts, starts[[i]], max_iter=30, eps=1.0)
        np.testing.assert_array_equal(together[0][i], alone[0][0])
        np.testing.assert_allclose(together[1][i], alone[1][0])
        np.testing.assert_allclose(together[2][i], alone[2][0])


@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_objective_is_that_of_twenty_opencv_attempts(photo, k):
    cv2.setRNGSeed(0)
    best, _, _ = cv2.kmeans(photo.reshape(-1, 3).astype(np.float32), k, None, CRITERIA, 20, cv2.KMEANS_RANDOM_CENTERS)
    assert objective(photo, cluster(photo, k=k).masks) <= best * 1.001


@pytest.mark.parametrize("seed", range(5))
def test_any_seed_reaches_the_objective_on_a_grey_photograph(grey_photo, seed):
    cv2.setRNGSeed(0)
    best, _, _ = cv2.kmeans(
        grey_photo.reshape(-1, 3).astype(np.float32), 5, None, CRITERIA, 20, cv2.KMEANS_RANDOM_CENTERS
    )
    assert objective(grey_photo, cluster(grey_photo, k=5, seed=seed).masks) <= best * 1.001


def test_clusters_share_out_the_foreground_from_dark_to_light(photo):
    foreground = whole(photo)
    foreground[:40] = False
    masks = cluster(photo, foreground, k=4).masks
    np.testing.assert_array_equal(masks.sum(0), foreground)
    brightness = [photo[mask].sum(1).mean() for mask in masks]
    assert brightness == sorted(brightness)


def test_colours_outside_the_foreground_have_no_influence(photo):
    foreground = whole(photo)
    foreground[:40] = False
    painted = np.where(foreground[..., None], photo, np.uint8(255))
    np.testing.assert_array_equal(cluster(photo, foreground).masks, cluster(painted, foreground).masks)


def test_a_working_size_returns_masks_at_the_images_own_size(photo):
    native, resized = cluster(photo).masks, cluster(photo, size=256).masks
    assert resized.shape == native.shape
    np.testing.assert_array_equal(resized.sum(0), whole(photo))
    assert (native == resized).mean() > 0.9  # the pixels along the clusters' borders may differ


def test_one_colour_is_one_cluster_and_the_rest_are_empty():
    found = cluster(np.full((6, 7, 3), 90, np.uint8), k=3)
    assert found.masks.sum((1, 2)).tolist() == [42, 0, 0] and found.note == "few_colours"


def test_as_many_colours_as_clusters_are_told_apart_exactly():
    image = np.zeros((5, 6, 3), np.uint8)
    image[:, 2:] = 10
    image[:, 5] = 250
    found = cluster(image, k=3)
    assert found.masks.sum((1, 2)).tolist() == [10, 15, 5] and found.note == ""


def test_fewer_foreground_pixels_than_clusters_give_empty_masks(photo):
    foreground = np.zeros(photo.shape[:2], bool)
    foreground[0, :2] = True
    found = cluster(photo, foreground, k=3)
    assert found.masks.shape == (3, *photo.shape[:2]) and not found.masks.any()
    assert found.note == "empty_foreground"


def test_a_cluster_that_empties_takes_the_farthest_pixel_of_the_largest():
    colours = np.array([[0.0, 0, 0], [10, 10, 10], [200, 200, 200]])
    start = np.array([[[5.0, 5, 5], [900, 900, 900]]])  # nothing is near the second centre
    labels, centres, spread = lloyd(colours, np.array([5, 5, 1]), start, max_iter=100, eps=0)
    assert labels[0].tolist() == [0, 0, 1]
    np.testing.assert_allclose(centres[0], [[5, 5, 5], [200, 200, 200]])
    np.testing.assert_allclose(spread, 10 * 75)


def test_histogram_bins_keep_sums_and_counts(photo):
    codes, counts = np.unique(pack(photo), return_counts=True)
    bins, sizes = coarsen(unpack(codes), counts)
    assert len(bins) < len(codes) and sizes.sum() == photo.shape[0] * photo.shape[1]
    np.testing.assert_allclose(sizes @ bins, photo.reshape(-1, 3).sum(0))


@pytest.mark.parametrize(
    "options",
    [{"k": 1}, {"k": 256}, {"attempts": 0}, {"max_iter": 1}, {"eps": -1}, {"fg_alpha_min": 256}, {"size": 0}],
)
def test_impossible_parameters_are_refused_by_name(options):
    with pytest.raises(ValueError, match=f"kmeans: {next(iter(options))} must"):
        Kmeans(**options)
