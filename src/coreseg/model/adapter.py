"""The semantic-guided prompt adapter: from the reasoner's hidden states to the segmenter's prompt."""

import torch
from jaxtyping import Bool, Float
from torch import nn


class ResidualBlock(nn.Module):
    """LayerNorm, a two-layer MLP four times as wide, and the way around it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, states: Float[torch.Tensor, "*shape width"]) -> Float[torch.Tensor, "*shape width"]:
        """The states with this block's update added."""
        update: torch.Tensor = self.contract(nn.functional.gelu(self.expand(self.norm(states))))
        return states + update


class ResMLP(nn.Module):
    """Projects each probe state to the segmenter's width and spreads it over `tokens` tokens.

    Our choice: several tokens a state, since attention over a single token would be a constant.
    """

    def __init__(self, reasoner_width: int, width: int, tokens: int, blocks: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.project = nn.Linear(reasoner_width, tokens * width)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))

    def forward(self, states: Float[torch.Tensor, "batch probes reasoner"]) -> Float[torch.Tensor, "batch many width"]:
        """All tokens of a row's probe states, state after state."""
        batch, probes, _ = states.shape
        spread = self.project(states).view(batch, probes * self.tokens, -1)
        tokens: torch.Tensor = self.blocks(spread)
        return tokens


class AttnPool(nn.Module):
    """A few learned queries that cross-attend over the probe's tokens and become the prompt's tokens."""

    def __init__(self, width: int, queries: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, tokens: Float[torch.Tensor, "batch many width"], ignore: Bool[torch.Tensor, "batch many"] | None
    ) -> Float[torch.Tensor, "batch queries width"]:
        """One prompt token a query; tokens marked by `ignore` have no part in it."""
        queries = self.queries.expand(len(tokens), -1, -1)
        pooled, _ = self.attention(queries, tokens, tokens, key_padding_mask=ignore, need_weights=False)
        prompt: torch.Tensor = self.norm(queries + pooled)
        return prompt


class SemanticPromptAdapter(nn.Module):
    """Probe states -> ResMLP -> AttnPool -> semantic prompt, the sparse prompt of the mask decoder.

    One prompt of a few tokens stands for every lesion of the asked category.

    Source: CORE-Seg (arXiv 2603.05911), semantic-guided prompt adapter; sizes and the inside of the two parts are our
    choice.
    """

    def __init__(
        self, reasoner_width: int, width: int, tokens: int = 8, queries: int = 3, blocks: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.mlp = ResMLP(reasoner_width, width, tokens, blocks)
        self.pool = AttnPool(width, queries, heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights, wide enough that what differs between two states still differs in their prompts."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=part.in_features**-0.5)
                nn.init.zeros_(part.bias)
        nn.init.trunc_normal_(self.pool.queries, std=0.5)

    @torch.no_grad()
    def start_at(self, token: Float[torch.Tensor, "1 width"]) -> None:
        """Make every untrained prompt nearly `token`, repeated, with a part half as large that depends on the states.

        Our choice: with the segmenter's "any lesion" token, training starts from a mask of every lesion rather than
        from noise.
        """
        self.pool.norm.bias.copy_(token[0])
        self.pool.norm.weight.fill_(0.5 * float(token.square().mean().sqrt()))

    @torch.no_grad()
    def centre_on(self, states: Float[torch.Tensor, "states reasoner"]) -> None:
        """Let a fresh projection see how states differ: their mean is taken off, their deviation becomes one.

        Our choice: before any mask loss the states at `<seg>` are nearly alike, since the same text follows all of
        them (for nano they differ by a tenth of their norm). An adapter that starts from what they share passes on
        next to nothing, and what it does pass on is noise to the mask decoder, which training then takes out.
        """
        project = self.mlp.project
        project.weight.div_(states.std(0).mean().clamp(min=1e-6))
        project.bias.copy_(-project.weight @ states.mean(0))

    def forward(
        self, states: Float[torch.Tensor, "batch probes reasoner"], present: Bool[torch.Tensor, "batch probes"]
    ) -> Float[torch.Tensor, "batch queries width"]:
        """`present` marks the real probe states of each row; padding is ignored. Every row needs at least one."""
        tokens = self.mlp(states)
        ignore = ~present.repeat_interleave(self.mlp.tokens, dim=1)
        return self.pool(tokens, ignore)  # type: ignore[no-any-return]
