"""The one table that documents every column: its dimensions, its meaning, who makes it.

Dimensions: N rows (one prompt with one response), T tokens, B groups, K responses of the largest group, D anything.
`B ...` stands for any tensor that leads with the groups. Rows of one group share a value of `group`.
"""
from __future__ import annotations

import difflib
from typing import NamedTuple


class Column(NamedTuple):
    dims: str
    meaning: str
    maker: str


COLUMNS: dict[str, Column] = {
    # rows and tokens
    "tokens": Column("N T", "prompt and response ids", "collate"),
    "attend": Column("N T", "1 on real tokens, 0 on padding", "collate"),
    "mask": Column("N T", "1 on response tokens that may train; tool output and hints are 0", "collate"),
    "group": Column("N", "which group a row belongs to (any integers)", "collate"),
    "prompt_length": Column("N", "prompt tokens at the start of the row", "collate"),
    "train": Column("N", "False for probe rows (opponents, baselines); default True", "source"),
    # labels
    "relevance": Column("N", "graded label, higher is better; a pair is 1/0; NaN is an unlabelled row", "labels"),
    "wins": Column("B K K", "P(i preferred to j); NaN where nobody compared; made from relevance when absent", "labels"),
    "weight": Column("N", "weight of the row's group in the loss (all rows of a group alike); default 1", "labels"),
    "reward": Column("N", "scalar reward", "rewards"),
    "rewards": Column("N D", "reward per objective", "rewards"),
    "level": Column("N", "which comparison a row belongs to: 0 base, 1 intra-sample, 2 inter-sample (MAPL)", "augment"),
    "contrast": Column("N", "sign of the row in a difference of differences, 0 elsewhere (MAPL)", "augment"),
    "rationale": Column("N", "True for rows whose response is a rationale, trained by likelihood only", "augment"),
    "online": Column("N", "True for unlabelled rows sampled from the current policy (HyPO)", "source"),
    "from_reference": Column("N", "True for responses that the reference sampled beside the policy's (XPO)", "source"),
    "degree": Column("N", "preference degree 0..M-1 of a thinned variant, -1 elsewhere (SPO)", "augment"),
    "side": Column("N", "1 variant of a chosen response, 0 of a rejected one, -1 elsewhere (SPO)", "augment"),
    "position": Column("N", "1-based position of an item in the generated list (in-context ranking)", "source"),
    # models
    "logp": Column("N T", "log-probability of each token under the policy, with gradient", "forward"),
    "logp_ref": Column("N T", "the same under the frozen reference", "forward"),
    "logp_old": Column("N T", "the same under the policy before this optimiser step, no gradient", "forward"),
    "logp_rollout": Column("N T", "the same as reported by the sampler", "sampler"),
    "logp_now": Column("N T", "the same at the start of this optimiser step, no gradient (logp_old on the first of a "
                              "rollout)", "forward"),
    "finished": Column("N", "True where the response ended by itself, False where the limit cut it", "sampler"),
    "entropy": Column("N T", "entropy of the next-token distribution", "forward"),
    "entropy_old": Column("N T", "the same before this rollout is trained on, no gradient", "forward"),
    "collision": Column("N T", "log sum_v p_v^2 of the next-token distribution (WPO)", "forward"),
    "peak": Column("N T", "largest log-probability of the next-token distribution", "forward"),
    "mass_above": Column("N T", "probability of all tokens more likely than the one that follows", "forward"),
    "token_kl": Column("N T", "KL(reference || policy) of the next-token distributions, with gradient", "forward"),
    "states_ref": Column("N T L D", "hidden states of layers 1..L of the reference at the position that predicts the "
                                    "token; the embedding output is left out", "forward"),
    "activation_mask": Column("N T", "mask in [0, 1] read off the reference's activations (MaPO)", "forward"),
    "last_state": Column("N D", "last hidden state of the policy at the end of the response", "forward"),
    "prompt_state": Column("N D", "last hidden state of the policy at the end of the prompt", "forward"),
    "mismatched": Column("N", "summed log-ratio, no gradient, of the row's prompt with another prompt's response "
                              "(KTO); NaN where there is none", "forward"),
    "outputs": Column("N D", "outputs of a reward model's head at the end of the response", "forward"),
    "outputs_old": Column("N D", "the same before this optimiser step, no gradient", "forward"),
    "token_reward": Column("N T", "output of a reward model's head after each response token", "forward"),
    "value": Column("N T", "the critic's value of the state before each response token, with gradient", "forward"),
    "value_old": Column("N T", "the same before this rollout is trained on, no gradient", "forward"),
    "segment": Column("N T", "which part of a response a token is in, a number: tool use, observation, rationale", "labels"),
    "step_label": Column("N T", "label in [0, 1] at the token that ends a step, NaN elsewhere", "labels"),
    # made by objectives
    "score": Column("N", "score of a response: scaled log-ratio, reward head, ...", "score"),
    "margin": Column("B K K", "score difference, or any skew-symmetric preference strength", "margin"),
    "labels": Column("B K K", "weight of 'i beats j' in a pairwise loss", "labels part"),
    "reward_mask": Column("N T", "token weights on the log-ratio (SparsePO)", "provider"),
    "kl_mask": Column("N T", "token weights on the token KL (SparsePO)", "provider"),
    "embedding": Column("N D", "preference embedding of a response, blocks of two dimensions (GPM)", "provider"),
    "gate": Column("N D", "weight of each block of the embedding, alike for all rows of a prompt (GPM)", "provider"),
    "grade_logits": Column("N D", "logit P(grade >= k) for each threshold k of an ordinal reward model", "provider"),
    "shared_length": Column("N", "tokens of the group's shortest response (LD-DPO)", "annotate"),
    "baseline": Column("N", "reference point of a pointwise loss (KTO z0, BCO shift)", "annotate"),
    "transported": Column("N", "what optimal transport pairs the row with: a reference margin, or a score (AOT)",
                          "annotate"),
    "tangent": Column("N D", "slope in the row's score, times the rows, and value of a loss of the whole step (Dice, F1)",
                      "annotate"),
    "advantage": Column("N T", "advantage of each token", "annotate"),
    "response_advantage": Column("N", "advantage of a whole response, which credit spreads over its tokens", "annotate"),
    "reward_at": Column("N T", "reward received at each token: the response's at its last, a step's where it ends, less a KL "
                               "penalty where a recipe has one", "annotate"),
    "step_reward": Column("N T", "reward of the step that ends at this token, NaN elsewhere", "rewards"),
    "returns": Column("N T", "what the critic's value should be", "annotate"),
    "log_ratio": Column("N T", "log of the importance ratio that a surrogate weighs, with gradient", "ratio"),
    "noise": Column("N T", "uniform numbers in [0, 1) for parts that choose tokens at random", "annotate"),
    "selected": Column("N T", "True on the tokens that a rule over the whole step picks", "annotate"),
    "correction": Column("N T", "weight for the gap between the sampler's and the trainer's probabilities", "annotate"),
    "coefficient": Column("N", "coefficient of a penalty that a controller sets, alike for all rows", "annotate"),
    "token_unit": Column("N T", "reduction weight of each token in this optimiser step", "annotate"),
    "length": Column("N", "response tokens that train", "objective"),
    "probe": Column("B K", "True where a slot holds a probe row", "objective"),
    "unit": Column("B ...", "reduction weights of this optimiser step", "annotate"),
    "terms": Column("B ...", "which pairs, rows, tokens or lists a loss term counts, and how much", "annotate"),
    "real": Column("B K", "True where a slot holds a row that takes part: present, train, and labelled", "objective"),
}


def document(name: str, dims: str, meaning: str, maker: str = "user") -> None:
    """Add a column of your own to the table, so that `Batch` accepts it and `explain` prints it."""
    if name in COLUMNS and COLUMNS[name] != Column(dims, meaning, maker):
        raise ValueError(f"column {name!r} is already documented: {COLUMNS[name].meaning}")
    COLUMNS[name] = Column(dims, meaning, maker)


def column(name: str) -> Column:
    """The table's line for `name`; `unit@sft` is the column `unit` of the term `sft`."""
    base = name.split("@")[0]
    if base not in COLUMNS:
        raise KeyError(f"unknown column {name!r}{nearest(base, COLUMNS)}; add it with data_tools.columns.document(...)")
    return COLUMNS[base]


def nearest(name: str, known) -> str:
    """', did you mean ...?' for error messages, or nothing."""
    found = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f", did you mean {found[0]!r}?" if found else ""
