"""Settings of a teacher and a judge, read from a TOML file by `coreseg.config.load`."""

import math
from dataclasses import dataclass
from pathlib import Path

from coreseg.config import require
from coreseg.data.build.ledger import Ledger
from coreseg.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """One model behind an OpenAI-compatible endpoint. Defaults are our choice.

    base_url: such as https://host/v1.                        model: the endpoint's name of it.
    key_env: environment variable that holds the key; a local server wants none, so it may be missing.
    input_price, output_price: of a million tokens, in any currency as long as all prices share it.
    max_tokens: longest reply, hidden reasoning included.
    image_tokens: what a picture counts, estimated from above; the first replies correct it.
    temperature: of sampling; not sent where left out, so that the server's own holds.
    json_schema: send the reply's JSON schema along; left out again where the server refuses it.
    in_flight: requests open at once.
    requests_per_minute, tokens_per_minute: of the account; 0 sets no limit. For each process of a run.
    timeout_s: how long to wait for a reply.                  retries: further tries of a request that failed.
    """

    base_url: str
    model: str
    key_env: str = "OPENAI_API_KEY"
    input_price: float = 0.0
    output_price: float = 0.0
    max_tokens: int = 1000
    image_tokens: int = 1600
    temperature: float | None = None
    json_schema: bool = True
    in_flight: int = 32
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    timeout_s: float = 120.0
    retries: int = 8

    def __post_init__(self) -> None:
        web = self.base_url.startswith(("http://", "https://"))
        require(web, "base_url", self.base_url, "an address that starts with http:// or https://")
        for name in ("max_tokens", "in_flight"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("input_price", "output_price", "image_tokens", "requests_per_minute", "tokens_per_minute",
                     "retries"):  # fmt: skip
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        require(0 < self.timeout_s < math.inf, "timeout_s", self.timeout_s, "a number of seconds above 0")

    @property
    def costs(self) -> bool:
        """Whether a price is set."""
        return self.input_price > 0 or self.output_price > 0

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """The price of one request."""
        return (input_tokens * self.input_price + output_tokens * self.output_price) / 1e6


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Who describes and who judges, and what that may cost. Defaults are our choice; the paper names no figures.

    teacher: a table, see `EndpointSettings`; `coreseg data describe` needs it.
    judge: another such table, best another model; without it no judge is asked.
    cache: folder of all replies that were ever paid for. Its budget counts them all, so one folder is one purse.
    max_cost: the budget, in the currency of the prices; needed where a price is set.
    attempts: how often a row is written, the first time included, before it is set aside.
    image_px: longer side of the pictures that are sent.
    """

    teacher: EndpointSettings | None = None
    judge: EndpointSettings | None = None
    cache: str = "teacher-cache"
    max_cost: float | None = None
    attempts: int = 3
    image_px: int = 1024

    def __post_init__(self) -> None:
        require(self.attempts >= 1, "attempts", self.attempts, "at least 1")
        require(self.image_px >= 64, "image_px", self.image_px, "at least 64")
        require(self.max_cost is None or self.max_cost > 0, "max_cost", self.max_cost, "a number above 0")

    @property
    def endpoints(self) -> tuple[EndpointSettings, ...]:
        """Those that are set."""
        return tuple(each for each in (self.teacher, self.judge) if each is not None)

    def check_budget(self) -> None:
        """Raises ConfigError where prices and budget do not go together."""
        costs = any(each.costs for each in self.endpoints)
        if costs and self.max_cost is None:
            raise ConfigError(
                "prices are set, but no budget; expected max_cost in the file, or --max-cost (inf for no limit)"
            )
        if self.max_cost is not None and not costs:
            raise ConfigError(
                f"the budget is {self.max_cost:g}, but no price is set, so nothing would count; expected input_price "
                "and output_price of a million tokens in the tables of teacher and judge"
            )

    def open_ledger(self) -> Ledger:
        """The ledger of `cache`, with the budget.

        Raises ConfigError where prices and budget do not go together, DataError where the folder cannot be used.
        """
        self.check_budget()
        return Ledger(Path(self.cache), math.inf if self.max_cost is None else self.max_cost)
