"""The same numbers as TRL: its own loss code, on per-token log-probabilities that both sides are given.

Trainers are made without their constructors: only their loss methods run, with a model that looks its outputs up.
"""
import os
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from columns_for_tests import close

from data_tools import Batch
from prefopt import pair_weights, recipes, regularisers
from prefopt.objectives import Term
from prefopt.reductions import term_mean

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytest.importorskip("trl")

PAIRS, T = 5, 6


def accelerator():
    return SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


class Lookup(torch.nn.Module):
    """A model whose per-token log-probabilities are rows of a table, chosen by the first input id."""
    is_gradient_checkpointing = False

    def __init__(self, log_probs=None, log_sum_sq=None):
        super().__init__()
        self.log_probs, self.log_sum_sq = log_probs, log_sum_sq

    def forward(self, input_ids, labels=None, **_):
        row = input_ids[:, 0]
        values = torch.where(labels[:, 1:] != -100, self.log_probs[row], 0.0)
        zeros = torch.zeros_like(values)
        return SimpleNamespace(log_probs=values, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None,
                               log_sum_sq_probs=zeros if self.log_sum_sq is None else self.log_sum_sq[row])


def bare(trainer_class, **attributes):
    """A trainer that never ran its constructor."""
    trainer = trainer_class.__new__(trainer_class)
    known = dict(accelerator=accelerator(), aux_loss_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
                 _total_train_tokens=0, _tp_size=1, model=Lookup(),
                 args=SimpleNamespace(gradient_checkpointing_kwargs=None))
    for name, value in {**known, **attributes}.items():
        setattr(trainer, name, value)
    return trainer


def step(dtype=torch.float64, seed=0, lengths=None):
    """Columns of pairs, chosen rows first, and TRL's inputs for them."""
    g = torch.Generator().manual_seed(seed)
    n = 2 * PAIRS
    uniform = lambda: torch.rand(n, T, generator=g, dtype=torch.float64).to(dtype)
    lengths = torch.randint(1, T + 1, (n,), generator=g) if lengths is None else lengths
    mask = torch.arange(T) < lengths[:, None]
    columns = {"logp": (-3 * uniform()).requires_grad_(), "logp_ref": -3 * uniform(), "mask": mask,
               "group": torch.arange(n) % PAIRS, "relevance": (torch.arange(n) < PAIRS).to(dtype),
               "collision": -2 * uniform()}
    ids = torch.arange(n)[:, None].expand(n, T + 1)
    prompt = torch.zeros(n, 1, dtype=torch.bool)
    inputs = {"input_ids": ids, "attention_mask": torch.cat([~prompt, mask], 1).long(),
              "completion_mask": torch.cat([prompt, mask], 1).long()}
    return columns, inputs


def trl_dpo(columns, inputs, losses, weights=None, **settings):
    from trl.trainer.dpo_trainer import DPOTrainer
    defaults = dict(beta=0.1, label_smoothing=0.0, ld_alpha=None, precompute_ref_logps=False, use_weighting=False,
                    f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5)
    trainer = bare(DPOTrainer, loss_types=losses, loss_weights=weights or [1.0] * len(losses),
                   ref_model=Lookup(columns["logp_ref"]), **{**defaults, **settings})
    trainer.args.discopop_tau = settings.get("discopop_tau", 0.05)
    model = Lookup(columns["logp"], columns["collision"])
    return trainer._compute_loss(model, inputs, False)


def ours(objective, columns):
    return objective.loss(objective.annotate(Batch(columns))).value


def agree(objective, columns, theirs, tolerance=1e-12, wrt=None):
    """The same loss and the same gradient with respect to the log-probabilities, or the logits they were made from."""
    wrt = columns["logp"] if wrt is None else wrt
    mine = ours(objective, columns)
    close(mine, theirs, tolerance)
    close(*torch.autograd.grad(mine, wrt), *torch.autograd.grad(theirs, wrt), tolerance)


DPO = {                                                       # TRL loss: our recipe, TRL's settings, tolerance
    "sigmoid": (recipes.dpo(beta=0.3), dict(beta=0.3), 1e-12),
    "hinge": (recipes.hinge(beta=0.3), dict(beta=0.3), 1e-12),
    "ipo": (recipes.ipo(tau=0.3), dict(beta=0.3), 1e-12),
    "exo_pair": (recipes.exo(beta=0.3, label_smoothing=0.01), dict(beta=0.3, label_smoothing=0.01), 1e-7),   # float32 logs
    "nca_pair": (recipes.nca(beta=0.3), dict(beta=0.3), 1e-12),
    "robust": (recipes.rdpo(beta=0.3, flip=0.2), dict(beta=0.3, label_smoothing=0.2), 1e-12),
    "bco_pair": (recipes.bco_pair(beta=0.3), dict(beta=0.3), 1e-12),
    "sppo_hard": (recipes.sppo_hard(beta=0.3), dict(beta=0.3), 1e-12),
    "aot": (recipes.aot(beta=0.3, label_smoothing=0.1), dict(beta=0.3, label_smoothing=0.1), 1e-12),
    "aot_unpaired": (recipes.aot_unpaired(beta=0.3, label_smoothing=0.1), dict(beta=0.3, label_smoothing=0.1), 1e-12),
    "apo_zero": (recipes.apo_zero(beta=0.3), dict(beta=0.3), 1e-12),
    "apo_down": (recipes.apo_down(beta=0.3), dict(beta=0.3), 1e-12),
    "discopop": (recipes.discopop(beta=0.3, tau=0.5), dict(beta=0.3, discopop_tau=0.5), 1e-12),
    "sigmoid_norm": (recipes.dpo_norm(beta=0.3), dict(beta=0.3), 1e-12),
}


@pytest.mark.parametrize("loss", DPO)
def test_dpo_losses(loss):
    objective, settings, tolerance = DPO[loss]
    columns, inputs = step()
    agree(objective, columns, trl_dpo(columns, inputs, [loss], **settings), tolerance)


@pytest.mark.parametrize("name, recipe", [("forward_kl", recipes.dpo_forward_kl), ("js_divergence", recipes.dpo_js)])
@pytest.mark.parametrize("loss", ["sigmoid", "hinge"])
def test_f_divergences(name, recipe, loss):
    columns, inputs = step()
    objective = recipe(beta=0.3)
    if loss == "hinge":
        objective = objective.with_slots(ranking=recipes.hinge().ranking)
    agree(objective, columns, trl_dpo(columns, inputs, [loss], beta=0.3, f_divergence_type=name), 1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_alpha_divergence(alpha):
    """TRL computes this branch in float32 (and refuses float64), as our docstring says."""
    settings = dict(beta=0.3, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha)
    columns, inputs = step(torch.float32)
    agree(recipes.dpo_alpha(beta=0.3, alpha=alpha), columns, trl_dpo(columns, inputs, ["sigmoid"], **settings), 1e-6)
    if alpha != 1.0:
        with pytest.raises(KeyError):
            trl_dpo(*step(torch.float64), ["sigmoid"], **settings)


def test_label_smoothing_is_ignored_by_sigmoid():
    """TRL's `sigmoid` has no cDPO, as the docstring of `dpo` says."""
    columns, inputs = step()
    plain, smooth = (trl_dpo(columns, inputs, ["sigmoid"], label_smoothing=eps) for eps in (0.0, 0.2))
    assert torch.equal(plain, smooth)
    assert (ours(recipes.dpo(label_smoothing=0.2), columns) - smooth).abs() > 1e-3
    assert "TRL 1.16 ignores it" in recipes.dpo.__doc__


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_length_desensitised(alpha):
    columns, inputs = step()
    agree(recipes.ld_dpo(beta=0.3, alpha=alpha), columns, trl_dpo(columns, inputs, ["sigmoid"], beta=0.3, ld_alpha=alpha))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_wpo_weights(loss):
    columns, inputs = step()
    objective = DPO[loss][0].with_slots(pair_weight=pair_weights.on_policy)
    agree(objective, columns, trl_dpo(columns, inputs, [loss], beta=0.3, use_weighting=True))
    if loss == "sigmoid":
        agree(recipes.wpo(beta=0.3), columns, trl_dpo(columns, inputs, [loss], beta=0.3, use_weighting=True))


def test_sft_and_weighted_sums_of_losses():
    """`sft` is one mean over all chosen tokens; `rpo_mean` takes a mean over responses: alike at equal lengths."""
    columns, inputs = step()
    theirs = partial(trl_dpo, losses=["sigmoid", "sft"], weights=[1.0, 0.7], beta=0.3)

    def chosen_tokens(mask, relevance, real):
        return (mask.bool() & (real & (relevance > 0.5))[..., None]).double()

    token_mean = Term(regularisers.token_nll, 0.7, reduce=term_mean, terms=chosen_tokens)
    agree(recipes.dpo(beta=0.3).with_slots(regularisers={"sft": token_mean}), columns, theirs(columns, inputs))
    assert (ours(recipes.rpo_mean(beta=0.3, alpha=0.7), columns) - theirs(columns, inputs)).abs() > 1e-3
    assert "TRL and OpenRLHF take one mean over all chosen tokens" in regularisers.best_mean_nll.__doc__
    even, even_inputs = step(lengths=torch.full((2 * PAIRS,), 4))
    agree(recipes.rpo_mean(beta=0.3, alpha=0.7), even, theirs(even, even_inputs))


def trl_kto(columns, table, table_ref, kl_rows, **settings):
    from trl.trainer.kto_trainer import KTOTrainer
    n = len(columns["mask"])
    prompt = torch.zeros(n, 1, dtype=torch.bool)
    rows = lambda ids, mask: (ids[:, None].expand(n, T + 1), torch.cat([~prompt, mask], 1).long(),
                              torch.cat([prompt, mask], 1).long())
    (ids, attend, completion), (kl_ids, kl_attend, kl_completion) = (
        rows(torch.arange(n), columns["mask"]), rows(kl_rows, settings.pop("kl_mask")))
    inputs = {"input_ids": ids, "attention_mask": attend, "completion_mask": completion, "label": columns["relevance"] > 0.5,
              "KL_input_ids": kl_ids, "KL_attention_mask": kl_attend, "KL_completion_mask": kl_completion}
    defaults = dict(loss_type="kto", calculate_KL=True, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0,
                    precompute_ref_logps=False, ref_model=Lookup(table_ref))
    return bare(KTOTrainer, **{**defaults, **settings})._compute_loss(Lookup(table), inputs, False)


@pytest.mark.parametrize("shift", [2.0, -2.0], ids=["baseline above 0", "baseline clamped to 0"])
def test_kto(shift):
    """Unpaired rows; the mismatched responses are rows of their own in both models' tables."""
    columns, _ = step()
    n = 2 * PAIRS
    g = torch.Generator().manual_seed(5)
    columns["group"] = torch.randperm(n, generator=g)
    columns["relevance"] = (torch.arange(n) % 3 > 0).double()
    other, other_ref = (-torch.rand(n, T, generator=g, dtype=torch.float64) for _ in range(2))
    other = other + shift
    kl_mask = columns["mask"].roll(1, 0)
    columns["mismatched"] = ((other - other_ref) * kl_mask).sum(1)
    theirs = trl_kto(columns, torch.cat([columns["logp"], other]), torch.cat([columns["logp_ref"], other_ref]),
                     torch.arange(n) + n, kl_mask=kl_mask, beta=0.3, desirable_weight=1.2, undesirable_weight=0.9)
    agree(recipes.kto(beta=0.3, desirable=1.2, undesirable=0.9), columns, theirs)


def test_apo_zero_unpaired():
    """The unpaired variant is the same loss of a response, averaged over responses."""
    columns, _ = step()
    columns["relevance"] = (torch.arange(2 * PAIRS) % 3 > 0).double()
    theirs = trl_kto(columns, columns["logp"], columns["logp_ref"], torch.arange(2 * PAIRS), kl_mask=columns["mask"],
                     beta=0.3, loss_type="apo_zero_unpaired", calculate_KL=False)
    agree(recipes.apo_zero(beta=0.3).with_slots(reduce=term_mean), columns, theirs)


def from_logits(lengths):
    """Pairs with logits after one prompt token: columns for us; a batch, a model and its logits for TRL's older trainers."""
    g = torch.Generator().manual_seed(2)
    n, vocabulary = 2 * PAIRS, 7
    logits = torch.randn(n, T + 1, vocabulary, generator=g, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(1, vocabulary, (n, T + 1), generator=g)
    mask = torch.arange(T) < lengths[:, None]
    logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    columns = {"logp": logp, "mask": mask, "group": torch.arange(n) % PAIRS,
               "relevance": (torch.arange(n) < PAIRS).double()}
    first = torch.ones(n, 1, dtype=torch.bool)
    attend = torch.cat([first, mask], 1)
    labels = torch.where(torch.cat([~first, mask], 1), ids, -100)
    batch = {f"{side}_{key}": value[part] for side, part in (("chosen", slice(PAIRS)), ("rejected", slice(PAIRS, n)))
             for key, value in (("input_ids", ids), ("attention_mask", attend.long()), ("labels", labels))}
    return columns, batch, lambda input_ids, **_: SimpleNamespace(logits=logits[:, :input_ids.shape[1]]), logits


EQUAL, RAGGED = torch.full((2 * PAIRS,), 4), torch.tensor([T, 3, 2, 5, 1, 2, 3, T, 1, 4])
EVEN_CHOSEN = torch.where(torch.arange(2 * PAIRS) < PAIRS, 4, RAGGED)


@pytest.mark.parametrize("lengths, sft", [(RAGGED, 0.0), (EVEN_CHOSEN, 0.6)], ids=["ragged", "with sft, chosen even"])
def test_simpo(lengths, sft):
    """CPO-SimPO. Its NLL is one mean over all chosen tokens, so the sft term is compared at equal chosen lengths."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    columns, batch, model, logits = from_logits(lengths)
    trainer = bare(CPOTrainer, beta=2.0, simpo_gamma=0.8, alpha=0.0, label_smoothing=0.1, loss_type="simpo", cpo_alpha=sft,
                   is_encoder_decoder=False, pad_token_id=0)
    theirs, _ = trainer.get_batch_loss_metrics(model, batch)
    objective = recipes.simpo(beta=2.0, gamma_beta_ratio=0.4, label_smoothing=0.1, sft=sft)
    agree(objective, columns, theirs, wrt=logits)


@pytest.mark.parametrize("loss, recipe", [("hinge", recipes.rso_hinge(gamma=0.3)),
                                          ("sigmoid", recipes.cpl(alpha=0.3, bias=1.0))])
def test_cpo(loss, recipe):
    """CPO's losses are those of log-probabilities without a reference."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    columns, batch, model, logits = from_logits(RAGGED)
    trainer = bare(CPOTrainer, beta=0.3, alpha=0.0, label_smoothing=0.0, loss_type=loss, cpo_alpha=0.0,
                   is_encoder_decoder=False, pad_token_id=0)
    theirs, _ = trainer.get_batch_loss_metrics(model, batch)
    agree(recipe, columns, theirs, wrt=logits)


def test_orpo():
    """TRL's NLL includes the prompt (one token, not predicted here) and is one mean over tokens; its odds are float32."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    settings = dict(beta=0.25, is_encoder_decoder=False, padding_value=0)
    columns, batch, model, logits = from_logits(EVEN_CHOSEN)
    theirs, _ = bare(ORPOTrainer, **settings).get_batch_loss_metrics(model, batch)
    agree(recipes.orpo(weight=0.25), columns, theirs, 1e-6, wrt=logits)
    columns, batch, model, logits = from_logits(RAGGED)
    theirs, _ = bare(ORPOTrainer, **settings).get_batch_loss_metrics(model, batch)
    assert (ours(recipes.orpo(weight=0.25), columns) - theirs).abs() > 1e-3
    assert "the NLL is a mean over responses" in recipes.orpo.__doc__
