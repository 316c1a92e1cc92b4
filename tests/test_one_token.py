"""Recipes of games on a language model that says one token: the trajectories are those of tables, through collate and forward."""
from __future__ import annotations

import dataclasses

import pytest
import torch
from columns_for_tests import close

from data_tools.collate import Encoding, collate
from data_tools.records import Group, Response
from prefopt import recipes
from prefopt.forward import fill, forward
from prefopt.games import algorithms, tabular
from prefopt.games.game import Game
from prefopt.games.tabular import Algorithm, Policies, Table, play
from prefopt.models import Models
from prefopt.rollout.base import Choice
from prefopt.rollout.transformers import Sampler

# what float32 holds exactly, as labels are kept in it: probabilities, and scores of sigmoid(integer)
WINS = [[0.5, 0.875, 0.25, 0.75], [0.125, 0.5, 0.625, 0.75], [0.75, 0.375, 0.5, 0.875], [0.25, 0.25, 0.125, 0.5]]
SCORES = torch.sigmoid(torch.tensor([[0, 2, -1, 1], [-2, 0, 3, 1], [1, -3, 0, 2], [-1, -1, -2, 0]], dtype=torch.float64))


def words(items: int):
    """One token for each word a0, a1, ..., and no other."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    backend = Tokenizer(models.WordLevel({f"a{i}": i for i in range(items)}, unk_token="a0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="a0")


def model_of(logits: torch.Tensor):
    """A causal language model without layers whose logits after the prompt of token x are logits[x], in float64.

    The embedding of a prompt is one of four directions, and the norm, which is of float32, makes it 2 * 1/2 exactly, so that the
    first columns of the head (V, 4) are the table.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    prompts, items = logits.shape
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=items, hidden_size=4, intermediate_size=1, num_hidden_layers=0, num_attention_heads=1, head_dim=2,
        max_position_embeddings=8, tie_word_embeddings=False, rms_norm_eps=0.0, pad_token_id=0, bos_token_id=None,
        eos_token_id=None)).double()
    model.requires_grad_(False)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.embed_tokens.weight[:prompts] = torch.eye(4)[:prompts]
        model.model.norm.weight.fill_(0.5)
        model.lm_head.weight.zero_()[:, :prompts] = logits.T
    return model


class Spoken(Table):
    """A table whose policies are language models: what was drawn becomes groups, a collated batch, columns of forward passes."""

    def __init__(self, game, algorithm, **settings):
        Table.__init__(self, game, algorithm, **settings)
        self.tokenizer = words(game.items)
        self.models = Models(model_of(self.theta.detach()), model_of(self.reference), self.tokenizer)
        self.theta, self.reference = self.models.policy.lm_head.weight.requires_grad_(), self.models.reference.lm_head.weight
        self.averaged = self.theta.detach().clone()
        self.reads = algorithm.objective.reads()

    def policies(self) -> Policies:
        return Policies(*(x.detach().T[:self.game.prompts].log_softmax(-1) for x in (self.theta, self.reference, self.averaged)))

    @torch.no_grad()
    def renew(self) -> None:
        policies = self.policies()
        (x, y), columns = self.drawn(*(choose(policies, self.t).exp() for choose in (
            self.algorithm.first, self.algorithm.second, self.algorithm.opponent)))
        groups, size = [], len(x) // int(columns["group"].max() + 1)
        for n in range(0, len(x), size):
            known = [None if r != r else r for r in columns["reward"][n:n + size].tolist()]
            trains = columns["train"][n:n + size].tolist()
            rows = [Response(f"a{token}", tokens=[token], scores={} if r is None else {"reward": r}, train=train)
                    for token, r, train in zip(y[n:n + size].tolist(), known, trains, strict=True)]
            group = Group(f"a{int(x[n])}", rows, relevance=known if self.algorithm.objective.whole_groups else None)
            if "wins" in columns:
                group.wins = [[None if w != w else w for w in row] for row in columns["wins"][n // size].tolist()]
                for row, marked in zip(rows, columns["from_reference"][n:n + size].tolist(), strict=True):
                    row.meta["from_reference"] = marked
            groups.append(group)
        batch = collate(groups, self.tokenizer, Encoding(add_eos=False))
        batch = batch.with_columns(**{c: batch[c].double() for c in ("reward", "relevance", "wins") if c in batch})
        objective = self.algorithm.objective
        batch = fill(self.models, batch, {"logp_old", "logp_ref"} & self.reads)
        self.batch = objective.annotate(objective.estimate(batch))

    def loss(self):
        micros = self.batch.microbatches(60, self.algorithm.objective.whole_groups)
        return sum(self.algorithm.objective.loss(forward(self.models, micro, self.reads)).value for micro in micros)


def games(recipe: str) -> Game:
    payoff = SCORES if recipe == "gpo" else torch.tensor(WINS, dtype=torch.float64)
    return Game(torch.stack([payoff, payoff[[2, 0, 3, 1]][:, [2, 0, 3, 1]]]), [[4, 3, 2, 1], [1, 1, 2, 4]])


MADE = {name: getattr(algorithms, name) for name in algorithms.__all__}
MADE["gpo_offline"] = lambda game: Algorithm(recipes.gpo_offline(beta=0.5), rate=lambda t: 0.02)


@pytest.mark.parametrize("name", sorted(MADE))
def test_one_token_follows_the_table(name, monkeypatch):
    """Ten iterations on the same draws, two prompts, 20 groups of each; of methods that solve an iteration, three steps."""
    here = games(name)
    made = MADE[name](here)
    if not made.steps:
        made = dataclasses.replace(made, steps=3, rate=lambda t: 0.05)
    table = play(here, made, iterations=10, samples=20)
    monkeypatch.setattr(tabular, "Table", Spoken)
    spoken = play(here, made, iterations=10, samples=20)
    close(spoken, table, 1e-8)
    assert float((table[-1] - table[0]).abs().max()) > 1e-2


def test_every_recipe_is_there():
    """The recipes of games, but for nash_md's decaying steps and mirror descent, which are EGPO's loss."""
    from prefopt.recipes import games as family
    known = {n for n, f in vars(family).items() if callable(f) and getattr(f, "__module__", "") == family.__name__}
    assert known <= set(MADE) and "online_dpo" in MADE


def test_the_sampler_draws_what_the_table_says():
    """Sampled by the embedded sampler: log-probabilities of one token are those of the table."""
    here = games("egpo")
    model = model_of(here.reference.log())
    groups = Sampler(model, words(4), encoding=Encoding(add_eos=False))(["a0", "a1"], n=50, max_new_tokens=1, seed=0)
    for x, group in enumerate(groups):
        expected = here.reference[x].log()[[r.tokens[0] for r in group.responses]]
        close(torch.tensor([r.logp[0] for r in group.responses], dtype=torch.float64), expected, 1e-8)
    assert Choice().temperature == 1.0
