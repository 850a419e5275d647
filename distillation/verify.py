"""`--verify`: the checks of the method on the user's own data, teacher and machine, printed as a table.

Nothing is left behind: the short trainings write to a temporary folder.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillation.config import FEATURE_LOSSES, LOSSES, DistillationConfig
from distillation.export import export_student
from distillation.hungarian import HungarianMatcher
from distillation.listing import PICTURE_NAME
from distillation.losses import DistillationLoss
from distillation.memory import over_budget, peak_gb, pressure_level
from distillation.model import Distiller
from distillation.recipe import learning_rate
from distillation.trainer import DistillationTrainer
from sam3.engine import checkpoint, distributed, log
from sam3.engine.batch import to_device
from sam3.engine.distributed import World
from sam3.engine.files import human_bytes
from sam3.engine.rng import seed_everything
from sam3.engine.weights import same_bytes

TRAINED_PICTURES = 32  # of the short training; all of a smaller set
FULL_PARAMETERS = 100_268_590
FULL_EXPORT_MB = (200, 202)
logger = logging.getLogger("sam3.distillation")


class Failed(Exception):
    """A check that does not hold; the text says what was found."""


def verify(config: DistillationConfig) -> int:
    """Run all checks; 0 if each holds, else 1."""
    with distributed.start(config.device) as world, tempfile.TemporaryDirectory() as folder:
        log.setup(None, world.rank)
        if world.size > 1:
            raise ValueError("--verify runs in one process; start it without torchrun")
        checks = Verification(config, world, Path(folder))
        results = [(name, *_outcome(check)) for name, check in checks.all()]
        del checks
    logger.info("")
    for name, good, text in results:
        logger.info(f"{'ok    ' if good else 'FAILED'} {name:22s} {text}")
    failed = sum(not good for _, good, _ in results)
    logger.info(f"{len(results) - failed} of {len(results)} checks passed")
    return 1 if failed else 0


def _outcome(check: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, check()
    except (Failed, ValueError, OSError) as error:
        return False, " ".join(str(error).split())


def require(holds: bool, found: str) -> None:
    """Failed with the text `found` if the condition does not hold."""
    if not holds:
        raise Failed(found)


class Verification:
    """The checks; each returns what it found, or raises `Failed`."""

    def __init__(self, config: DistillationConfig, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.config = replace(config, tensorboard=False, log_every_steps=1, save_every_steps=0, keep_last=0)

    def all(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """In the order of the method's own list, then the added ones."""
        yield "dataset", self.check_dataset
        yield "forward", self.check_forward
        yield "matching", self.check_matching
        yield "losses", self.check_losses
        yield "training", self.check_training
        yield "memory", self.check_memory
        yield "parameters", self.check_parameters
        yield "export", self.check_export
        yield "schedule", self.check_schedule
        yield "resume", self.check_resume
        yield "latency (report)", self.report_latency

    # What the checks share --------------------------------------------------------------------------------------------

    def trainer(self, name: str, **settings: Any) -> DistillationTrainer:
        """A trainer of phase 1 that writes to a temporary folder of this name."""
        config = replace(self.config, checkpoint_dir=str(self.folder / name), **settings)
        seed_everything(config.seed)
        trainer = DistillationTrainer(config, config.phase(1), self.world)
        if "first" in self.__dict__:  # the teacher is the same for all
            trainer.teacher = self.first.teacher
        return trainer

    @cached_property
    def first(self) -> DistillationTrainer:
        return self.trainer("first")

    @property
    def distiller(self) -> Distiller:
        return self.first.distiller

    @cached_property
    def outputs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Teacher's and student's for the first training picture, in training mode."""
        dataset = self.first.sources.dataset(training=True)
        batch = dataset.read_embeddings(dataset.load([0], epoch=0))
        self.first._start()
        self.distiller.train()
        return self.distiller.run(to_device(batch, self.world.device))

    # The method's list ------------------------------------------------------------------------------------------------

    def check_dataset(self) -> str:
        train, val = self.first.sources.train, self.first.sources.val
        keys = [*train.keys(), *val.keys()]
        require(len(set(keys)) == len(keys), "a picture is in both splits")
        numbers = [int(PICTURE_NAME.fullmatch(f"{key}.jpg")[2]) for key in keys]
        require(numbers == sorted(numbers), "pictures are not in the order of their numbers")
        wanted = min(self.config.num_val, self.config.val_max_images or self.config.num_val)
        require(len(val) == wanted, f"{len(val)} validation pictures, wanted {wanted}")
        sample = self.first.sources.dataset(training=False)[0]
        teacher, student = sample["teacher_pixel_values"], sample["student_pixel_values"]
        side = self.config.image_size
        require(teacher.shape == student.shape == (3, side, side), f"tensors of {teacher.shape} and {student.shape}")
        low, high = teacher.min().item(), teacher.max().item()
        pixels = teacher * _column(self.config.teacher_std) + _column(self.config.teacher_mean)
        again = (pixels - _column(self.config.student_mean)) / _column(self.config.student_std)
        error = (again - student).abs().max().item()
        require(error < 1e-5, f"the two tensors differ by {error:.2g} from being one picture")
        return f"{len(train)} train, {len(val)} val; tensors agree to {error:.1g}; teacher's in [{low:.2f}, {high:.2f}]"

    def check_forward(self) -> str:
        teacher, student = self.outputs
        trunk, side = self.first.teacher.trunk_shape, self.config.image_size
        queries = {"teacher": self.first.teacher.num_queries, "student": self.first.student.config.num_queries}
        for name, out, finest in (("teacher", teacher, 4 * trunk[1]), ("student", student, side // 4)):
            shapes = {key: tuple(out[key].shape) for key in ("pred_masks", "pred_boxes", "pred_logits", "semantic_seg")}
            count = queries[name]
            wanted = {
                "pred_masks": (1, count, finest, finest),
                "pred_boxes": (1, count, 4),
                "pred_logits": (1, count),
                "semantic_seg": (1, 1, finest, finest),
            }
            require(shapes == wanted, f"{name} gives {shapes}, wanted {wanted}")
            sides = [feature.shape[-1] for feature in out["fpn_features"]]
            require(sides == [finest, finest // 2, finest // 4], f"{name}'s feature maps have sides {sides}")
        require(all(f.requires_grad for f in student["fpn_features"]), "the student's features carry no gradient")
        require(not any(p.requires_grad for p in self.first.teacher.parameters()), "the teacher is not frozen")
        return f"masks {teacher['pred_masks'].shape[-1]} and {student['pred_masks'].shape[-1]} px, {queries}"

    def check_matching(self) -> str:
        teacher, student = self.outputs
        matcher = HungarianMatcher(mask_size=self.config.matcher_mask_size)
        rows, columns = matcher(student, teacher)[0]
        wanted = min(student["pred_logits"].shape[1], teacher["pred_logits"].shape[1])
        require(len(rows) == wanted, f"{len(rows)} pairs, wanted {wanted}")
        require(rows.tolist() == list(range(wanted)), "student queries are not each matched once")
        require(columns.unique().numel() == wanted, "a teacher query is matched twice")
        order = torch.randperm(teacher["pred_logits"].shape[1], generator=torch.Generator().manual_seed(0))
        order = order.to(self.world.device)
        part = {name: teacher[name][:, order[:wanted]] for name in ("pred_masks", "pred_boxes", "pred_logits")}
        _, found = HungarianMatcher(mask_size=None)({**teacher, **part}, teacher)[0]
        same = _same_rows(teacher, found, order[:wanted])
        require(same, "a shuffled part of the teacher's own queries is not found again")
        return f"{wanted} pairs, a shuffled part of the teacher's queries is recovered"

    def check_losses(self) -> str:
        teacher, student = self.outputs
        teacher, student = _float(teacher), _float(student)
        pairs = self.distiller.matcher(student, teacher)
        weights = {name: weight or 1.0 for name, weight in self.config.loss_weights.items()}
        losses = DistillationLoss(weights, self.config.dice_eps)(student, teacher, pairs, True)
        values = {name: losses["raw"][name].item() for name in LOSSES}
        require(all(map(math.isfinite, values.values())), f"not finite: {values}")
        total, summed = losses["total_loss"].item(), sum(weights[name] * value for name, value in values.items())
        require(math.isclose(total, summed, rel_tol=1e-5), f"total {total}, but the terms sum to {summed}")
        bare = {name: value for name, value in student.items() if name not in ("fpn_features", "encoder_output")}
        later = DistillationLoss(weights, self.config.dice_eps)(bare, teacher, pairs, False)
        require(all(float(later["raw"][name]) == 0 for name in FEATURE_LOSSES), "phase 2 compares features")
        for name in LOSSES:
            alone = DistillationLoss({n: float(n == name) for n in LOSSES}, self.config.dice_eps)
            alone(student, teacher, pairs, True)["total_loss"].backward(retain_graph=True)
            gradients = [p.grad for p in self.first.student.parameters() if p.grad is not None]
            require(any(bool(g.any()) for g in gradients), f"{name} reaches no weight")
            self.first.student.zero_grad(set_to_none=True)
        require(all(p.grad is None for p in self.first.teacher.parameters()), "the teacher received gradients")
        return ", ".join(f"{name.removesuffix('_loss')} {value:.3g}" for name, value in values.items())

    def check_training(self) -> str:
        self.__dict__.pop("outputs", None)  # and with them a backward pass's memory
        count = min(TRAINED_PICTURES, len(self.first.sources.train))
        trainer = self.trainer("training", num_train=count, phase1_epochs=1, grad_accum_steps=1, val_max_images=1,
                               phase1_warmup=min(self.config.phase1_warmup, count // 8))  # fmt: skip
        require(trainer.train([]) == 0, "training ended with an error")
        lines = [json.loads(line) for line in (trainer.output / "metrics.jsonl").read_text().splitlines()]
        losses = [line["train/total_loss"] for line in lines if "train/total_loss" in line]
        require(len(losses) == count, f"{len(losses)} steps logged, wanted {count}")
        require(all(loss is not None for loss in losses), "a loss was not finite")
        quarter = max(1, count // 4)
        first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
        require(last < first, f"the loss went from {first:.4g} to {last:.4g} over {count} steps")
        return f"loss {first:.4g} -> {last:.4g}, means of the first and last {quarter} of {count} steps"

    def check_memory(self) -> str:
        problem = over_budget(self.config, self.world.device)
        require(not problem, problem)
        level = pressure_level()
        shown = "" if level is None else f", pressure level {level}"
        return f"{peak_gb(self.world.device):.2f} GB of {self.config.memory_budget_gb:g} on {self.world.device}{shown}"

    # Added checks -----------------------------------------------------------------------------------------------------

    def check_parameters(self) -> str:
        student = self.first.student
        count = sum(p.numel() for p in student.parameters())
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        if self.config.student == "full":
            require(count == FULL_PARAMETERS, f"{count:,} parameters, wanted {FULL_PARAMETERS:,}")
        return f"{count:,}, of which {trained:,} are trained"

    def check_export(self) -> str:
        path = self.folder / "student.safetensors"
        export_student(self.first.student, path, {})
        size = path.stat().st_size
        low, high = FULL_EXPORT_MB
        if self.config.student == "full":
            require(low <= size / 1e6 <= high, f"{size / 1e6:.1f} MB, wanted {low} to {high} MB")
        return f"{human_bytes(size)} in half precision"

    def check_schedule(self) -> str:
        phase, total = replace(self.config.phase(1), warmup=500), 20_350
        found = [learning_rate(step, total, phase) / phase.lr for step in (0, 499, 500, total - 1)]
        end = 0.5 * (1 + math.cos(math.pi * (total - 501) / (total - 500)))
        require(all(map(math.isclose, found, (1 / 500, 1.0, 1.0, end))), f"rates {found} of the highest")
        steps = self.first.run.settings.steps_in(self.first.run.sampler.batches_per_epoch())
        pictures = self.config.batch_size * self.config.grad_accum_steps
        wanted = math.ceil(len(self.first.sources.train) / pictures)
        require(steps == wanted, f"{steps} steps an epoch, wanted {wanted}")
        return f"warm-up and cosine as they should be; {steps} steps an epoch"

    def check_resume(self) -> str:
        settings = {"num_train": 4, "phase1_epochs": 1, "grad_accum_steps": 1, "val_max_images": 1}
        whole = self.trainer("whole", **settings)
        whole.train([])
        config = replace(whole.config, checkpoint_dir=str(self.folder / "halves"))
        for resume, max_steps in (("", 2), ("auto", 0)):
            seed_everything(config.seed)
            half = DistillationTrainer(config, config.phase(1), self.world, resume=resume, max_steps=max_steps)
            half.teacher = self.first.teacher
            half.train([])
        ends = [checkpoint.load(checkpoint.newest(trainer.output)) for trainer in (whole, half)]
        require(ends[0]["step"] == ends[1]["step"], f"{ends[0]['step']} and {ends[1]['step']} steps")
        different = [k for k, tensor in ends[0]["model"].items() if not same_bytes(tensor, ends[1]["model"][k])]
        if self.world.device.type == "cpu":
            require(not different, f"{len(different)} tensors differ after resuming, such as {different[:3]}")
            return f"{ends[0]['step']} steps = 2 + resumed, bit for bit"
        return f"{ends[0]['step']} steps = 2 + resumed; {len(different)} tensors differ in rounding"

    @torch.no_grad()
    def report_latency(self) -> str:
        student = self.first.student.eval()
        side = self.config.image_size
        picture = torch.zeros(1, 3, side, side, device=self.world.device)
        inputs = (picture, self.distiller.token_ids[:1], self.distiller.token_padding[:1])
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            student(*inputs)["pred_logits"].cpu()
            times.append(time.perf_counter() - begin)
        return f"{1000 * min(times):.0f} ms a picture on {self.world.device}, float32"


def _column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]


def _float(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as float32."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.float()
        return tuple(map(convert, value)) if isinstance(value, tuple) and isinstance(value[0], Tensor) else value

    return {name: convert(value) for name, value in outputs.items()}


def _same_rows(outputs: Mapping[str, Any], found: Tensor, wanted: Tensor) -> bool:
    """Whether two lists of queries are the same, or queries that say the same."""
    names = ("pred_masks", "pred_boxes", "pred_logits")
    return all(torch.equal(outputs[name][0][found], outputs[name][0][wanted]) for name in names)
