"""The teacher: reasoning written by a large multimodal model, checked, and written again until it may stay.

Source: description first, then a chain of thought from it, then a judge, are the paper's second and third stage. Our
choice: what is wrong with a text goes back to the teacher, only the part that failed is written again, and the pixels
have a say before the judge.
"""

import asyncio
from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import replace

import numpy as np
from jaxtyping import UInt8

from coreseg.data.build.endpoint import Endpoint, NoReplyError
from coreseg.data.build.ledger import Ledger
from coreseg.data.build.prompts import description_prompt, picture_for_teacher, thought_prompt
from coreseg.data.build.quality import Facts, clean, judged, pixel_faults, text_faults
from coreseg.data.build.replies import Description, Thought, ask_for
from coreseg.data.build.settings import TeacherConfig
from coreseg.data.build.stage import PASSES_AT, Fault, Outcome, Scores, stream
from coreseg.data.store import LesionSet
from coreseg.errors import ConfigError, DataError, InputError
from coreseg.types import Sample


def describe_rows(
    pictures: LesionSet, samples: Iterable[Sample], config: TeacherConfig, ledger: Ledger
) -> Generator[Outcome]:
    """The stage that has a teacher write each row's reasoning, and the judge of `config`, where it names one, score it.

    `pictures` is the set that the rows' files lie in; its own rows are not read. In order; the rows' questions stay.
    The same rows give the same outcomes whenever the ledger has the replies, traffic aside. Raises ConfigError without
    a teacher, TeacherError where teacher or judge answer no more or the budget is used up.
    """
    if config.teacher is None:
        raise ConfigError("no teacher is set; expected a table [teacher] with base_url and model")
    teacher = Endpoint(config.teacher, ledger)
    judge = Endpoint(config.judge, ledger) if config.judge else None
    in_flight = config.teacher.in_flight
    # Some rows look at their pictures while the others' requests are out.
    limit = asyncio.Semaphore(2 * in_flight)

    async def describe(sample: Sample) -> Outcome:
        async with limit:
            try:
                picture, facts = await asyncio.to_thread(_look, pictures, sample, config.image_px)
            except (DataError, InputError) as error:
                return Outcome(sample, (Fault("picture", str(error)),))
            return await _Author(sample, picture, facts, teacher, judge, config.attempts).outcome()

    yield from stream(describe, samples, 16 * in_flight, [each.close for each in (teacher, judge) if each])


def _look(pictures: LesionSet, sample: Sample, image_px: int) -> tuple[UInt8[np.ndarray, "rows columns 3"], Facts]:
    """What a row's files are needed for; they themselves are not kept."""
    image, mask = pictures.image(sample), pictures.mask(sample)
    return picture_for_teacher(image, mask, image_px), Facts.of(image, mask)


class _Author:
    """Writes the reasoning of one row, up to `attempts` times."""

    def __init__(
        self,
        sample: Sample,
        picture: UInt8[np.ndarray, "rows columns 3"],
        facts: Facts,
        teacher: Endpoint,
        judge: Endpoint | None,
        attempts: int,
    ) -> None:
        # The text that the row came with is not this author's.
        self._sample, self._picture, self._facts = replace(sample, reasoning=""), picture, facts
        self._teacher, self._judge, self._attempts = teacher, judge, attempts
        self._description: Description | None = None
        self._scores: Scores | None = None
        self._met: Counter[str] = Counter()
        self._traffic: Counter[str] = Counter()
        # What the last attempt wrote and why it was turned down.
        self._earlier, self._faults = "", list[Fault]()

    async def outcome(self) -> Outcome:
        """The row with a text that passed, or with the reasons why none did."""
        attempt = 0
        while attempt == 0 or (self._faults and attempt < self._attempts):
            attempt += 1
            try:
                self._faults = await self._attempt(attempt)
            except NoReplyError as error:
                self._faults = [Fault("no reply", str(error))]
                break
            self._met.update({fault.kind for fault in self._faults})
        return Outcome(self._sample, tuple(self._faults), self._scores, attempt, self._met, self._traffic)

    async def _attempt(self, attempt: int) -> list[Fault]:
        """Write what is missing, then check it; empty where all is well."""
        self._scores = None
        if self._description is None:
            faults = await self._describe(attempt)
            if faults:
                return faults
        faults = await self._think(attempt)
        if faults or self._judge is None:
            return faults
        self._scores, faults = await judged(
            self._judge, self._sample, self._picture, self._attempts, self._met, self._traffic
        )
        if faults and min(self._scores.normal_anatomy, self._scores.lesion) < PASSES_AT:
            # What was seen is at fault, not only what was made of it.
            self._description = None
        return faults

    async def _describe(self, attempt: int) -> list[Fault]:
        prompt = description_prompt(self._sample, self._picture, self._earlier, self._faults)
        said = await ask_for(self._teacher, prompt, Description, attempt, self._traffic)
        if isinstance(said, Fault):
            self._earlier = ""
            return [said]
        faults = pixel_faults(said.lesion, self._facts, self._sample.category)
        if faults:
            self._earlier = said.lesion
            return faults
        self._description = said
        # What the judge found is for the second prompt too; anything else was about the description alone.
        if any(fault.kind != "judge" for fault in self._faults):
            self._earlier, self._faults = "", []
        return []

    async def _think(self, attempt: int) -> list[Fault]:
        assert self._description is not None
        prompt = thought_prompt(self._sample, self._description, self._earlier, self._faults)
        said = await ask_for(self._teacher, prompt, Thought, attempt, self._traffic)
        if isinstance(said, Fault):
            self._earlier = ""
            return [said]
        text = self._earlier = clean(said.reasoning)
        self._sample = replace(self._sample, reasoning=text)
        return [*text_faults(text, self._sample.category), *pixel_faults(text, self._facts, self._sample.category)]
