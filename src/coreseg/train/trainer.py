"""What both stages share: what trains, the run folder, and a `Trainer` that draws rows by set size and watches itself.

A run folder holds `settings.toml`, Trainer's `checkpoint-*/` to go on from, `best/` to use, `validation.jsonl`,
`overlays/` and logs for TensorBoard.
"""

import copy
import json
import math
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from coreseg import config as settings_files
from coreseg.config import StageConfig
from coreseg.errors import ConfigError, MissingExtraError, ModelError, TrainingError
from coreseg.imaging import overlay
from coreseg.metrics import detect_score, dice
from coreseg.model.assemble import freeze_all_but_heads
from coreseg.model.core_seg import CoreSeg
from coreseg.model.processor import Batch, CoreSegProcessor
from coreseg.nano.vision import NanoVisionModel
from coreseg.sam2 import FeatureMaps, encode_image
from coreseg.segmenter import Segmenter
from coreseg.train.collate import Draws, Examples

SETTINGS_FILE = "settings.toml"
CLOCK_FILE = "clock.json"
VALIDATION_FILE = "validation.jsonl"
SAMPLES_FOLDER, SAMPLES_FILE = "samples", "samples.jsonl"


def check(config: StageConfig) -> None:
    """Refuse before any model is loaded what can be refused then.

    Raises MissingExtraError where a library of the extra is not installed, ConfigError for settings that do not suit
    this machine or the run folder as it stands.
    """
    require_packages()
    arguments, out = training_arguments(config), Path(config.out)
    _check_same_settings(out, config)
    last = last_checkpoint(out)
    if last and (before := _clock(last)["processes"]) != arguments.world_size:
        raise ConfigError(
            f"{out} holds a run of {before} processes, here are {arguments.world_size}, among which its rows would be "
            f"dealt otherwise; go on with {before}, or give another `out`"
        )


def require_packages() -> None:
    """Raises MissingExtraError where a library of the extra is not installed."""
    missing = [name for name in ("accelerate", "monai", "peft", "tensorboard") if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"training needs {', '.join(missing)}; in a clone: pip install '.[train]'")


def prepare(model: CoreSeg, config: StageConfig) -> None:
    """Decide what trains: LoRA and the `<seg>` row (or the whole language model), the adapter, the mask decoder.

    A bias of words was measured on the weights as they were, and goes.
    """
    model.config.word_bias = {}
    freeze_all_but_heads(model)
    model.segmenter.mask_decoder.requires_grad_(config.train_decoder and config.mask_weight > 0)
    model.adapter.requires_grad_(config.trains_adapter)
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha)
    else:
        for name, parameter in model.reasoner.named_parameters():
            parameter.requires_grad_("vision" not in name and "visual" not in name)
    if config.gradient_checkpointing:
        model.reasoner.gradient_checkpointing_enable({"use_reentrant": False})


def add_lora(model: CoreSeg, rank: int, alpha: int) -> None:
    """Wrap the reasoner's language model in LoRA, with the `<seg>` row trainable in both matrices."""
    from peft import LoraConfig, get_peft_model

    text = (
        "language_model"
        if any("language_model" in name for name, _ in model.reasoner.named_modules())
        else "text_model"
    )
    inputs, outputs = model.reasoner.get_input_embeddings(), model.reasoner.get_output_embeddings()
    # Asked of the weights themselves: configurations keep the setting in different places, or nowhere.
    tied = inputs.weight is outputs.weight
    rows = [model.config.seg_token_id]
    embedding = next(name for name, module in model.reasoner.named_modules() if module is inputs)
    head = next(name for name, module in model.reasoner.named_modules() if module is outputs)
    model.reasoner = get_peft_model(
        model.reasoner,
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=rf".*{text}.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
            trainable_token_indices=rows if tied else {embedding: rows, head: rows},
        ),
    )
    if tied:
        # PEFT puts both matrices behind wrappers; without the new name a checkpoint of theirs cannot be saved.
        base = model.reasoner.get_base_model()
        base._tied_weights_keys = {**base._tied_weights_keys, f"{head}.token_adapter": f"{embedding}.token_adapter"}


class Kept:
    """What a frozen part of the model saw in each picture, computed once and kept in memory, in half precision."""

    def __init__(self) -> None:
        self._seen: dict[str, list[torch.Tensor]] = {}

    @torch.no_grad()
    def of(
        self,
        pictures: Sequence[str],
        pixels: Float[torch.Tensor, "batch 3 _ _"],
        look: Callable[[torch.Tensor], list[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """What `look` gives for the batch, as `pixels` are; each new picture is looked at once."""
        rows_of = {name: row for row, name in enumerate(pictures) if name not in self._seen}
        if rows_of:
            levels = [level.half().cpu() for level in look(pixels[list(rows_of.values())])]
            self._seen.update(zip(rows_of, map(list, zip(*levels, strict=True)), strict=True))
        rows = zip(*(self._seen[name] for name in pictures), strict=True)
        return [torch.stack(level).to(pixels) for level in rows]


class Clock:
    """A run's time in minutes, over all parts of a resumed run: processor time of this process and its threads, or, on
    a GPU, the time that passes."""

    def __init__(self, on_gpu: bool = False) -> None:
        self._now = time.perf_counter if on_gpu else time.process_time
        self._before_s = -self._now()

    @property
    def minutes(self) -> float:
        """Spent so far."""
        return (self._before_s + self._now()) / 60

    @minutes.setter
    def minutes(self, spent: float) -> None:
        self._before_s = 60 * spent - self._now()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What is done inside does not count."""
        spent = self.minutes
        yield
        self.minutes = spent


class StageTrainer(Trainer):
    """`Trainer` with two learning rates, rows drawn by set size, kept pictures, and validation by written answers."""

    def __init__(
        self, *, settings: StageConfig, processor: CoreSegProcessor, validation: Examples | None = None, **kwargs: Any
    ) -> None:
        super().__init__(args=training_arguments(settings), **kwargs)
        self.settings = settings
        self.processor = processor
        # The loss is a mean over its own rows, so that Trainer has to divide by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.kept_looks, self.kept_maps = Kept(), Kept()
        self.clock = Clock(on_gpu=self.args.device.type == "cuda")
        self._noted: dict[str, list[float]] = defaultdict(list)
        self.add_callback(Watch(self, validation))

    def to_the_end(self) -> Path:
        """Train from the run's last checkpoint, or from the start, and return the run folder, which holds `best/`."""
        out = Path(self.settings.out)
        last = last_checkpoint(out)
        if last and self.settings.cpu_minutes and _clock(last)["minutes"] >= self.settings.cpu_minutes:
            self._load_from_checkpoint(str(last))
        else:
            self.train(resume_from_checkpoint=str(last) if last else None)
        if not (out / "best").exists() and self.is_world_process_zero():  # nothing was validated
            # Under its name when it is whole: a run may be killed at any moment.
            part = out / "best.part"
            save_checkpoint(self.accelerator.unwrap_model(self.model), self.processor, part)
            part.rename(out / "best")
        self.accelerator.end_training()  # leaves the group: else its threads may abort a process that is done
        return out

    def note(self, **figures: float | torch.Tensor) -> None:
        """Remember figures of this step; their means since the last time are logged beside Trainer's own."""
        for name, value in figures.items():
            self._noted[name].append(value.item() if isinstance(value, torch.Tensor) else value)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's figures and the noted ones, the latter as means over steps and processes."""
        if "loss" in logs:
            from accelerate.utils import gather_object

            everywhere = cast(list[dict[str, list[float]]], gather_object([dict(self._noted)]))
            for name in sorted({name for noted in everywhere for name in noted}):
                logs[name] = float(np.mean([value for noted in everywhere for value in noted.get(name, ())]))
            logs["cpu_minutes"], logs["memory_gb"] = self.clock.minutes, self._peak_gb()
            self._noted.clear()
        super().log(logs, *args, **kwargs)

    def _peak_gb(self) -> float:
        """The most memory held so far: the GPU's, or without one this process's."""
        if self.args.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.args.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux

    def looked(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], pictures: Sequence[str | None]
    ) -> dict[str, torch.Tensor]:
        """The reasoner's inputs, pixels replaced by what nano's tower sees in them, kept by picture."""
        tower = next((part for part in model.modules() if isinstance(part, NanoVisionModel)), None)
        if tower is None or None in pictures:
            return inputs
        names, look = cast(Sequence[str], pictures), tower.look
        (tokens,) = self.kept_looks.of(names, inputs["pixel_values"], lambda pixels: [look(pixels)])
        return inputs | {"pixel_values": tokens}

    def encoded(self, model: nn.Module, batch: Batch, pictures: Sequence[str | None]) -> FeatureMaps | None:
        """The frozen image encoder's maps, kept by picture; None where the settings do not keep them."""
        if not self.settings.keep_maps or None in pictures:
            return None
        segmenter = next(part for part in model.modules() if isinstance(part, CoreSeg)).segmenter
        names = cast(Sequence[str], pictures)
        return self.kept_maps.of(names, batch.segmenter_pixels, lambda pixels: encode_image(segmenter, pixels))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW: one learning rate for the language model, one for adapter and mask decoder."""
        if self.optimizer is None:
            assert self.model is not None
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            reasoner = [p for n, p in named if n.startswith("reasoner.")]
            heads = [p for n, p in named if not n.startswith("reasoner.")]
            groups = [
                {"params": reasoner, "lr": self.settings.learning_rate},
                {"params": heads, "lr": self.settings.head_learning_rate},
            ]
            self.optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]],
                betas=(0.9, 0.95),
                weight_decay=self.settings.weight_decay,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warm-up and a cosine, over the steps or over the processor time, whichever ends the run."""
        if self.lr_scheduler is None and self.settings.cpu_minutes:

            def rate(step: int) -> float:
                done = max(step / self.settings.steps, self.clock.minutes / self.settings.cpu_minutes)
                rising = min(1.0, (step + 1) / max(self.settings.warmup_steps, 1))
                return rising * (1 + math.cos(math.pi * min(1.0, done))) / 2

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(cast(Any, optimizer or self.optimizer), rate)
        return super().create_scheduler(num_training_steps, optimizer)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A checkpoint's weights under the modules' own names: Trainer reads them back by those."""
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(
            output_dir or self.args.output_dir,
            state_dict=state_dict,
            is_main_process=self.args.should_save,
            save_original_format=False,
        )

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """The norm of the gradients. Raises TrainingError where it is no number: one step would spoil every weight."""
        norm = super()._get_grad_norm(*args, **kwargs)  # type: ignore[no-untyped-call]
        # In fp16 the gradient scaler passes over such steps by itself.
        if norm is not None and not math.isfinite(norm) and self.settings.precision != "fp16":
            raise TrainingError(
                f"step {self.state.global_step + 1}: the gradient's norm is {float(norm)}; start in another `out` with "
                f"a lower learning_rate; the last checkpoint in {self.settings.out} is still good"
            )
        return norm

    def _save_rng_state(self, output_dir: str) -> None:
        """What a resumed run needs to know beyond weights and optimiser, in files that Trainer does not know of."""
        super()._save_rng_state(output_dir)
        if self.is_world_process_zero():
            clock = {"minutes": self.clock.minutes, "processes": int(self.args.world_size)}
            (Path(output_dir) / CLOCK_FILE).write_text(json.dumps(clock))
        # Trainer's state, written next, says that the checkpoint is whole: then every process's part has to be there.
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint:
            self.clock.minutes = _clock(Path(checkpoint))["minutes"]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that left weights as they were; Trainer would only warn, and train on from there."""
        assert self.model is not None
        state, missing = self.model.state_dict(), set(load_result.missing_keys)
        loaded = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
        # A tied weight is read under its other name.
        lost = sorted(name for name in missing if state[name].data_ptr() not in loaded)
        if lost or load_result.unexpected_keys:
            example = [*lost, *load_result.unexpected_keys][0]
            raise ModelError(
                f"the last checkpoint in {self.settings.out} does not fit the model ({example}, for one); "
                "delete that checkpoint to go on from the one before, or start again in another folder"
            )

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[tuple[int, int]]:
        """The whole run's draws, those of every process together."""
        examples = cast(Examples, self.train_dataset)
        return Draws(examples.weights, self.rows_a_step * self.settings.steps, self.settings.seed)

    @property
    def rows_a_step(self) -> int:
        """Drawn rows in one optimiser step, over all processes."""
        return self.settings.rows * self.settings.accumulation * int(self.args.world_size)


def training_arguments(config: StageConfig) -> TrainingArguments:
    """The run's settings in Trainer's words. Raises ConfigError where they do not suit the machine."""
    has_gpu = torch.accelerator.is_available() and not config.use_cpu
    if config.precision == "fp16" and not has_gpu:
        raise ConfigError("setting precision is 'fp16', which needs a GPU, and none is seen; use bf16 or fp32")
    arguments = TrainingArguments(
        output_dir=config.out,
        max_steps=config.steps,
        per_device_train_batch_size=config.rows,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=10,
        report_to=["tensorboard"],
        use_cpu=not has_gpu,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        dataloader_num_workers=config.workers,
        remove_unused_columns=False,
        seed=config.seed,
        disable_tqdm=config.cpu_minutes > 0,  # its bar would promise hours, up to steps that are never reached
        ddp_find_unused_parameters=True,
    )
    if config.cpu_minutes and arguments.world_size > 1:
        raise ConfigError(
            f"cpu_minutes is {config.cpu_minutes} with {arguments.world_size} processes, whose clocks differ; use steps"
        )
    if arguments.n_gpu > 1:
        raise ConfigError(
            f"one process sees {arguments.n_gpu} GPUs; give each its own: torchrun --nproc-per-node {arguments.n_gpu} "
            "--no-python coreseg train …, or show it one with CUDA_VISIBLE_DEVICES=0"
        )
    return arguments


class Watch(TrainerCallback):
    """Validates by writing answers, keeps the best state in `best/`, draws samples; ends a run whose time is up."""

    def __init__(self, trainer: StageTrainer, validation: Examples | None) -> None:
        self.trainer = trainer
        self.config, self.clock = trainer.settings, trainer.clock
        self.examples = validation.fixed(self.config.eval_samples, self.config.seed) if validation else []
        best = Path(self.config.out) / "best" / "figures.json"
        self.best = json.loads(best.read_text())["score"] if best.exists() else -1.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What a resumed run had written after its checkpoint it will write again."""
        if state.is_world_process_zero:
            out, step = Path(self.config.out), state.global_step
            _keep_before(step + 1, out / VALIDATION_FILE)
            # Samples are named by the step that they are drawn for.
            _keep_before(step, out / SAMPLES_FOLDER / SAMPLES_FILE)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Validates at its turn and at the end."""
        if self.config.cpu_minutes and self.clock.minutes >= self.config.cpu_minutes:
            control.should_training_stop = control.should_save = True
        ends = control.should_training_stop or state.global_step == args.max_steps
        at_its_turn = ends or state.global_step % self.config.eval_every == 0
        if self.examples and at_its_turn:
            control.should_log = True
            if state.is_world_process_zero:
                with self.clock.stopped():
                    self._validate(kwargs["model"], state.global_step)

    def _validate(self, model: CoreSeg, step: int) -> None:
        was_training, minutes = model.training, round(self.clock.minutes, 2)
        figures, panels = self._look(model.eval())  # type: ignore[no-untyped-call]
        model.train(was_training)
        folder = Path(self.config.out)
        with (folder / VALIDATION_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "cpu_minutes": minutes, **figures}) + "\n")
        self.trainer.note(**{f"eval_{name}": value for name, value in figures.items()})
        print(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
        (folder / "overlays").mkdir(exist_ok=True)
        sheet(panels).save(folder / "overlays" / f"step-{step:06d}.png")
        if figures.get("score", -1.0) > self.best:
            self.best = figures["score"]
            save_checkpoint(model, self.trainer.processor, folder / "best")
            (folder / "best" / "figures.json").write_text(json.dumps({"step": step, **figures}))

    def _look(self, model: CoreSeg) -> tuple[dict[str, float], list[Any]]:
        segmenter = Segmenter(model, self.trainer.processor)
        results = []
        for start in range(0, len(self.examples), 16):
            part = self.examples[start : start + 16]
            results += segmenter.segment_batch([e.image for e in part], [e.question for e in part], constrained=False)
        pairs = list(zip(results, self.examples, strict=True))
        there = [(result, example) for result, example in pairs if example.answer.found]
        figures = {"valid": _mean([float(result.valid) for result in results])}
        if there:  # without any lesion nothing tells one state from another
            figures["dice"] = _mean([dice(result.mask, example.mask) for result, example in there])
            figures["detect"] = _mean([detect_score(result.boxes, example.answer.boxes) for result, example in there])
            # Masks and boxes, as far as this run learns them.
            learnt = ["dice", "detect"] if self.config.mask_weight > 0 else ["detect"]
            figures["score"] = _mean([figures[name] for name in learnt])
        return figures, [overlay(e.image, r.mask, r.boxes, reference=e.mask) for r, e in pairs[:12]]


def _keep_before(step: int, file: Path) -> None:
    """Drop later lines of JSON, and a last one that was cut short."""
    if file.exists():
        lines = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        file.write_text("".join(line for line in lines if json.loads(line)["step"] < step), encoding="utf-8")


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def sheet(panels: Sequence[Image.Image], side: int = 224) -> Image.Image:
    """Pictures in rows of four, each within a square of `side` pixels."""
    whole = Image.new("RGB", (4 * side, -(-len(panels) // 4) * side))
    for number, panel in enumerate(panels):
        small = panel.copy()
        small.thumbnail((side, side))
        whole.paste(small, ((number % 4) * side, (number // 4) * side))
    return whole


def save_checkpoint(model: CoreSeg, processor: CoreSegProcessor, path: Path) -> None:
    """One folder with the whole model, LoRA merged in, that `Segmenter.from_pretrained` opens."""
    whole = model
    if hasattr(model.reasoner, "merge_and_unload"):
        whole = copy.deepcopy(model)
        whole.reasoner = whole.reasoner.merge_and_unload()
    whole.save_pretrained(path)
    processor.save_pretrained(path)


def claim(config: StageConfig) -> Path:
    """The run folder, holding these settings. Raises ConfigError where it holds others."""
    out = Path(config.out)
    _check_same_settings(out, config)
    out.mkdir(parents=True, exist_ok=True)
    settings_files.save(config, out / SETTINGS_FILE)
    return out


def _check_same_settings(out: Path, config: StageConfig) -> None:
    file = out / SETTINGS_FILE
    if file.exists() and (old := _settings_of(file, type(config))) != config:
        changed = settings_files.changed(old, config)
        what = ", ".join(f"{name} was {getattr(old, name)!r}, is {getattr(config, name)!r}" for name in changed)
        raise ConfigError(
            f"{out} holds a run with other settings ({what}); give another `out` (to train further, with that run as "
            "`model`), or delete that folder"
        )


def _settings_of(file: Path, kind: type[StageConfig]) -> StageConfig:
    try:
        return settings_files.load(kind, file)
    except ConfigError as error:
        raise ConfigError(f"{file.parent} holds a run of another stage or version; give another `out`") from error


def last_checkpoint(out: Path) -> Path | None:
    """The newest of a run's checkpoints that was written to its end."""
    # Trainer writes its state last.
    written = [file.parent for file in out.glob("checkpoint-*/trainer_state.json")]
    return max(written, key=lambda path: int(path.name.split("-")[1])) if written else None


def spent(out: Path) -> tuple[int, float]:
    """Steps and processor minutes of a run up to its last checkpoint; a run that was killed has spent more."""
    last = last_checkpoint(out)
    return (int(last.name.split("-")[1]), float(_clock(last)["minutes"])) if last else (0, 0.0)


def _clock(checkpoint: Path) -> dict[str, Any]:
    """The processor minutes that a run had spent when it wrote this checkpoint, and its number of processes."""
    clock: dict[str, Any] = json.loads((checkpoint / CLOCK_FILE).read_text())
    return clock
