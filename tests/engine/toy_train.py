"""A training program in small, for the loop's tests: in process, as a program of its own, and under torchrun."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sam3.engine import checkpoint, distributed, log, rng
from sam3.engine.cli import make_parser, run_main
from sam3.engine.loop import train
from sam3.engine.loop_settings import LoopSettings, TrainResult
from sam3.engine.optim import build_optimizer, build_schedule, parameter_groups
from sam3.engine.sampler import EpochSampler


@dataclass
class ToyBatch:
    """inputs `(B, 4)`, targets `(B, 2)`."""

    inputs: Tensor
    targets: Tensor


class ToyData(Dataset):
    """Sample i follows from i alone. Samples in `bad` have NaN inputs."""

    def __init__(self, num_samples: int, sleep_s: float = 0.0, bad: Sequence[int] = ()) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(num_samples, 4, generator=generator)
        self.targets = torch.stack([self.inputs.sum(1), self.inputs[:, 0] * 2], 1)
        self.inputs[list(bad)] = float("nan")
        self.sleep_s = sleep_s

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(self.sleep_s)
        return self.inputs[index], self.targets[index]


def collate(samples: list[tuple[Tensor, Tensor]]) -> ToyBatch:
    return ToyBatch(torch.stack([s[0] for s in samples]), torch.stack([s[1] for s in samples]))


class ToyDistiller(nn.Module):
    """`noisy` adds BatchNorm and dropout, whose states a resumed run must take over."""

    def __init__(self, noisy: bool = True) -> None:
        super().__init__()
        extra = [nn.BatchNorm1d(8), nn.Dropout(0.3)] if noisy else []
        self.student = nn.Sequential(nn.Linear(4, 8), *extra, nn.ReLU(), nn.Linear(8, 2))

    def forward(self, batch: ToyBatch) -> dict[str, Tensor]:
        error = (self.student(batch.inputs) - batch.targets).square().mean()
        return {"total": error, "mse": error}


def run(
    output: str | Path | None,
    world: distributed.World,
    *,
    epochs: int = 2,
    batch_size: int = 4,
    num_samples: int = 32,
    sleep_s: float = 0.0,
    bad: Sequence[int] = (),
    noisy: bool = True,
    resume: str | Path | None = None,
    validate=None,
    drop_last: bool = True,
    lr: float = 0.05,
    optimizer: str = "adamw",
    metrics: log.MetricLog | None = None,
    **settings,
) -> tuple[TrainResult, ToyDistiller]:
    """One run from seed 0, or from `resume`."""
    rng.seed_everything(world.rank)
    model = ToyDistiller(noisy)
    for i, parameter in enumerate(model.parameters()):  # the same start in every process
        nn.init.uniform_(parameter, -0.5, 0.5, generator=torch.Generator().manual_seed(i))
    sampler = EpochSampler(num_samples, batch_size, rank=world.rank, world_size=world.size, seed=3, drop_last=drop_last)
    loader = DataLoader(ToyData(num_samples, sleep_s, bad), batch_sampler=sampler, collate_fn=collate)
    loop_settings = LoopSettings(epochs=epochs, **settings)
    total = epochs * loop_settings.steps_in(sampler.batches_per_epoch()) or loop_settings.max_steps
    result = train(
        model,
        loader,
        sampler,
        build_optimizer(optimizer, parameter_groups(model, 0.1), lr=lr),
        build_schedule("cosine", base_lr=lr, total_steps=max(total, 1)),
        loop_settings,
        world=world,
        output=output,
        saved=model.student,
        meta={"backbone": "toy"},
        validate=validate,
        metrics=metrics,
        resume=checkpoint.load(resume) if resume else None,
    )
    return result, model


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser("Trains a toy.")
    parser.add_argument("--output", required=True)
    for name, default in (("epochs", 2), ("batch-size", 4), ("accumulation", 1), ("save-steps", 0), ("max-steps", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("latest-steps", "validate-steps"):
        parser.add_argument(f"--{name}", type=int, default=0, help="of a run that counts steps: --epochs 0")
    parser.add_argument("--sleep-s", type=float, default=0.0)
    parser.add_argument("--validate-s", type=float, default=0.0, help="seconds that validation takes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plain", action="store_true", help="no BatchNorm and dropout")
    args = parser.parse_args(argv)
    with distributed.start(args.device) as world:
        log.setup(args.output, world.rank)

        def validate(epoch: int, step: int) -> dict[str, float]:
            (Path(args.output) / f"validating_{world.rank}").touch()
            time.sleep(args.validate_s)
            return {"val/one": 1.0, "val/far": float((7 * step) % 10)}

        path = checkpoint.resume_path(args.output, "", auto_resume=True) if world.is_main else None
        run(
            args.output,
            world,
            epochs=args.epochs,
            batch_size=args.batch_size,
            sleep_s=args.sleep_s,
            noisy=not args.plain,
            accumulation=args.accumulation,
            save_steps=args.save_steps,
            max_steps=args.max_steps,
            latest_steps=args.latest_steps,
            validate_steps=args.validate_steps,
            best_metric="val/far" if args.validate_steps else "",
            clip_grad=1.0,
            print_freq=2,
            validate=validate if args.validate_s or args.validate_steps else None,
            resume=distributed.broadcast_object(path),
        )
    return 0


if __name__ == "__main__":
    run_main(main)
