"""A training loop for small models: a loss, a budget of steps or processor time, and the average of the weights.

The learning rates rise, then fall by a cosine, along the share of the budget that is spent. Processor time is that of
this process, user and system together, so that runs on a busy machine compare; on a GPU it is the time that passes.
Reading the pictures is not charged. Several processes (a group of `torch.distributed`) train one model: their gradients
are averaged, their times added up.

Our choice throughout.
"""

import atexit
import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from coreseg.errors import TrainingError
from coreseg.train.muon import Muon
from coreseg.train.trainer import Clock

EMA_DECAY = 0.995
WEIGHT_DECAY = 0.02
WARMUP_SHARE = 0.05
SHOW_EVERY = 10
SAVE_EVERY = 100


@dataclass(frozen=True)
class Budget:
    """How long a training lasts: so many steps or minutes (see above), whichever ends first."""

    steps: int | float = math.inf
    minutes: int | float = math.inf

    def spent(self, step: int, minutes: float) -> float:
        """The share that is used up; training ends at 1."""
        return max(step / self.steps, minutes / self.minutes)


def join_group() -> int:
    """Join the other processes, where `torchrun` started several; this one's number, 0 where it is alone."""
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("gloo")
        atexit.register(distributed.destroy_process_group)  # else gloo's threads may abort a process that is done
    return _number()


def spend(
    budget: Budget,
    model: nn.Module,
    groups: list[dict[str, Any]],
    loss_of: Callable[[nn.Module, int], torch.Tensor],
    out: Path,
    *,
    description: str = "training",
    progress: bool = True,
) -> tuple[nn.Module, int]:
    """Spend the budget on `groups` of parameters, each with its peak "lr"; the averaged model and the steps it took.

    AdamW trains a group, or Muon one that is marked {"muon": True} and holds matrices alone, with AdamW's size of step.
    `loss_of` the model at a step should draw what it draws by the step's number (and by its process's, where there are
    several): then a budget of steps gives the same model whether or not it was stopped in between. Every 100 steps the
    state goes to `out/resume.pt` and the loss to `out/log.jsonl`; training goes on from there, its spent time counted.
    The model is left in training mode, or in what mode `loss_of` puts it. Raises TrainingError where the loss is no
    number any more.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    optimizers = _optimizers(groups, on_gpu)
    peaks = [group["lr"] for optimizer in optimizers.values() for group in optimizer.param_groups]
    averaged = AveragedModel(model, multi_avg_fn=_average)
    parts: dict[str, Any] = {"model": model, "average": averaged, **optimizers}
    step, clock, checkpoint = 0, Clock(on_gpu), out / "resume.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        step, clock.minutes = state["step"], state["cpu_minutes"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    model.train()
    first = _number() == 0
    minutes = _over_processes(device, clock.minutes, [])
    with tqdm(desc=description, initial=step, unit="step", leave=False, disable=not (progress and first)) as bar:
        while (share := budget.spent(step, minutes)) < 1:
            now = (group for optimizer in optimizers.values() for group in optimizer.param_groups)
            for group, peak in zip(now, peaks, strict=True):
                group["lr"] = peak * min(1.0, (share + 1e-3) / WARMUP_SHARE) * 0.5 * (1 + math.cos(math.pi * share))
            loss = loss_of(model, step)
            loss.backward()  # type: ignore[no-untyped-call]
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            minutes = _over_processes(device, clock.minutes, gradients)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
            averaged.update_parameters(model)
            step += 1
            bar.update()
            if step % SHOW_EVERY == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", minutes=f"{minutes:.1f}")
            if step % SAVE_EVERY == 0 or budget.spent(step, minutes) >= 1:
                _require_number(loss.item(), step, description)
                if not first:
                    continue
                states = {name: part.state_dict() for name, part in parts.items()}
                _save({"step": step, "cpu_minutes": clock.minutes, **states}, checkpoint)
                with (out / "log.jsonl").open("a") as log:
                    log.write(json.dumps({"step": step, "cpu_minutes": round(minutes, 2), "loss": loss.item()}) + "\n")
    return averaged.module.eval(), step


def _number() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _over_processes(device: torch.device, minutes: float, gradients: list[torch.Tensor]) -> float:
    """Average `gradients` over the processes, in place; the sum of their minutes."""
    if not distributed.is_initialized():
        return minutes
    everything = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor([minutes], device=device)])
    distributed.all_reduce(everything)
    sizes = [*(gradient.numel() for gradient in gradients), 1]
    *means, total = torch.split(everything, sizes)
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient) / distributed.get_world_size())
    return float(total)


def _optimizers(groups: list[dict[str, Any]], on_gpu: bool) -> dict[str, torch.optim.Optimizer]:
    plain, matrices = ([group for group in groups if group.get("muon", False) is muon] for muon in (False, True))
    made: dict[str, torch.optim.Optimizer] = {}
    if plain:
        made["optimizer"] = torch.optim.AdamW(plain, weight_decay=WEIGHT_DECAY, fused=on_gpu)
    if matrices:
        made["muon"] = Muon(matrices, weight_decay=WEIGHT_DECAY)
    return made


def _average(averaged: Any, current: Any, count: Any) -> None:
    """The moving average of the weights, over fewer steps in the beginning so that the untrained start is forgotten."""
    decay = min(EMA_DECAY, (1 + float(count)) / (10 + float(count)))
    get_ema_multi_avg_fn(decay)(averaged, current, count)  # type: ignore[no-untyped-call]


def _require_number(loss: float, step: int, description: str) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"{description}: the loss is {loss} at step {step}, so the model is spoilt; check these pictures with "
            "`coreseg data show`, or train with another --seed"
        )


def _save(state: dict[str, Any], path: Path) -> None:
    part, whole = path.with_suffix(".part"), io.BytesIO()
    torch.save(state, whole)  # itself it does not raise OSError on a full disk
    part.write_bytes(whole.getbuffer())
    os.replace(part, path)  # a run may be killed at any moment
