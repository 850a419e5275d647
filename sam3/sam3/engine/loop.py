"""The training loop of every stage.

A stage gives one module whose `forward(batch)` returns a dict of scalar losses with the key `total`, a loader of
batches and a schedule. Accumulation, mixed precision, clipping, bad gradients, logs, checkpoints, exact resume and
signals are done here.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from sam3.engine import amp, checkpoint, distributed, meters, optim, rng
from sam3.engine.batch import to_device
from sam3.engine.distributed import World
from sam3.engine.log import MetricLog
from sam3.engine.loop_settings import LoopSettings, TrainResult, divides
from sam3.engine.sampler import EpochSampler
from sam3.engine.signals import StoppedBySignal, StopSignals
from sam3.engine.stop_agreement import StopAgreement

log = logging.getLogger("sam3.train")

Validate = Callable[[int, int], Mapping[str, float]]


def train(
    model: nn.Module,
    loader: DataLoader,
    sampler: EpochSampler,
    optimizer: torch.optim.Optimizer,
    lr_at: optim.LrAt,
    settings: LoopSettings,
    *,
    world: World,
    output: str | Path | None = None,
    saved: nn.Module | None = None,
    config: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
    validate: Validate | None = None,
    metrics: MetricLog | None = None,
    resume: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train `model` until `settings.epochs` or `max_steps`; `LoopSettings` says when it validates and saves.

    model: on `world.device`; `forward(batch) -> {"total": scalar, ...}`, the others are logged. It is wrapped for
    several processes here. loader: its batch_sampler is `sampler`. lr_at: learning rate of optimizer step 0, 1, ...
    output: folder of the checkpoints; None saves nothing. saved: the part of the model that checkpoints hold (all).
    config, meta: plain dicts stored in them. validate(epoch, step): named results, the same on every process; called
    with the model in eval mode, without gradients. resume: contents of a checkpoint that
    `checkpoint.check_fits` has accepted.
    Raises StoppedBySignal after saving on SIGTERM, SIGUSR1 or Ctrl-C, and what `validate` raises, also after saving;
    ValueError for data too small for one step, weights that do not fit, or `max_bad_steps` non-finite steps in a row.
    """
    run = _Run(
        *(model, loader, sampler, optimizer, lr_at, settings, world),
        *(Path(output) if output is not None else None, saved or model, config, meta),
        *(validate, metrics or MetricLog(None)),
    )
    if output is not None and world.is_main:
        checkpoint.remove_leftovers(output)
    if resume is not None:
        run.restore(resume)
    with StopSignals() as signals:
        return run.run(signals)


@dataclass
class _Run:
    """One call of `train`: its arguments, and how far it is."""

    model: nn.Module
    loader: DataLoader
    sampler: EpochSampler
    optimizer: torch.optim.Optimizer
    lr_at: optim.LrAt
    settings: LoopSettings
    world: World
    output: Path | None
    saved: nn.Module
    config: Mapping[str, Any] | None
    meta: Mapping[str, Any] | None
    validate: Validate | None
    metrics: MetricLog

    def __post_init__(self) -> None:
        batches = self.sampler.batches_per_epoch()
        self.steps_per_epoch = self.settings.steps_in(batches)
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"{batches} batches per epoch and process are fewer than the {self.settings.accumulation} accumulated "
                "for one step; lower TRAIN.ACCUMULATION_STEPS or DATA.BATCH_SIZE"
            )
        self.ddp = distributed.wrap(self.model, self.world.device, self.settings.find_unused_parameters)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler = amp.make_scaler(self.world.device, self.settings.amp_dtype)
        self.meter, self.watch = meters.StepMeter(self.world.device), meters.Stopwatch()
        self.at = checkpoint.Position()
        self.result = TrainResult(self.at)

    # Epochs ---------------------------------------------------------------------------------------------------------

    def run(self, signals: StopSignals) -> TrainResult:
        self.signals, self.agreement = signals, StopAgreement(signals)
        if self._validation_owed():
            self._after_step()
        if self._done():
            log.info(f"nothing left to train: {self.at.epoch} epochs, {self.at.step} steps are done")
        while not self._done():
            self._train_epoch()
            self._end_epoch()
        self.result.step_s = self.watch.seconds_per_step
        return self.result

    def _done(self) -> bool:
        return self._max_steps_done() or 0 < self.settings.epochs <= self.at.epoch or self._stale()

    def _stale(self) -> bool:
        """Whether validations have not become better for as long as patience lasts."""
        return not self.at.samples and self.settings.is_stale(self.at.epoch, self.result.best.get("epoch"))

    def _train_epoch(self) -> None:
        """The steps left in the epoch, or until max_steps."""
        settings, at = self.settings, self.at
        self.sampler.set_position(at.epoch, at.samples)
        self._train_mode()
        # Workers draw their seeds when the loader starts; outside of the run's own random numbers, so that an epoch
        # entered in the middle goes on with the same numbers as one that was not interrupted.
        with rng.preserved(seed=self.sampler.seed + 7919 * at.epoch + self.world.rank):
            batches = iter(self.loader)
        self.watch.resume()
        first_step = self._done_steps()
        batches_left = len(self.sampler)
        for i in range(settings.steps_in(batches_left)):
            size = min(settings.accumulation, batches_left - i * settings.accumulation)
            self._step(batches, size, self.lr_at(first_step + i))
            last = i + 1 == settings.steps_in(batches_left) or self._max_steps_done()
            ends = self._max_steps_done() or (last and not settings.counts_steps)  # there, epochs may be a step long
            if at.step % settings.print_freq == 0 or ends:
                self._report(self.lr_at(first_step + i))
            if settings.counts_steps or not last:
                self._after_step()
            if signum := self.agreement.settle() if last else self.agreement.step():
                self._stop(signum, self._pack(epoch_complete=False))
            if last:
                break

    def _done_steps(self) -> int:
        """Steps so far, as the schedule counts them.

        In a run that counts epochs they are those that an uninterrupted run with today's batch and processes would
        have made up to here; `at.step` differs from that if these have changed on the way.
        """
        if self.settings.counts_steps:
            return self.at.step
        batches = -(-self.at.samples // self.sampler.global_batch)
        return self.at.epoch * self.steps_per_epoch + self.settings.steps_in(batches)

    def _end_epoch(self) -> None:
        """Validate, keep the best, save, and go on to the next; a run that counts steps goes on only."""
        settings, at = self.settings, self.at
        complete = settings.steps_in(len(self.sampler)) == 0
        if not settings.counts_steps:
            self._validate_and_save_epoch(complete)
        if complete:
            at.epoch, at.samples = at.epoch + 1, 0
            if self._stale():
                best = self.result.best
                log.info(f"no better {best['metric']} since epoch {best['epoch']} ({best['value']:.5g}); ending here")

    def _validate_and_save_epoch(self, complete: bool) -> None:
        settings, at = self.settings, self.at
        payload = self._pack(epoch_complete=complete)
        # If a signal or an error ends the validation, the file says that it is still to be done.
        final = at.epoch + 1 == settings.epochs or self._max_steps_done()
        due = settings.validates_after_epoch(at.epoch) or final
        improved = due and self._validate(payload and {**payload, "epoch_complete": False})
        if payload is not None:
            payload |= self._verdict()
            if improved:
                self._save(payload, checkpoint.BEST)
            if final or (at.epoch + 1) % settings.save_freq == 0:
                self._save(payload)

    def _after_step(self) -> None:
        """Validate and save where the number of the step says so.

        A run that counts steps saves the latest last: what is missing after a kill is then done by the resumed run.
        """
        settings, step = self.settings, self.at.step
        validates, keeps = settings.validates_after(step), divides(settings.save_steps, step)
        latest = settings.counts_steps and (validates or divides(settings.latest_steps, step))
        if not (validates or keeps or latest):
            return
        payload = self._pack(epoch_complete=False)
        if validates:
            if latest:
                self._save(payload)  # a validation may take long
            improved = self._validate(payload)
            payload = payload and {**payload, **self._verdict()}
            if improved:
                self._save(payload, checkpoint.BEST)
            self._train_mode()
        if keeps:
            self._save(payload, checkpoint.step_name(step) if settings.counts_steps else None)
        if latest:
            self._save(payload)
        self.watch.resume()

    def _validation_owed(self) -> bool:
        """Whether the resumed run was stopped before or in the validation after its last step."""
        if self.validate is None or not self.settings.counts_steps or not self.at.step:
            return False
        return self.settings.validates_after(self.at.step) and self.result.validated_step != self.at.step

    def _max_steps_done(self) -> bool:
        return 0 < self.settings.max_steps <= self.at.step

    def _train_mode(self) -> None:
        self.ddp.train()
        if self.settings.eval_bn:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    # One optimizer step ---------------------------------------------------------------------------------------------

    def _step(self, batches: Iterator[Any], size: int, lr: float) -> None:
        """`size` micro-batches forward and backward, then one update; nothing here waits for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        for i in range(size):
            start = time.perf_counter()
            batch = next(batches)
            self.watch.add_data(time.perf_counter() - start)
            batch = to_device(batch, self.world.device)
            # Processes average their gradients once, in the last backward pass.
            alone = self.world.size > 1 and i + 1 < size
            with self.ddp.no_sync() if alone else nullcontext():
                with amp.autocast(self.world.device, self.settings.amp_dtype):
                    losses = self.ddp(batch)
                self.scaler.scale(losses["total"] / size).backward()
            self.meter.add_losses(losses)
        self.scaler.unscale_(self.optimizer)
        norm = optim.clip_gradients(self.parameters, self.settings.clip_grad)
        amp.step_unless_bad(self.optimizer, self.scaler, self.meter.add_step(norm, self.at.step + 1))
        self.optimizer.zero_grad(set_to_none=True)
        self.sampler.advance(size)
        self.at.step, self.at.samples = self.at.step + 1, self.sampler.consumed
        self.watch.tick()

    # Reports --------------------------------------------------------------------------------------------------------

    def _report(self, lr: float) -> None:
        """One log line and one line of metrics, means over the steps since the last; the loop's only wait."""
        settings, at = self.settings, self.at
        losses, grad_norm, bad = self.meter.read()
        self.watch.tick(0)  # the wait belongs to the steps before it
        step_s, data_s = self.watch.window()
        if bad.longest >= settings.max_bad_steps:
            raise ValueError(
                f"gradients were not finite in {bad.longest} steps in a row, up to step {bad.longest_end}; "
                "lower the learning rate or turn AMP off, and go on from the last checkpoint"
            )
        own = {f"loss_{name}": value for name, value in losses.items()} | {"step_s": step_s, "data_s": data_s}
        means = distributed.mean_over_ranks(own)
        values = {f"train/{name}": value for name, value in means.items() if name.startswith("loss_")}
        rate = self.sampler.global_batch * settings.accumulation / max(means["step_s"], 1e-9)
        values |= {
            "train/lr": lr,
            "train/grad_norm": grad_norm,
            "train/skipped_steps": bad.total,
            "train/step_ms": 1000 * means["step_s"],
            "train/data_ms": 1000 * means["data_s"],
            f"train/{settings.unit}_per_s": rate,
            "train/max_mem_gib": meters.max_memory_gib(self.world.device),
            "train/epoch": at.epoch + at.samples / self.sampler.num_samples,
        }
        if self.scaler.is_enabled():
            values["train/amp_scale"] = self.scaler.get_scale()
        self.metrics.scalars(at.step, values)
        done, total = self._done_steps(), settings.max_steps or settings.epochs * self.steps_per_epoch
        remaining_s = (total - done) * self.watch.seconds_per_step
        epoch = f"epoch {at.epoch}" + ("" if settings.counts_steps else f"/{settings.epochs}")
        log.info(f"{epoch} {meters.step_line(done, total, values, settings.unit, remaining_s, settings.shown)}")

    # Validation -----------------------------------------------------------------------------------------------------

    def _validate(self, payload: Mapping[str, Any] | None) -> bool:
        """Run the callback, if there is one; whether its best_metric is the best so far.

        A signal or an error breaks it off, and `payload` is saved: the steps before it are not to be done again.
        """
        if self.validate is None:
            return False
        settings, at = self.settings, self.at
        self.ddp.eval()
        try:
            with self.signals.interrupting(), rng.preserved(), torch.no_grad():
                values = dict(self.validate(at.epoch, at.step))
            better = self.result.add_validation(values, settings.best_metric, settings.best_mode)
        except (StoppedBySignal, Exception) as error:
            # RuntimeError: another process left a collective because of the signal
            if self.signals.received and isinstance(error, (StoppedBySignal, RuntimeError)):
                self._stop(self.signals.received, payload, together=False)
            if path := self._save(payload):
                log.error(f"validation failed after step {at.step}; the same command goes on from {path}")
            raise
        self.metrics.scalars(at.step, values)
        place = f"step {at.step}" if settings.counts_steps else f"epoch {at.epoch}"
        log.info(f"{place} validation: " + ", ".join(f"{n} {v:.5g}" for n, v in values.items()))
        return better

    def _verdict(self) -> dict[str, Any]:
        """What a validation changes in a checkpoint."""
        return {"best": checkpoint.plain(self.result.best), "validated_step": self.result.validated_step}

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def _pack(self, epoch_complete: bool) -> dict[str, Any] | None:
        """Contents of a checkpoint in the main process, None in the others; all must call it together."""
        if self.settings.average_bn:
            distributed.average_batchnorm(self.model)
        if self.output is None:
            return None
        states = distributed.gather_objects(rng.get_state())
        if not self.world.is_main:
            return None
        return checkpoint.pack(
            self.saved.state_dict(),
            self.at,
            epoch_complete=epoch_complete,
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            rng=states,
            sampler=self.sampler.state_dict(),
            config=self.config,
            meta=self.meta,
            **self._verdict(),
        )

    def _save(self, payload: Mapping[str, Any] | None, name: str | None = None) -> Path | None:
        if payload is None:
            return None
        if name is None and self.settings.counts_steps:
            name = checkpoint.LATEST
        path = checkpoint.save(self.output, payload, name)
        checkpoint.prune(self.output, self.settings.keep_last)
        log.info(f"saved {path}")
        self.watch.resume()
        return path

    def _stop(self, signum: int, payload: Mapping[str, Any] | None, together: bool = True) -> NoReturn:
        """Save and raise. together: all processes are here, so the others wait for the file to be written."""
        path = self._save(payload)
        if together:
            distributed.barrier()
        where = f"saved {path}; the same command goes on from there" if path else "nothing was saved by this process"
        name = signal.Signals(signum).name
        message = f"stopped by {name} in epoch {self.at.epoch} after step {self.at.step}; {where}"
        log.debug(message)  # for the log files; run_main prints it
        raise StoppedBySignal(signum, message)

    def restore(self, payload: Mapping[str, Any]) -> None:
        """Take over weights, optimizer, scaler, position and random numbers."""
        try:
            self.saved.load_state_dict(payload["model"], strict=True)
        except RuntimeError as error:
            raise ValueError(f"the checkpoint's weights do not fit the model: {error}") from error
        optim.load_moments(self.optimizer, payload["optimizer"])
        if payload["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(payload["scaler"])
        self.result.position = self.at = checkpoint.position_of(payload)
        self.result.best = dict(payload.get("best", {}))
        self.result.validated_step = payload.get("validated_step", 0)
        if self.at.samples:
            self.sampler.load_state_dict(payload["sampler"])
        if payload["world_size"] == self.world.size:
            rng.set_state(payload["rng"][self.world.rank])
        else:
            log.info(
                f"the checkpoint is of {payload['world_size']} processes, this run has {self.world.size}; reseeding"
            )
            rng.reseed(self.sampler.seed + 7919 * self.at.step + self.world.rank)
        log.info(
            f"going on in epoch {self.at.epoch} after step {self.at.step}, {self.at.samples} samples into the epoch"
        )
