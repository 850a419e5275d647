"""Clips of SA-V for training and validation: pictures or stored embeddings, masks, and a prompt for each object.

Everything random in a clip comes from one generator seeded by (seed, epoch, index): a batch, a worker or the order of
the clips changes nothing.

Letters: V clips, T frames, B objects of all clips together, S side of the model's square, M side of the mask grid,
E G channels and side of an embedding.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sam3.engine.pictures import empty_images
from sam3.engine.prefetch import ReusedMemory
from sam3.engine.sav import KINDS, VideoFolder, read_masklets
from sam3.engine.video_embeddings import VideoEmbeddings
from sam3.transforms import Preprocess
from stage2.data.augmentation import Augmentation, augment
from stage2.data.batch import ClipBatch
from stage2.data.clips import ClipSampling, Scene, choose_clip, read_scene
from stage2.data.frames import frame_key
from stage2.data.mask_grid import grid_masks
from stage2.data.prompts import Prompts, PromptSampling, draw_prompts
from stage2.data.stills import Stills, still_scene

MAX_TRIES = 100  # videos that are looked at for one clip
READERS = 4  # threads that read embeddings


@dataclass
class _Sample:
    """One clip, ready but for its embeddings. masks: bool (N, T, M, M)."""

    frames: list[tuple[str, int]]
    size: tuple[int, int]
    masks: Tensor
    states: Tensor
    prompts: Prompts


class SavDataset:
    """Clips of the videos `names` below `root`; a `sam3.engine.loader.PictureDataset`.

    Clip i is of video i mod their number. In training, a video that has no object where a clip can start gives way to
    another one; in validation it is left out of its batch, which may leave that empty. `skipped` lists such videos.

    mask_size: M. kinds: annotations to use. store: embeddings to read in place of pictures. augmentation: of pictures.
    stills: pictures to make a share of the clips of. length: number of clips, that of the videos if left out.
    training: False gives each video the same clip every time, played forwards, as it is, with boxes as annotated.
    skip_bad: treat what cannot be read, embeddings too, like a video without objects; else ValueError or
    FileNotFoundError names the file.
    """

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str],
        preprocess: Preprocess,
        mask_size: int,
        sampling: ClipSampling,
        prompts: PromptSampling,
        *,
        kinds: Sequence[str] = KINDS,
        store: VideoEmbeddings | None = None,
        augmentation: Augmentation | None = None,
        stills: Stills | None = None,
        length: int | None = None,
        seed: int = 0,
        training: bool = True,
        skip_bad: bool = False,
    ) -> None:
        if not names:
            raise ValueError(f"no videos of {root} to make clips of")
        if store is not None and (augmentation is not None or stills is not None):
            raise ValueError("embeddings are of frames as they are: there can be no augmentation and no still pictures")
        self.root, self.names, self.preprocess, self.mask_size = Path(root), list(names), preprocess, mask_size
        self.kinds, self.store, self.seed, self.skip_bad, self.training = kinds, store, seed, skip_bad, training
        self.length = len(self.names) if length is None else length
        self.sampling = sampling if training else replace(sampling, reversal=0.0)
        self.prompts = prompts if training else prompts.for_validation()
        self.augmentation, self.stills = (augmentation, stills) if training else (None, None)

    def __len__(self) -> int:
        return self.length

    # Clips ------------------------------------------------------------------------------------------------------------

    def load(self, indices: Sequence[int], epoch: int = 0) -> ClipBatch:
        """The clips `indices` as `epoch` shows them, still without embeddings.

        Raises ValueError if none of MAX_TRIES videos gives a clip.
        """
        images = None
        if self.store is None:
            images = empty_images(len(indices) * self.sampling.num_frames, self.preprocess.img_size)
            images = images.unflatten(0, (len(indices), self.sampling.num_frames))
        samples: list[_Sample] = []
        skipped: list[tuple[str, str]] = []
        for index in indices:
            out = None if images is None else images[len(samples)]
            if (sample := self._sample(index, epoch, out, skipped)) is not None:
                samples.append(sample)
        return self._collate(samples, None if images is None else images[: len(samples)], skipped)

    def _sample(self, index: int, epoch: int, out: Tensor | None, skipped: list[tuple[str, str]]) -> _Sample | None:
        """Clip `index`; its pictures go to `out`, uint8 (T, 3, S, S) zeros. What cannot be used is added to `skipped`;
        None if nothing takes its place."""
        generator = clip_generator(self.seed, epoch if self.training else 0, index)
        still = self.stills is not None and generator.random() < self.stills.ratio
        tries = 0
        for number in itertools.islice(self._candidates(index, still, generator), MAX_TRIES if self.training else 1):
            tries += 1
            source = self.stills.images.key(number) if still else self.names[number]
            try:
                scene = self._scene(number, still, generator)
            except (ValueError, OSError) as error:
                if not self.skip_bad:
                    raise
                skipped.append((source, str(error)))
                continue
            if scene is not None:
                return self._finish(scene, out, generator)
            skipped.append((source, self._no_object(source, still)))
        if self.training:
            raise ValueError(f"{tries} videos or pictures gave no clip; of the last one, {skipped[-1][1]}")
        return None

    def _candidates(self, index: int, still: bool, generator: np.random.Generator) -> Iterator[int]:
        """Videos or pictures, each once, in the order in which they are tried."""
        if still:
            yield from generator.permutation(len(self.stills.images)).tolist()
        else:
            own = index % len(self.names)
            yield own
            yield from (other for other in generator.permutation(len(self.names)).tolist() if other != own)

    def _scene(self, number: int, still: bool, generator: np.random.Generator) -> Scene | None:
        if still:
            return still_scene(self.stills, number, self.sampling, self.preprocess.img_size, generator)
        video = VideoFolder(self.names[number], self.root / self.names[number])
        masklets = read_masklets(video, self.kinds)
        choice = choose_clip(masklets, self.sampling, generator)
        if choice is None:
            return None
        if self.store is not None and self.skip_bad:
            for frame in choice.numbers:
                self.store.read(video.name, frame)  # maps the file, which shows whether it is whole
        return read_scene(video, masklets, choice, with_pictures=self.store is None)

    def _no_object(self, source: str, still: bool) -> str:
        if still:
            return f"{source} has no object with a box and a mask to follow"
        return f"none of the objects in {self.root / source} is visible where a clip of it can start"

    def _finish(self, scene: Scene, out: Tensor | None, generator: np.random.Generator) -> _Sample:
        if self.augmentation is not None:
            scene = augment(scene, self.augmentation, generator)
        if out is not None:
            for picture, place in zip(scene.pictures, out, strict=True):
                self.preprocess.fit_into(picture, place)
        prompts = draw_prompts(scene.masks[:, 0], self.preprocess, self.prompts, generator)
        masks = grid_masks(scene.masks, self.preprocess, self.mask_size)
        return _Sample(scene.frames, self.preprocess.fitted_size(*scene.size), masks, scene.states, prompts)

    def _collate(self, samples: list[_Sample], images: Tensor | None, skipped: list[tuple[str, str]]) -> ClipBatch:
        num_frames, side = self.sampling.num_frames, self.mask_size
        counts = torch.tensor([len(sample.states) for sample in samples], dtype=torch.int64)
        # The empty tensors give type and shape where there is no clip.
        return ClipBatch(
            keys=[frame_key(*sample.frames[0]) for sample in samples],
            images=images,
            sizes=torch.tensor([sample.size for sample in samples], dtype=torch.int64).view(-1, 2),
            embeddings=None,
            clip_of_object=torch.arange(len(samples)).repeat_interleave(counts),
            masks=torch.cat([torch.zeros(0, num_frames, side, side).bool(), *(sample.masks for sample in samples)]),
            states=torch.cat([torch.zeros(0, num_frames).long(), *(sample.states for sample in samples)]),
            kinds=[kind for sample in samples for kind in sample.prompts.kinds],
            points=torch.cat([torch.zeros(0, 2, 2), *(sample.prompts.points for sample in samples)]),
            labels=torch.cat([torch.zeros(0, 2).long(), *(sample.prompts.labels for sample in samples)]),
            frames=[sample.frames for sample in samples],
            skipped=skipped,
        )

    # Embeddings -------------------------------------------------------------------------------------------------------

    def read_embeddings(self, batch: ClipBatch, memory: ReusedMemory | None = None, pin: bool = False) -> ClipBatch:
        """`batch` with its stored embeddings (V, T, E, G, G), if there is a store. memory, pin: where to put them.

        Not in a worker: they would be copied twice, and at full size fill shared memory with 85 MB a clip. Threads copy
        each file's bytes once, to where the device takes them.
        """
        if self.store is None:
            return batch
        form = self.store.format
        shape = (len(batch), self.sampling.num_frames, *form.shape)
        if pin or not len(batch):
            batch.embeddings = torch.empty(shape, dtype=form.torch_dtype, pin_memory=pin)
        else:
            num_bytes = torch.Size(shape).numel() * form.torch_dtype.itemsize
            batch.embeddings = (memory or ReusedMemory()).take(num_bytes).view(form.torch_dtype).view(shape)
        frames = [frame for clip in batch.frames for frame in clip]
        with ThreadPoolExecutor(READERS, thread_name_prefix="read-embeddings") as pool:
            copies = [
                pool.submit(self._copy, frame, place)
                for frame, place in zip(frames, batch.embeddings.flatten(0, 1), strict=True)
            ]
        for copy in copies:
            copy.result()
        return batch

    def _copy(self, frame: tuple[str, int], out: Tensor) -> None:
        out.copy_(self.store.read(*frame))


def clip_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of clip `index` in `epoch`."""
    digest = hashlib.sha256(f"{seed} {epoch} {index}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
