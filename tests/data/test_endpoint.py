"""The client of an endpoint, over real HTTP: what comes back is kept, what fails is tried again, the budget holds."""

import asyncio
import base64
import io
import json
import math
import socket
import time
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from teacher_server import INPUT_TOKENS, OUTPUT_TOKENS, Answer, Request, TeacherServer

from coreseg.config import load
from coreseg.data.build import endpoint as endpoint_module
from coreseg.data.build.endpoint import Endpoint, NoReplyError, Prompt
from coreseg.data.build.ledger import Ledger, Reply
from coreseg.data.build.settings import EndpointSettings, TeacherConfig
from coreseg.errors import ConfigError, TeacherError

PICTURE = np.zeros((40, 60, 3), np.uint8)
PICTURE[:20] = (200, 30, 90)
PROMPT = Prompt("Be brief.", "What is this?", PICTURE, {"type": "object"})


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "_BACKOFF_S", 0.01)


def hello(request: Request) -> Answer:
    return Answer("hello")


def ask(
    url: str, ledger: Ledger, *prompts: Prompt, attempt: int = 1, **settings: Any
) -> tuple[list[Reply | BaseException], Counter[str]]:
    """What each prompt gives, all asked at once, and the traffic."""
    traffic: Counter[str] = Counter()

    async def run() -> list[Reply | BaseException]:
        endpoint = Endpoint(EndpointSettings(base_url=url, model="m", **settings), ledger)
        asked = (endpoint.ask(prompt, attempt, traffic) for prompt in prompts or (PROMPT,))
        replies = await asyncio.gather(*asked, return_exceptions=True)
        await endpoint.close()
        return replies

    return asyncio.run(run()), traffic


def numbered(count: int) -> list[Prompt]:
    return [Prompt("Be brief.", f"Question {number}", None, {}) for number in range(count)]


def test_the_request_holds_words_picture_schema_and_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    with TeacherServer(hello) as server:
        (reply,), traffic = ask(server.url, Ledger(tmp_path), temperature=0.5, max_tokens=77, key_env="MY_KEY")
        body = server.bodies[0]
    assert reply == Reply("hello", "stop", INPUT_TOKENS, OUTPUT_TOKENS, 0.0)
    assert traffic == {"requests": 1, "input tokens": INPUT_TOKENS, "output tokens": OUTPUT_TOKENS}
    system, user = body["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    image, text = user["content"]
    assert text == {"type": "text", "text": "What is this?"}
    start, data = image["image_url"]["url"].split(",")
    assert start == "data:image/jpeg;base64"
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
    assert np.abs(sent - PICTURE).mean() < 3
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 77)
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert "secret" not in json.dumps(body)


def test_what_was_received_is_not_asked_again_unless_something_differs(tmp_path: Path) -> None:
    other = Prompt("Be brief.", "What is this?", PICTURE[::-1].copy(), {"type": "object"})
    with TeacherServer(hello) as server:
        ask(server.url, Ledger(tmp_path))
        _, traffic = ask(server.url, Ledger(tmp_path))
        assert (server.requests, traffic) == (1, {"cached": 1})
        ask(server.url, Ledger(tmp_path), attempt=2)
        ask(server.url, Ledger(tmp_path), other)
        ask(server.url, Ledger(tmp_path), Prompt("Be brief.", "What?", PICTURE, {"type": "object"}))
        ask(server.url, Ledger(tmp_path), temperature=0.1)
        ask(server.url, Ledger(tmp_path), max_tokens=9)
        assert server.requests == 6
        ask(server.url, Ledger(tmp_path), in_flight=2, retries=1, input_price=3.0)
        assert server.requests == 6


def once(fault: Answer, times: int = 1) -> Callable[[Request], Answer]:
    return lambda request: fault if request.times <= times else Answer("hello")


PASSING = {
    "429": (once(Answer(status=429)), "rate limits"),
    "500, twice": (once(Answer(status=500), 2), "server errors"),
    "503 with a date": (once(Answer(status=503, headers={"Retry-After": formatdate(0, usegmt=True)})), "server errors"),
    "408": (once(Answer(status=408)), "server errors"),
    "no reply in time": (once(Answer(delay_s=2.0)), "time-outs"),
    "hung up in the middle": (once(Answer("hi", hang_up=True)), "broken connections"),
    "half a response": (once(Answer(body=b'{"id": "c", "object": "chat.comp')), "unreadable responses"),
    "a web page": (
        once(Answer(body=b"<html>Hello</html>", headers={"Content-Type": "text/html"})),
        "unreadable responses",
    ),
    "no choices": (once(Answer(body=b'{"id": "c", "choices": []}')), "unreadable responses"),
    "no message": (once(Answer(body=b'{"id": "c", "choices": [{"index": 0}]}')), "unreadable responses"),
}


@pytest.mark.parametrize(("answer", "kind"), PASSING.values(), ids=PASSING)
def test_what_may_pass_is_tried_again_and_counted(
    tmp_path: Path, answer: Callable[[Request], Answer], kind: str
) -> None:
    with TeacherServer(answer) as server:
        ledger = Ledger(tmp_path, 1.0)
        (reply,), traffic = ask(server.url, ledger, timeout_s=1.0, input_price=1.0, output_price=1.0)
    assert isinstance(reply, Reply) and reply.text == "hello"
    assert traffic[kind] == traffic["retries"] == traffic["requests"] - 1 == server.requests - 1 >= 1
    spent = ledger.spent()
    assert math.isclose(spent.paid, (INPUT_TOKENS + OUTPUT_TOKENS) / 1e6)
    # Without a status the server may have done the work, and may charge for it.
    unsure = kind in ("time-outs", "broken connections", "unreadable responses")
    assert (spent.unanswered > 0) == unsure


def test_nobody_goes_before_retry_after_is_over(tmp_path: Path) -> None:
    times: list[float] = []

    def answer(request: Request) -> Answer:
        times.append(time.monotonic())
        return Answer(status=429, headers={"Retry-After": "0.7"}) if len(times) == 2 else Answer("hello")

    with TeacherServer(answer) as server:
        ledger = Ledger(tmp_path)
        ask(server.url, ledger)
        replies, traffic = ask(server.url, ledger, *numbered(6), in_flight=1)
    assert all(isinstance(reply, Reply) for reply in replies)
    assert traffic["rate limits"] == 1
    assert min(times[2:]) - times[1] >= 0.7


def test_what_stays_broken_is_given_up_after_its_tries(tmp_path: Path) -> None:
    with TeacherServer(lambda request: Answer("kaputt", status=500)) as server:
        (failed,), traffic = ask(server.url, Ledger(tmp_path), retries=3)
    assert isinstance(failed, NoReplyError) and "500, " in str(failed) and "kaputt" in str(failed)
    assert (server.requests, traffic["server errors"], traffic["retries"]) == (4, 4, 3)


@pytest.mark.parametrize(("status", "in_flight", "requests"), [(401, 32, 1), (404, 32, 1), (400, 2, 3), (500, 2, 3)])
def test_where_nothing_is_answered_the_run_stops(tmp_path: Path, status: int, in_flight: int, requests: int) -> None:
    with TeacherServer(lambda request: Answer("no such thing", status=status)) as server:
        answers, _ = ask(server.url, Ledger(tmp_path), *numbered(9), in_flight=in_flight, retries=0)
        assert server.requests >= requests
    stopped = next(each for each in answers if isinstance(each, TeacherError))
    for word in (server.url, "model m", str(status), "no such thing", "OPENAI_API_KEY"):
        assert word in str(stopped)
    if status in (401, 404):
        assert isinstance(answers[0], TeacherError)


def test_one_refused_request_does_not_stop_the_others(tmp_path: Path) -> None:
    def answer(request: Request) -> Answer:
        return Answer("content policy", status=400) if request.words == "Question 3" else Answer("hello")

    with TeacherServer(answer) as server:
        answers, traffic = ask(server.url, Ledger(tmp_path), *numbered(8), in_flight=2)
    assert [type(each) for each in answers] == [Reply] * 3 + [NoReplyError] + [Reply] * 4
    assert (traffic["refused requests"], traffic["retries"]) == (1, 0)


def test_no_quota_is_not_waited_for(tmp_path: Path) -> None:
    body = json.dumps({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}).encode()
    with TeacherServer(lambda request: Answer(status=429, body=body)) as server:
        (failed,), _ = ask(server.url, Ledger(tmp_path))
        assert server.requests == 1
    assert isinstance(failed, TeacherError) and "quota" in str(failed)


def test_nobody_at_the_address(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused for sure
        answers, traffic = ask(f"http://127.0.0.1:{taken.getsockname()[1]}/v1", Ledger(tmp_path))
    assert isinstance(answers[0], TeacherError) and "no connection" in str(answers[0])
    assert traffic["no connection"] == 3


def test_the_first_request_goes_alone_and_then_as_many_as_allowed(tmp_path: Path) -> None:
    opened: list[int] = []

    def answer(request: Request) -> Answer:
        opened.append(server.open)
        return Answer("hello")

    with TeacherServer(answer, latency_s=0.2) as server:
        replies, _ = ask(server.url, Ledger(tmp_path), *numbered(17), in_flight=8)
    assert all(isinstance(reply, Reply) for reply in replies)
    assert opened[0] == 1 and server.most_open == 8
    assert server.requests == 17


def test_a_server_that_knows_no_schema_and_another_word_for_the_limit(tmp_path: Path) -> None:
    def answer(request: Request) -> Answer:
        if "response_format" in request.body:
            return Answer("response_format is not supported", status=400)
        if "max_tokens" in request.body:
            return Answer("Unsupported parameter: use max_completion_tokens instead", status=400)
        return Answer("hello")

    with TeacherServer(answer) as server:
        replies, traffic = ask(server.url, Ledger(tmp_path), *numbered(5))
        assert all(isinstance(reply, Reply) for reply in replies)
        assert server.requests == 7, "learnt by the first request alone"
        assert server.bodies[-1]["max_completion_tokens"] == 1000
    assert traffic["settings the server does not know"] == 2


def test_what_goes_out_together_is_refused_together_and_goes_again(tmp_path: Path) -> None:
    def answer(request: Request) -> Answer:
        if "response_format" in request.body:
            return Answer("response_format is not supported", status=400)
        return Answer("hello")

    with TeacherServer(answer, latency_s=0.1) as server:
        ask(server.url, Ledger(tmp_path))
        replies, traffic = ask(server.url, Ledger(tmp_path), *numbered(6), retries=0)
    assert [type(reply) for reply in replies] == [Reply] * 6
    assert (traffic["refused requests"], traffic["settings the server does not know"]) == (0, 6)


@pytest.mark.parametrize(
    ("content", "usage"),
    [
        ("hello you", '{"prompt_tokens": null, "completion_tokens": null, "total_tokens": null}'),
        ("hello y\ud83d", "null"),
    ],
    ids=["nulls", "half a surrogate pair"],
)
def test_odd_replies_are_kept_all_the_same(tmp_path: Path, content: str, usage: str) -> None:
    message = json.dumps({"role": "assistant", "content": content})
    choices = f'[{{"index": 0, "finish_reason": "stop", "message": {message}}}]'
    body = f'{{"id": "c", "object": "chat.completion", "created": 0, "choices": {choices}, "usage": {usage}}}'
    with TeacherServer(lambda request: Answer(body=body.encode())) as server:
        for _ in range(2):
            (reply,), _ = ask(server.url, Ledger(tmp_path), image_tokens=500)
            assert isinstance(reply, Reply)
            assert reply.text == content.replace("\ud83d", "?")
            assert 500 < reply.input_tokens < 700 and reply.output_tokens == len(content)
        assert server.requests == 1


def test_missing_usage_is_estimated_from_above(tmp_path: Path) -> None:
    with TeacherServer(lambda request: Answer("hello you", usage=False)) as server:
        (reply,), _ = ask(server.url, Ledger(tmp_path), image_tokens=500)
    assert isinstance(reply, Reply)
    assert reply.output_tokens == len("hello you")
    assert 500 < reply.input_tokens < 700


PRICES = {"input_price": 100.0, "output_price": 1000.0}
PRICE = (INPUT_TOKENS * 100 + OUTPUT_TOKENS * 1000) / 1e6


def test_the_budget_is_never_overrun_with_many_in_flight(tmp_path: Path) -> None:
    with TeacherServer(hello, latency_s=0.05) as server:
        ledger = Ledger(tmp_path, 10.1 * PRICE)
        answers, _ = ask(server.url, ledger, *numbered(60), max_tokens=100, **PRICES)
        received = [each for each in answers if isinstance(each, Reply)]
        stopped = [each for each in answers if isinstance(each, TeacherError)]
        assert len(received) == 10 == server.requests, "all that fit, and not one more"
        assert len(stopped) == 50
        assert math.isclose(ledger.spent().paid, 10 * PRICE) and ledger.spent().unanswered == 0
        assert "the budget of 2.02 is used up: 2 paid" in str(stopped[0]) and "--max-cost" in str(stopped[0])
        more, traffic = ask(server.url, Ledger(tmp_path, 60.5 * PRICE), *numbered(60), max_tokens=100, **PRICES)
        assert all(isinstance(each, Reply) for each in more)
        assert server.requests == 60 and traffic["cached"] == 10


class SlowToRefuse(Ledger):
    """Where the budget has no room, every open request ends before the asker hears of it."""

    def reserve(self, cost: float) -> bool:
        taken = super().reserve(cost)
        while not taken and self.open_requests:
            time.sleep(0.01)
        return taken


def test_a_request_that_ends_meanwhile_makes_room(tmp_path: Path) -> None:
    with TeacherServer(hello, latency_s=0.05) as server:
        ask(server.url, Ledger(tmp_path), **PRICES)
        # Room for one at a time, of which each gives most of it back.
        ledger = SlowToRefuse(tmp_path, 1.2 + 5 * PRICE)
        answers, _ = ask(server.url, ledger, *numbered(4), max_tokens=1000, **PRICES)
    assert [type(each) for each in answers] == [Reply] * 4


def test_replies_dearer_than_thought_are_reckoned_with(tmp_path: Path) -> None:
    # A picture that counts a hundred times what the settings say.
    with TeacherServer(hello, latency_s=0.05) as server:
        ledger = Ledger(tmp_path, 7.5 * PRICE)
        ask(server.url, ledger, *numbered(40), max_tokens=1, **PRICES)
        assert server.requests == 7
    assert ledger.spent().paid <= 7.5 * PRICE


def test_limits_a_minute_space_the_requests(tmp_path: Path) -> None:
    for name, limits in (("a", {"requests_per_minute": 600}), ("b", {"tokens_per_minute": 600 * 106})):
        with TeacherServer(hello) as server:
            started = time.monotonic()
            ask(server.url, Ledger(tmp_path / name), *numbered(8), max_tokens=100, **limits)
            assert 0.65 <= time.monotonic() - started < 3.0


def test_settings_are_checked() -> None:
    good = {"base_url": "http://x/v1", "model": "m"}
    for wrong in ({"base_url": "x"}, {"in_flight": 0}, {"timeout_s": 0.0}, {"input_price": -1.0}, {"max_tokens": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            EndpointSettings(**{**good, **wrong})
    priced = EndpointSettings(**good, input_price=1.0)
    for config, word in (
        (TeacherConfig(teacher=priced), "no budget"),
        (TeacherConfig(teacher=EndpointSettings(**good), max_cost=1.0), "no price"),
    ):
        with pytest.raises(ConfigError, match=word):
            config.open_ledger()


def test_a_file_of_settings(tmp_path: Path) -> None:
    file = tmp_path / "teacher.toml"
    file.write_text('max_cost = 2\n[teacher]\nbase_url = "http://x/v1"\nmodel = "m"\ninput_price = 2.5\n')
    config = load(TeacherConfig, file, ["max_cost=3.5"])
    assert config.max_cost == 3.5 and config.judge is None
    assert config.teacher and (config.teacher.input_price, config.teacher.in_flight) == (2.5, 32)
    file.write_text('[teacher]\nbase_url = "http://x/v1"\nmodell = "m"\n')
    with pytest.raises(ConfigError, match="did you mean 'model'"):
        load(TeacherConfig, file)
    file.write_text("teacher = 3\n")
    with pytest.raises(ConfigError, match="setting 'teacher' is 3; expected a table"):
        load(TeacherConfig, file)
