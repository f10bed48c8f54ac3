import torch

from coreseg.model.adapter import SemanticPromptAdapter


def build(**sizes: int) -> SemanticPromptAdapter:
    torch.manual_seed(0)
    return SemanticPromptAdapter(**({"reasoner_width": 12, "width": 16, "tokens": 4, "queries": 3} | sizes))


def states(rows: int = 2, probes: int = 5) -> torch.Tensor:
    return torch.randn(rows, probes, 12, generator=torch.Generator().manual_seed(1))


def all_present(rows: int = 2, probes: int = 5) -> torch.Tensor:
    return torch.ones(rows, probes, dtype=torch.bool)


def nonzero_queries(adapter: SemanticPromptAdapter) -> SemanticPromptAdapter:
    torch.nn.init.normal_(adapter.pool.queries, generator=torch.Generator().manual_seed(2))
    return adapter


def test_one_prompt_of_a_few_tokens_a_row() -> None:
    assert nonzero_queries(build())(states(), all_present()).shape == (2, 3, 16)


def test_padding_has_no_influence() -> None:
    adapter = nonzero_queries(build())
    present = all_present()
    present[:, 3:] = False
    padded = states()
    padded[:, 3:] = 1e3
    torch.testing.assert_close(adapter(padded, present), adapter(states()[:, :3], all_present(2, 3)))


def test_every_state_has_an_influence() -> None:
    adapter = nonzero_queries(build())
    before = adapter(states(), all_present())
    for probe in range(5):
        changed = states()
        changed[:, probe] += 1
        assert not torch.allclose(adapter(changed, all_present()), before, atol=1e-4)


def test_one_state_alone_still_tells_two_rows_apart() -> None:
    prompt = nonzero_queries(build())(states(2, 1), all_present(2, 1))
    assert not torch.allclose(prompt[0], prompt[1], atol=1e-4)


def test_starts_near_the_token_it_is_given() -> None:
    adapter = nonzero_queries(build())
    token = torch.randn(1, 16, generator=torch.Generator().manual_seed(3))
    adapter.start_at(token)
    prompt = adapter(states(), all_present())
    away = (prompt - token).square().mean().sqrt() / token.square().mean().sqrt()
    assert 0.4 < away < 0.6


def test_gradients_reach_every_parameter() -> None:
    adapter = nonzero_queries(build())
    (adapter(states(), all_present()) ** 3).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters() if p.ndim > 1)


def test_a_centred_adapter_passes_on_how_states_differ() -> None:
    """States that are nearly alike, as those at `<seg>` are before any mask loss."""
    noise = torch.randn(64, 12, generator=torch.Generator().manual_seed(3))
    alike = 3 + torch.arange(12) + 0.1 * noise
    spreads = []
    for centred in (False, True):
        adapter = nonzero_queries(build())
        if centred:
            adapter.centre_on(alike)
            projected = adapter.mlp.project(alike)
            torch.testing.assert_close(projected.mean(0), torch.zeros(64), atol=1e-4, rtol=0)
        spreads.append(float(adapter(alike[:, None], all_present(64, 1)).std(0).mean().detach()))
    assert spreads[1] > 5 * spreads[0]
