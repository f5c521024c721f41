"""THE loop, the same for every model: it calls the contract of model_parts.base, nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from config import Config
from data_utils import Sequences, bucketed_order, prefetch, train_batch, train_examples
from model_parts.base import Batch, Recommender
from util import (
    StopRequest,
    Stopwatch,
    UserError,
    atomic_path,
    autocast_type,
    from_first,
    load_checkpoint,
    random_state,
    rank,
    restore_random_state,
    save_checkpoint,
    seed_everything,
    stream_seed,
    sum_over_processes,
    torch_generator,
    world_size,
)

logger = getLogger("pmat")

BEST, LATEST, EPOCHS = "best.pt", "checkpoint.pt", "epochs.jsonl"
MAX_BAD_STEPS = 5


class Stopped(Exception):
    """Training ended early on request, after a checkpoint was written."""


@dataclass
class Progress:
    """Where training stands: all that a checkpoint needs besides tensors."""

    epoch: int = 0
    step: int = 0  # steps done in this epoch
    global_step: int = 0
    best: float = -1.0
    best_epoch: int = -1
    evaluations_without_gain: int = 0
    bad_steps: int = 0  # consecutive steps with a loss that was not finite
    lr_scale: float = 1.0  # halved after each of them, restored with the next epoch
    seconds: float = 0.0
    prepare_seconds: float = 0.0
    machines: list[str] = field(default_factory=list)  # where it ran, in turn
    resumed: bool = False
    sums: dict[str, float] = field(default_factory=dict)  # loss parts times targets, this epoch
    targets: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)  # one per finished epoch


class Trainer:
    """Trains one model on one data set into one run folder.

    `validate` returns the metrics of the current weights on valid, `ndcg@10` among them; it is the
    only way held-out data reach this class, and only to choose the epoch to keep. `on_epoch` gets
    the rows of all finished epochs after each one; it may raise to end the training.
    """

    def __init__(
        self,
        model: Recommender,
        train: Sequences,
        config: Config,
        folder: Path,
        device: torch.device,
        validate: Callable[[], dict[str, float]],
        fingerprint: str,
        on_epoch: Callable[[list[dict[str, Any]]], None] | None = None,
    ) -> None:
        self.model, self.train, self.config = model, train, config
        self.folder, self.device, self.validate = folder, device, validate
        self.on_epoch = on_epoch
        self.identity = {"config": comparable(config), "data": fingerprint}
        self.progress = Progress()
        self.examples = train_examples(train, model.examples, config.data.max_history)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.steps_per_epoch = math.ceil(len(self.examples.users) / config.train.batch_size)
        self.autocast = autocast_type(config.train.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.autocast == torch.float16)
        self.board = _tensorboard(folder) if config.train.tensorboard and rank() == 0 else None
        if self.parameters:
            self.optimiser = torch.optim.AdamW(
                model.parameter_groups(), lr=config.train.lr,
                weight_decay=config.train.weight_decay, fused=True,
            )  # fmt: skip
        self.loss = torch.compile(model.loss) if config.train.compile else model.loss

    # ----------------------------------------------------------------- the loop

    def fit(self) -> None:
        """Train until the epochs or the patience run out, then load the best weights.

        Raises Stopped after SIGINT or SIGTERM (a checkpoint is on disk), UserError when the loss
        stays infinite or NaN.
        """
        if not self.parameters or self.config.train.epochs == 0:
            self._keep_weights()  # nothing to learn (popularity)
            return
        if not self.steps_per_epoch:
            raise UserError(
                f"{self.model.name} has nothing to learn from: no user has two train interactions."
            )
        with StopRequest() as stop:
            for epoch in range(self.progress.epoch, self.config.train.epochs):
                if self._out_of_patience():
                    break
                self._run_epoch(epoch, stop)
            if self._anybody(stop.requested):  # during the last evaluation
                raise Stopped
        # The others wait here until the first process has written the last weights.
        if from_first((self.folder / BEST).exists()):
            self.model.load_state_dict(load_checkpoint(self.folder / BEST, self.device)["model"])

    def _run_epoch(self, epoch: int, stop: StopRequest) -> None:
        progress, seed = self.progress, self.config.run.seed
        rng = np.random.default_rng(stream_seed(seed, "order", epoch))
        lengths = self.examples.lengths if self.model.bucketed else self.examples.lengths * 0
        order = bucketed_order(lengths, self.config.train.batch_size, rng)
        self.model.begin_epoch(epoch, torch_generator(seed, "epoch", epoch))
        if world_size() > 1:  # codebooks and graphs made anew may differ by rounding
            self.model.load_state_dict(from_first(self.model.state_dict()))
        self.model.train()
        watch, saved = Stopwatch(), time.monotonic()
        batches = prefetch(self._batches(order[progress.step :]), self.config.train.num_workers)
        bar = tqdm(
            batches, f"epoch {epoch + 1}", len(order), initial=progress.step,
            disable=None if rank() == 0 else True, leave=False, mininterval=0.5,
        )  # fmt: skip
        for batch, counts in bar:
            self._step(batch, counts)
            progress.step += 1
            progress.global_step += 1
            if progress.global_step % 10 == 0:
                bar.set_postfix(_rounded(self._mean_parts()))
            overdue = time.monotonic() - saved > 60 * self.config.train.checkpoint_minutes
            stopping = self._anybody(stop.requested)
            if stopping or overdue:
                progress.seconds += watch.lap()
                self.save()
                saved = time.monotonic()
            if stopping:
                raise Stopped
        progress.seconds += watch.lap()
        self._end_epoch(epoch, watch)

    def _anybody(self, wish: bool) -> bool:
        """Whether any process was asked to stop: all leave the loop at the same step."""
        if world_size() == 1:
            return wish
        return bool(sum_over_processes(torch.tensor(float(wish), device=self.device)) > 0)

    def _batches(self, order: list[np.ndarray]) -> Iterator[tuple[Batch, bool]]:
        """This process's share of every batch, and whether it counts."""
        for index in order:
            mine = index[rank() :: world_size()]
            counts = len(mine) > 0  # a last batch can be smaller than the number of processes
            numpy_batch = train_batch(self.train, self.examples, mine if counts else index[:1])
            yield Batch(*map(torch.from_numpy, numpy_batch)).to(self.device), counts

    # ----------------------------------------------------------------- one step

    def _step(self, batch: Batch, counts: bool) -> None:
        """One update. With several processes the gradient is that of the whole batch: the mean of
        each process is weighted by its share of the targets."""
        progress = self.progress
        for group in self.optimiser.param_groups:
            group["lr"] = self._learning_rate() * progress.lr_scale * group["rate"]
        self.optimiser.zero_grad(set_to_none=True)
        own = (batch.targets > 0).sum().float() * counts
        everyone = sum_over_processes(own.clone())
        share = own / everyone.clamp(min=1)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            parts = self.loss(batch)
        values = torch.stack([part.float() for part in parts.values()]) * share
        self.scaler.scale(values.sum()).backward()
        means = sum_over_processes(values.detach())
        self._sum_gradients()
        self.scaler.unscale_(self.optimiser)
        # also without clipping: a gradient that is not finite would spoil all weights at once
        limit = self.config.train.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        # one read from the device, which waits for all that is queued there
        *losses, targets, length = torch.cat([means, torch.stack([everyone, norm])]).tolist()
        # half precision may overflow in the gradient: its scaler skips the step by itself; once it
        # no longer makes gradients larger, that is not the reason
        scaled = self.scaler.is_enabled() and (
            math.isfinite(length) or self.scaler.get_scale() >= 1
        )
        checked = losses if scaled else [*losses, length]
        if not all(map(math.isfinite, checked)):
            self.scaler.update()
            self._skip(batch)
            return
        self.scaler.step(self.optimiser)
        self.scaler.update()
        progress.bad_steps = 0
        progress.targets += targets
        for name, mean in zip(parts, losses, strict=True):
            progress.sums[name] = progress.sums.get(name, 0.0) + mean * targets

    def _sum_gradients(self) -> None:
        if world_size() == 1:
            return
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in self.parameters])
        sum_over_processes(flat)
        for parameter, part in zip(
            self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True
        ):
            parameter.grad.copy_(part.view_as(parameter))

    def _skip(self, batch: Batch) -> None:
        """A loss that is not finite: leave the weights alone, halve the rate, then give up."""
        progress = self.progress
        progress.bad_steps += 1
        progress.lr_scale *= 0.5
        where = f"epoch {progress.epoch + 1}, step {progress.step + 1}"
        logger.warning(
            "%s: the loss or its gradient is not finite; step skipped, learning rate halved.",
            where,
        )
        if progress.bad_steps >= MAX_BAD_STEPS:
            save_checkpoint(self.folder / "bad_batch.pt", batch._asdict())
            raise UserError(
                f"The loss was not finite {MAX_BAD_STEPS} times in a row ({where}); the batch is "
                f"in {self.folder / 'bad_batch.pt'}. Lower --lr or raise the temperature."
            )

    def _learning_rate(self) -> float:
        """Linear warm-up, then constant, cosine or linear decay to zero at the last step."""
        train, step = self.config.train, self.progress.global_step
        steps = self.steps_per_epoch * train.epochs
        warm = min(train.warmup_steps, steps // 4)  # on small data a preset's would take them all
        if step < warm:
            return train.lr * (step + 1) / warm
        done = min((step - warm) / max(steps - warm, 1), 1.0)
        shapes = {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        }
        return train.lr * shapes[train.schedule]

    # ----------------------------------------------------------------- end of an epoch

    def _end_epoch(self, epoch: int, watch: Stopwatch) -> None:
        progress, train = self.progress, self.config.train
        parts = self._mean_parts()
        row: dict[str, Any] = {"epoch": epoch + 1, "loss": sum(parts.values()), "parts": parts}
        if (epoch + 1) % train.eval_every == 0 or epoch + 1 == train.epochs:
            watch.lap()
            row["valid"] = self.validate()
            row["eval_seconds"] = watch.seconds
            self._keep_if_best(epoch, row["valid"]["ndcg@10"])
        row["train_seconds"] = progress.seconds - sum(r["train_seconds"] for r in progress.rows)
        progress.rows.append(row)
        progress.epoch, progress.step, progress.lr_scale = epoch + 1, 0, 1.0
        progress.sums, progress.targets = {}, 0.0
        self._report(row)
        self.save()
        if self.on_epoch:
            self.on_epoch(progress.rows)

    def _keep_if_best(self, epoch: int, value: float) -> None:
        progress = self.progress
        if value > progress.best:
            progress.best, progress.best_epoch = value, epoch + 1
            progress.evaluations_without_gain = 0
            self._keep_weights()
        else:
            progress.evaluations_without_gain += 1

    def _keep_weights(self) -> None:
        if rank() == 0:
            save_checkpoint(self.folder / BEST, {"model": self.model.state_dict()})

    def _out_of_patience(self) -> bool:
        patience = self.config.train.patience
        return 0 < patience <= self.progress.evaluations_without_gain

    def _mean_parts(self) -> dict[str, float]:
        return {k: v / max(self.progress.targets, 1) for k, v in self.progress.sums.items()}

    def _report(self, row: dict[str, Any]) -> None:
        parts = "  ".join(f"{name} {value:.4f}" for name, value in row["parts"].items())
        valid = row.get("valid", {})
        shown = "  ".join(f"{k} {valid[k]:.4f}" for k in ("recall@10", "ndcg@10") if k in valid)
        best = " *" if self.progress.best_epoch == row["epoch"] else ""
        logger.info(
            "epoch %d  loss %.4f (%s)  valid %s%s  %.1f s",
            row["epoch"], row["loss"], parts, shown or "-", best, row["train_seconds"],
        )  # fmt: skip
        if self.board:
            for name, value in {**row["parts"], **valid}.items():
                self.board.add_scalar(name, value, row["epoch"])

    # ----------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Everything needed to go on as if nothing had happened, written atomically."""
        if rank():
            return
        with atomic_path(self.folder / EPOCHS) as path:
            path.write_text("".join(f"{json.dumps(row)}\n" for row in self.progress.rows))
        save_checkpoint(
            self.folder / LATEST,
            {
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "scaler": self.scaler.state_dict(),
                "random": random_state(),
                "progress": dataclasses.asdict(self.progress),
                "identity": self.identity,
            },
        )

    def resume(self) -> bool:
        """Load the latest checkpoint of the folder; False when there is none yet.

        Raises UserError when it was made with other settings or other data.
        """
        path = self.folder / LATEST
        if not path.exists():
            return False
        state = load_checkpoint(path, self.device)
        made = state["identity"]
        if made["data"] != self.identity["data"]:
            raise UserError(f"{path} was trained on other data; start a new run without --resume.")
        refuse_other(path, made["config"], self.identity["config"])
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.progress.resumed = True
        if world_size() == 1:
            restore_random_state({k: v.cpu() for k, v in state["random"].items()})
        else:  # only the first one's state is stored, and dropout must differ between processes
            step = self.progress.global_step
            seed_everything(stream_seed(self.config.run.seed, "resume", rank(), step))
        return True


def comparable(config: Config) -> dict[str, Any]:
    """The settings that must agree between a checkpoint and the run that resumes it."""
    content = dataclasses.asdict(config)
    for section in ("hyper", "full"):
        content.pop(section)
    for key in ("save_dir", "log_dir", "device", "mode", "seeds", "label", "source"):
        content["run"].pop(key)
    for key in ("data_dir", "cache"):
        content["data"].pop(key)
    for key in ("num_workers", "checkpoint_minutes", "tensorboard", "compile"):
        content["train"].pop(key)
    return content


def refuse_other(path: Path, made: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise UserError with the first of the `comparable` settings that is not as it was."""
    for section, leaves in asked.items():
        for leaf, value in leaves.items():
            before = made.get(section, {}).get(leaf)
            if before != value:
                raise UserError(
                    f"{path} was made with {section}.{leaf}={before}, not {value}; resume with the "
                    "same settings or start a new run without --resume."
                )


def _rounded(parts: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.4f}" for name, value in parts.items()}


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("train.tensorboard needs the package: pip install tensorboard.") from None
    return SummaryWriter(str(folder / "tensorboard"))
