"""Scenes made on the fly, with random prompts to train on, or with the fixed ones that are evaluated.

The same seed, epoch and index give the same scene in any process, and in the same place of a batch the same prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillation.supervised.batch import NOTHING, ClickRows, SceneBatch, coverage, pad_rows
from distillation.supervised.outlines import turns_of
from distillation.supervised.scene_prompts import (
    TRAINING_MIX,
    ScenePrompt,
    boxes_of,
    choose_prompt,
    inner_point,
    make_prompt,
    noisy_box,
)
from sam3.engine.scene_names import PARTS, WORDS, Kind
from sam3.engine.scenes import Scene, make_scene, number_of_scene, turned
from sam3.model.video_prompts import BOX_LABELS
from sam3.transforms import Preprocess

EVALUATED = ("text", "text", "absent", "absent", "box", "box", "point")
RANDOM_CLICKS = 0.5  # share of the training clicks that fall anywhere on the object instead of into its middle
MASK_SCALE = 4  # cells of the mask grid per token of the trunk's


@dataclass
class _Asked:
    """One scene with what is asked about it. clicks, corners: (object, points, labels)."""

    key: str
    image: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    words: np.ndarray
    turns: np.ndarray
    prompts: list[ScenePrompt]
    exemplars: list[list[np.ndarray]]
    points: list[list[np.ndarray]]
    clicks: list[tuple[int, np.ndarray]]
    corners: list[tuple[int, np.ndarray]]


class SceneDataset:
    """What `sam3.engine.loader` asks of a dataset; `store` is None, there are no embeddings.

    num_scenes: length of an epoch. usual_size: side of usual scenes, px; where the model takes less, objects are larger
    for that, so that tokens see what they see in usual scenes, for less. preprocess, patch_size: the model's. split:
    "train" or "val". prompts, clicks: image-prompt pairs, and rows for the click head, of each training scene;
    click_every: one scene of a batch in so many has clicks, since the second neck costs as much as the first. photos:
    see `make_scene`. mix: see `choose_prompt`. different: if not 0, training shows no more scenes than these, each in
    all quarter turns and mirrored, and keeps them in memory (100 KB each at 112 px): for models that learn faster than
    scenes are made.
    """

    store = None

    def __init__(
        self,
        num_scenes: int,
        usual_size: int,
        preprocess: Preprocess,
        patch_size: int,
        split: str,
        seed: int = 0,
        prompts: int = 2,
        clicks: int = 4,
        click_every: int = 2,
        photos: Sequence[np.ndarray] | None = None,
        mix: Mapping[str, float] = TRAINING_MIX,
        different: int = 0,
    ) -> None:
        self.num_scenes, self.preprocess, self.split = num_scenes, preprocess, split
        self.zoom = usual_size / preprocess.img_size
        self.mask_side = MASK_SCALE * preprocess.img_size // patch_size
        self.seed, self.prompts, self.clicks, self.click_every = seed, prompts, clicks, click_every
        self.photos, self.mix = photos, mix
        self.different = different
        self._kept: dict[int, Scene] = {}

    def __len__(self) -> int:
        return self.num_scenes

    def load(self, indices: Sequence[int], epoch: int) -> SceneBatch:
        if self.split == "val":
            return self._join([self._evaluated(index) for index in indices])
        return self._join([self._trained(i, epoch, place % self.click_every == 0) for place, i in enumerate(indices)])

    def read_embeddings(self, batch: SceneBatch, memory: Any, pin: bool) -> SceneBatch:
        return batch

    def _scene(self, number: int) -> Scene:
        seed, size = number_of_scene(self.seed, number), self.preprocess.img_size
        return make_scene(seed, size, self.split, photos=self.photos, zoom=self.zoom)

    def _again(self, number: int, rng: np.random.Generator) -> Scene:
        """One of the `different` scenes, turned and mirrored at random."""
        number %= self.different
        if number not in self._kept:
            self._kept[number] = self._scene(number)
        return turned(self._kept[number], int(rng.integers(4)), bool(rng.integers(2)))

    def _trained(self, index: int, epoch: int, with_clicks: bool) -> _Asked:
        number = epoch * self.num_scenes + index
        rng = np.random.default_rng([self.seed, number, 1])
        scene = self._again(number, rng) if self.different else self._scene(number)
        prompts = [choose_prompt(scene, rng, self.mix) for _ in range(self.prompts)]
        clicks, corners = [], []
        boxes = boxes_of(scene.masks)
        for turn in range(self.clicks if with_clicks else 0):
            shown = int(rng.integers(len(scene.objects)))
            if turn % 3 == 2:
                corners.append((shown, noisy_box(boxes[shown], self.preprocess.img_size, rng).reshape(2, 2)))
            else:
                anywhere = rng if rng.random() < RANDOM_CLICKS else None
                clicks.append((shown, inner_point(scene.masks[shown], anywhere)[None]))
        return self._ask(scene, number, prompts, clicks, corners, rng)

    def _evaluated(self, index: int) -> _Asked:
        scene, rng = self._scene(index), np.random.default_rng([self.seed, index, 2])
        prompts, seen = [], set()
        for kind in EVALUATED:
            prompt = make_prompt(kind, scene, rng)
            mark = prompt and (kind, prompt.text, *prompt.boxes, *prompt.points)
            if prompt is not None and mark not in seen:
                seen.add(mark)
                prompts.append(prompt)
        shown = rng.permutation(len(scene.objects))[:2].tolist()
        boxes = boxes_of(scene.masks)
        clicks = [(i, inner_point(scene.masks[i], None)[None]) for i in shown]
        corners = [(i, boxes[i].reshape(2, 2)) for i in shown]
        return self._ask(scene, index, prompts, clicks, corners, None)

    def _ask(
        self,
        scene: Scene,
        number: int,
        prompts: list[ScenePrompt],
        clicks: list[tuple[int, np.ndarray]],
        corners: list[tuple[int, np.ndarray]],
        rng: np.random.Generator | None,
    ) -> _Asked:
        size, boxes = self.preprocess.img_size, boxes_of(scene.masks)
        shown = [[boxes[i] if rng is None else noisy_box(boxes[i], size, rng) for i, _ in p.boxes] for p in prompts]
        points = [[inner_point(scene.masks[i], rng) + 0.5 for i, _ in p.points] for p in prompts]
        seen = scene.image, scene.masks, boxes, words_of(scene.objects), turns_of(scene)
        return _Asked(str(number), *seen, prompts, shown, points, clicks, corners)

    def _join(self, scenes: list[_Asked]) -> SceneBatch:
        size, most = self.preprocess.img_size, max(len(scene.masks) for scene in scenes)
        count = len(scenes)
        images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).contiguous()
        masks = torch.zeros(count, most, self.mask_side, self.mask_side, dtype=torch.uint8)
        boxes, words = torch.zeros(count, most, 4), torch.full((count, most, len(PARTS)), -1)
        turns = torch.full((count, most), -1)
        instances = torch.full((count, size, size), NOTHING, dtype=torch.uint8)
        full = torch.zeros(count, most, size, size, dtype=torch.bool) if self.split == "val" else None
        for i, scene in enumerate(scenes):
            masks[i, : len(scene.masks)] = coverage(scene.masks, self.mask_side)
            boxes[i, : len(scene.masks)] = torch.from_numpy(scene.boxes) / size
            words[i, : len(scene.masks)] = torch.from_numpy(scene.words)
            turns[i, : len(scene.masks)] = torch.from_numpy(scene.turns)
            instances[i] = torch.from_numpy(instances_of(scene.masks))
            if full is not None:
                full[i, : len(scene.masks)] = torch.from_numpy(scene.masks)
        prompts = [prompt for scene in scenes for prompt in scene.prompts]
        wanted = np.zeros((len(prompts), most), bool)
        doubtful = wanted.copy()
        for row, prompt in enumerate(prompts):
            wanted[row, : len(prompt.wanted)] = prompt.wanted
            doubtful[row, : len(prompt.doubtful)] = prompt.doubtful
        exemplars = [[box / size for box in row] for scene in scenes for row in scene.exemplars]
        points = [[point / size for point in row] for scene in scenes for row in scene.points]
        shown = [(prompt.boxes or prompt.points or [(-1, 0)])[0][0] for prompt in prompts]
        return SceneBatch(
            [scene.key for scene in scenes],
            *(images, masks, boxes),
            torch.tensor([i for i, scene in enumerate(scenes) for _ in scene.prompts]),
            [prompt.kind for prompt in prompts],
            [prompt.text for prompt in prompts],
            torch.from_numpy(wanted),
            torch.from_numpy(doubtful),
            *pad_rows(exemplars, [[label for _, label in prompt.boxes] for prompt in prompts], 4),
            *pad_rows(points, [[label for _, label in prompt.points] for prompt in prompts], 2),
            torch.tensor(shown),
            _click_rows([scene.clicks for scene in scenes], (1,)),
            _click_rows([scene.corners for scene in scenes], BOX_LABELS),
            words=words,
            turns=turns,
            instances=instances,
            full_masks=full,
        )


def instances_of(masks: np.ndarray) -> np.ndarray:
    """bool (N, S, S) that do not overlap -> uint8 (S, S), the number of each pixel's mask, or NOTHING."""
    found = np.full(masks.shape[1:], NOTHING, np.uint8)
    for number, mask in enumerate(masks):
        found[mask] = number
    return found


def words_of(objects: Sequence[Kind]) -> np.ndarray:
    """Place of each object's shape, colour and texture in WORDS, -1 for what has no word: long (N, 3)."""
    places = [{word: place for place, word in enumerate(WORDS[part])} for part in PARTS]
    return np.array(
        [[own.get(getattr(kind, part), -1) for part, own in zip(PARTS, places, strict=True)] for kind in objects]
    )


def _click_rows(rows: list[list[tuple[int, np.ndarray]]], labels: Sequence[int]) -> ClickRows:
    """Of each image (object, points (P, 2)); all get the same P labels."""
    flat = [(image, shown, points) for image, own in enumerate(rows) for shown, points in own]
    points = np.stack([xy for _, _, xy in flat]) if flat else np.zeros((0, len(labels), 2), np.float32)
    image, shown = (torch.tensor([row[column] for row in flat], dtype=torch.long) for column in (0, 1))
    return ClickRows(image, shown, torch.from_numpy(points), _repeated(labels, len(flat)))


def _repeated(labels: Sequence[int], count: int) -> Tensor:
    return torch.tensor(list(labels), dtype=torch.long).expand(count, -1)
