"""The dry run: what a teacher would be told, and what it would cost, before anything is sent."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from coreseg.data.build.endpoint import Prompt
from coreseg.data.build.prompts import description_prompt, judge_prompt, thought_prompt
from coreseg.data.build.replies import Description
from coreseg.data.build.settings import EndpointSettings, TeacherConfig
from coreseg.types import Sample


@dataclass(frozen=True)
class Estimate:
    """What rows would cost when none is in the cache yet.

    requests, tokens and `likely`: every text passes at once, replies have their usual length. most: every attempt is
    used and every reply is as long as allowed; requests that fail on the way may be charged beside it.
    """

    rows: int
    requests: int
    input_tokens: int
    output_tokens: int
    likely: float
    most: float

    def text(self) -> str:
        """For a reader."""
        money = f"cost about {self.likely:.4g}, at most {self.most:.4g}" if self.most else "no price is set"
        return (
            f"{self.rows:,} rows: {self.requests:,} requests, about {self.input_tokens:,} tokens in and "
            f"{self.output_tokens:,} out; {money}"
        )


@dataclass(frozen=True)
class _Ask:
    """One question about a row, and how often it may have to be asked.

    replies_tokens: usual length of earlier replies that it quotes. usual_tokens: usual length of its own reply.
    """

    settings: EndpointSettings
    prompt: Prompt
    picture: bool
    replies_tokens: int
    usual_tokens: int
    at_most: int


def estimate(samples: Sequence[Sample], config: TeacherConfig) -> Estimate:
    """The estimate for rows, from their words alone: no picture is read."""
    requests = input_tokens = output_tokens = 0
    likely = most = 0.0
    for ask in (ask for sample in samples for ask in _asks(sample, config)):
        image_tokens = ask.picture * ask.settings.image_tokens
        # Four letters a token is usual in English; a text that was turned down is quoted in the next prompt.
        tokens_in = ask.prompt.text_bytes // 4 + ask.replies_tokens + image_tokens
        most_in = tokens_in + ask.settings.max_tokens
        requests += 1
        input_tokens += tokens_in
        output_tokens += ask.usual_tokens
        likely += ask.settings.cost(tokens_in, ask.usual_tokens)
        most += ask.at_most * ask.settings.cost(most_in, ask.settings.max_tokens)
    return Estimate(len(samples), requests, input_tokens, output_tokens, likely, most)


def prompts_text(samples: Sequence[Sample], config: TeacherConfig) -> str:
    """The prompts of a few rows as they would be sent, with what only a reply can tell left open."""
    blocks = []
    for sample in samples:
        blocks += [
            f"=== {sample.file_name}, {sample.category}, to {ask.settings.model}"
            f"{', with the picture' if ask.picture else ''}\n"
            f"--- system\n{ask.prompt.system}\n--- user\n{ask.prompt.user}"
            for ask in _asks(sample, config)
        ]
    return "\n\n".join(blocks)


_DESCRIPTION_TOKENS, _THOUGHT_TOKENS, _JUDGEMENT_TOKENS = 220, 150, 80
"""Usual length of replies. Our choice."""


def _asks(sample: Sample, config: TeacherConfig) -> Iterator[_Ask]:
    if config.teacher is not None:
        described = Description(normal_anatomy="(from the first reply)", lesion="(from the first reply)")
        prompt = description_prompt(sample, None)
        yield _Ask(config.teacher, prompt, True, 0, _DESCRIPTION_TOKENS, config.attempts)
        prompt = thought_prompt(sample, described)
        yield _Ask(config.teacher, prompt, False, _DESCRIPTION_TOKENS, _THOUGHT_TOKENS, config.attempts)
    if config.judge is not None:
        # A judge that writes no judgement is asked again, each time that a text is written.
        written = sample if config.teacher is None else replace(sample, reasoning="(from the second reply)")
        quoted = 0 if config.teacher is None else _THOUGHT_TOKENS
        prompt = judge_prompt(written, None)
        texts = 1 if config.teacher is None else config.attempts
        yield _Ask(config.judge, prompt, True, quoted, _JUDGEMENT_TOKENS, texts * config.attempts)
