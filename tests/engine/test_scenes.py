from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sam3.engine.scene_drawing import SYMMETRY, Pose, draw_look, draw_object, fill
from sam3.engine.scene_grounds import draw_ground, list_grounds, read_grounds, split_grounds
from sam3.engine.scene_names import PLAIN, SHAPES, Kind, kinds_of
from sam3.engine.scenes import (
    MAX_OBJECTS,
    MIN_AREA,
    MIN_SHOWN,
    Finish,
    cast_kinds,
    finish,
    keep_visible,
    make_scene,
    number_of_scene,
    paste,
    place,
    turned,
)

SIZE = 96
PHOTO = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("seed", range(20))
def test_a_scene(seed: int, split: str) -> None:
    scene = make_scene(seed, SIZE, split, [PHOTO])
    count = len(scene.objects)
    assert scene.image.shape == (SIZE, SIZE, 3) and scene.image.dtype == np.uint8
    assert scene.masks.shape == (count, SIZE, SIZE) and scene.masks.dtype == bool and 1 <= count <= MAX_OBJECTS
    assert (scene.masks.sum(0) <= 1).all(), "a pixel shows one object"
    assert scene.masks.mean((1, 2)).min() >= MIN_AREA
    assert set(scene.objects) <= set(kinds_of(split))
    present = [phrase for phrase in scene.phrases if phrase.matches]
    assert {i for phrase in present for i in phrase.matches} == set(range(count))
    assert len(present) < len(scene.phrases)


def test_the_same_number_is_the_same_scene_in_another_process() -> None:
    code = (
        "import hashlib; from sam3.engine.scenes import make_scene; s = make_scene(5, 64, 'train');"
        "print(hashlib.sha256(s.image.tobytes() + s.masks.tobytes()).hexdigest(), s.phrases)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for scene in (make_scene(5, 64, "train"), make_scene(5, 64, "train")):
        digest = hashlib.sha256(scene.image.tobytes() + scene.masks.tobytes()).hexdigest()
        assert other.strip() == f"{digest} {scene.phrases}"


def test_splits_and_numbers_have_streams_of_their_own() -> None:
    images = [make_scene(seed, 64, split).image for split in ("train", "val") for seed in range(4)]
    assert len({image.tobytes() for image in images}) == 8
    assert number_of_scene(0, 10**7 - 1) + 1 == number_of_scene(1, 0)
    with pytest.raises(ValueError, match="at most 10000000 scenes"):
        number_of_scene(0, 10**7)


def test_another_size_shows_the_same_scene() -> None:
    small, large = make_scene(4, 128, "train"), make_scene(4, 256, "train")
    assert small.objects == large.objects
    shrunk = large.masks[:, ::2, ::2]
    assert ((small.masks & shrunk).sum((1, 2)) / (small.masks | shrunk).sum((1, 2))).min() > 0.85


def circles(*poses: Pose) -> tuple[list, list]:
    looks = [draw_look(Kind("circle", "red", PLAIN), np.random.default_rng(i)) for i in range(len(poses))]
    return looks, [draw_object(look, pose, SIZE) for look, pose in zip(looks, poses, strict=True)]


def test_masks_are_exact() -> None:
    """Drawn alone, an object changes the ground where its mask is; drawn with others, where none is before it."""
    poses = [Pose(0.4, 0.5, 0.5, 0), Pose(0.6, 0.5, 0.4, 0), Pose(0.6, 0.2, 0.2, 0)]
    _, sprites = circles(*poses)
    alone = []
    for sprite in sprites:
        picture = np.full((3, SIZE, SIZE), 128, np.float32)
        (mask,) = paste(picture, [sprite])
        changed = (np.abs(picture - 128) > 1).any(0)
        assert (mask <= changed).all() and (changed & ~mask).sum() <= mask.sum() * 0.2, "the soft edge is all there is"
        assert mask.sum() == pytest.approx(np.pi / 4 * (poses[len(alone)].diameter * SIZE) ** 2, rel=0.03)
        alone.append(mask)
    together = paste(np.full((3, SIZE, SIZE), 128, np.float32), sprites)
    assert (together[2] == alone[2]).all()
    assert (together[1] == alone[1] & ~alone[2]).all()
    assert (together[0] == alone[0] & ~alone[1] & ~alone[2]).all()
    assert 0 < together[0].sum() < alone[0].sum()


def test_masks_are_where_the_picture_shows_the_objects() -> None:
    """Red on grey without noise, shading or blur of the camera: the mask is the redder half of each edge."""
    poses = [Pose(0.3, 0.3, 0.4, 0), Pose(0.7, 0.7, 0.3, 0)]
    _, sprites = circles(*poses)
    picture = np.full((3, SIZE, SIZE), 128, np.float32)
    masks = paste(picture, sprites)
    image = finish(picture, Finish(noise=0, exposure=1, blurred=False), np.random.default_rng(0)).astype(int)
    red = image[..., 0] - image[..., 1] > 10
    assert ((masks.any(0) & ~red).sum(), (red & ~masks.any(0)).sum()) <= (0, 0.1 * red.sum())


def test_hidden_and_tiny_objects_are_left_out_and_hide_nothing() -> None:
    poses = [
        Pose(0.5, 0.5, 0.20, 0),  # in front of all others
        Pose(0.5, 0.5, 0.205, 0),  # all but hidden by it
        Pose(0.1, 0.9, 0.05, 0),  # smaller than MIN_AREA
        Pose(0.5, 0.55, 0.24, 0),  # a part is seen
        Pose(0.0, 0.0, 0.30, 0),  # a quarter of it is in the picture: less than MIN_SHOWN
    ]
    looks, sprites = circles(*poses)
    kept = keep_visible(sprites, poses, looks, SIZE)
    assert kept == [3, 0], "from the back to the front"
    assert np.pi / 4 * 0.05**2 < MIN_AREA and MIN_SHOWN > 0.25
    assert keep_visible([None], poses[:1], looks[:1], SIZE) == []


def test_casts_hold_copies_and_relatives() -> None:
    generator = np.random.default_rng(0)
    casts = [cast_kinds("train", MAX_OBJECTS, generator) for _ in range(300)]
    assert {len(cast) for cast in casts} == set(range(1, MAX_OBJECTS + 1))
    assert sum(len(set(cast)) < len(cast) for cast in casts) > 150
    relatives = [
        any(a != b and (a.shape == b.shape or a.colour == b.colour) for a in cast for b in cast) for cast in casts
    ]
    assert sum(relatives) > 120


def test_sizes_lie_within_their_limits() -> None:
    generator = np.random.default_rng(0)
    poses = [pose for _ in range(100) for pose in place(cast_kinds("val", 6, generator), (0.08, 0.45), generator)]
    diameters = np.array([pose.diameter for pose in poses])
    assert 0.08 <= diameters.min() < 0.1 and 0.4 < diameters.max() <= 0.45
    for pose in place([Kind("crescent", "red", "dotted")] * 50, (0.08, 0.45), generator):
        assert fill("crescent") * pose.diameter**2 >= 0.015, "its dots can be seen"


def test_noise_keeps_the_mean_and_blur_the_edges() -> None:
    generator = np.random.default_rng(0)
    flat = finish(np.full((3, 64, 64), 100, np.float32), Finish(14, 1, False), generator).astype(float)
    assert flat.mean() == pytest.approx(100, abs=0.5) and flat.std() == pytest.approx(14 / 3**0.5, rel=0.05)
    step = np.zeros((3, 8, 8), np.float32)
    step[:, :, 4:] = 200
    blurred = finish(step, Finish(0, 1, True), generator)
    assert blurred[4, :, 0].tolist() == [0, 0, 0, 50, 150, 200, 200, 200]


def test_grounds() -> None:
    for seed in range(40):
        ground = draw_ground(50, [PHOTO], np.random.default_rng(seed))
        assert ground.shape == (3, 50, 50) and ground.dtype == np.float32
        assert 30 < ground.mean() < 225


def test_photos_are_dealt_and_read(tmp_path: Path) -> None:
    from PIL import Image

    for i in range(5):
        Image.fromarray(np.full((60, 120, 3), i, np.uint8)).save(tmp_path / f"coins{i}.png")
    paths = list_grounds(tmp_path)
    dealt = split_grounds(paths)
    assert (len(dealt["train"]), len(dealt["val"])) == (4, 1) and {*dealt["train"], *dealt["val"]} == set(paths)
    with pytest.raises(ValueError, match="1 photos are too few"):
        split_grounds(paths[:1])
    assert [photo.shape for photo in read_grounds(dealt["val"], 30)] == [(30, 60, 3)]
    assert {"coins.png", "moon.png"}.isdisjoint(path.name for path in list_grounds(None))


@pytest.mark.parametrize(("seed", "size", "split"), [(-1, 64, "train"), (0, 16, "train"), (0, 64, "test")])
def test_wrong_arguments(seed: int, size: int, split: str) -> None:
    with pytest.raises(ValueError, match=r"wanted a seed from 0|split 'test' is unknown"):
        make_scene(seed, size, split)


@pytest.mark.parametrize(("quarters", "mirrored"), [(0, False), (1, False), (3, False), (0, True), (1, True)])
def test_a_turned_scene_has_its_objects_turned(quarters: int, mirrored: bool):
    """A shape drawn at the turned angle covers what the turned mask covers."""
    scene = make_scene(5, 96, "train")
    kinds = [Kind(shape, "red", "plain") for shape in SHAPES]
    scene = replace(
        scene, objects=kinds, angles=np.linspace(0.2, 6, len(kinds)), masks=scene.masks[:1].repeat(len(kinds), 0)
    )
    other = turned(scene, quarters, mirrored)
    assert other.image.shape == scene.image.shape and other.phrases == scene.phrases
    assert (other.masks.sum((1, 2)) == scene.masks.sum((1, 2))).all()
    generator = np.random.default_rng(0)
    for kind, angle, after in zip(scene.objects, scene.angles, other.angles, strict=True):
        drawn = [draw_object(draw_look(kind, generator), Pose(0.5, 0.5, 0.8, float(a)), 64) for a in (angle, after)]
        masks = [np.zeros((64, 64), bool), np.zeros((64, 64), bool)]
        for mask, sprite in zip(masks, drawn, strict=True):
            mask[sprite.area] = sprite.mask
        expected = np.rot90(masks[0], quarters)
        assert ((expected[:, ::-1] if mirrored else expected) != masks[1]).mean() < 0.02, kind


@pytest.mark.parametrize("shape", SHAPES)
def test_symmetry_is_what_turns_a_shape_onto_itself(shape: str):
    def covered(angle: float) -> np.ndarray:
        look = draw_look(Kind(shape, "red", "plain"), np.random.default_rng(0))
        mask = np.zeros((96, 96), bool)
        sprite = draw_object(look, Pose(0.5, 0.5, 0.9, angle), 96)
        mask[sprite.area] = sprite.mask
        return mask

    times = SYMMETRY[shape]
    whole = covered(0.3).sum()
    assert (covered(0.3) != covered(0.3 + 2 * math.pi / (times or 7))).sum() < 0.02 * whole
    if times:
        assert (covered(0.3) != covered(0.3 + math.pi / times)).sum() > 0.05 * whole
