"""Judge a trained policy on preference data: the measurements of training, on any model folder and any file."""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from prefopt.config import Run, make, override
from prefopt.findings import exists

METRICS = {
    "loss": "loss of the recipe",
    "reward": "reward of sampled responses",
    "reward/std": "its standard deviation over responses",
    "pass@1": "sampled responses with a reward above 1/2",
    "length": "tokens of a response",
    "truncated": "responses that the limit cut",
    "unscored": "responses without a reward",
    "groups/contrast": "prompts whose responses differ in reward",
    "entropy": "entropy of the next token, in nats",
    "kl/old": "estimate of KL(policy before the rollout || policy) per token",
    "gap/rollout": "mean difference between the sampler's and the trainer's log-probability",
    "clip/high": "tokens above the clip range that gain nothing more",
    "clip/low": "tokens below the clip range that lose nothing more",
    "ratio/mean": "mean importance ratio",
    "ratio/effective": "effective sample size of the ratios, as a share",
    "advantage/size": "mean size of an advantage",
    "loss/ranking": "its ranking loss alone",
    "accuracy": "pairs whose preferred response has the higher score",
    "accuracy/length_controlled": "the same, longer and shorter preferred responses weighing alike",
    "margin": "score of the preferred minus score of the other response",
    "score/chosen": "score of the preferred response (implicit reward)",
    "score/rejected": "score of the other response",
    "score/desirable": "score of responses marked good",
    "score/undesirable": "score of responses marked bad",
    "ranking/policy": "pairs that the policy's log-probabilities rank as labelled",
    "ranking/policy_per_token": "the same with log-probabilities per token",
    "ranking/reference": "the same with the reference's log-probabilities",
    "ranking/idealised_min": "the same for the optimum of DPO, least over beta 0.01 to 10",
    "ranking/idealised_median": "the same for the optimum of DPO, median over beta",
    "ranking/idealised_max": "the same for the optimum of DPO, largest over beta",
    "ranking/gap": "idealised median minus the policy's",
    "kl/ref": "KL(reference || policy) per token, over the whole vocabulary",
    "logp/chosen": "log-probability of the preferred response",
    "logp/rejected": "log-probability of the other response",
    "shift/chosen": "what the preferred response gained on the reference",
    "shift/rejected": "what the other response gained on the reference",
    "displaced": "pairs whose margin grew while the preferred response lost",
    "length/chosen_longer": "pairs whose preferred response is longer",
    "grad_norm": "norm of the gradient before clipping"}


MAIN = ("loss", "reward", "pass@1", "length", "truncated", "unscored", "groups/contrast", "entropy", "kl/old", "accuracy",
        "accuracy/length_controlled", "margin", "ranking/policy", "ranking/reference", "ranking/idealised_median", "kl/ref",
        "shift/chosen", "shift/rejected", "displaced", "grad_norm")


def described(metric: str) -> str:
    """What a metric means, in a line.

    >>> described("margin"), described("loss/sft")
    ('score of the preferred minus score of the other response', 'the term sft')
    """
    more = {"loss/": "the term {}", "reward/": "its component {}", "pass@": "prompts with one such response among {}"}
    term = next((text.format(metric.removeprefix(head)) for head, text in more.items() if metric.startswith(head)), "")
    return METRICS.get(metric, term)


def plan(model: str, *, data: str | None = None, recipe: str | None = None, reference: str | None = None,
         overrides: list[str] = ()) -> Run:
    """The settings of an evaluation. What is not given comes from the run that trained the model, if `model` is a run
    folder or its `model`: recipe, departures, the policy it started from as reference, held-out data.

    Raises ValueError for a folder that is not there, no data, and a recipe that needs a reference without one.
    """
    exists("MODEL", model)
    folder = Path(model)
    home = next((p for p in (folder, folder.parent) if (p / "versions.json").exists()), None)
    raw = yaml.safe_load((home / "run.yaml").read_text(encoding="utf-8")) if home else {}
    folder = folder / "model" if home == folder else folder
    if not folder.exists() and home:
        raise ValueError(f"{home} holds a run but no model: it was not finished. Go on with it (prefopt train "
                         f"--resume), or give one of its checkpoints (checkpoints/step-.../model)")
    read, start = raw.get("data", {}), raw.get("policy", {})
    held_out = data or read.get("eval")
    if not held_out:
        raise ValueError("no data to evaluate on: give a file of preference data with --data")
    if data:                                                  # which may be of another format than the run's
        read = {k: read[k] for k in ("max_prompt", "max_response", "max_length", "encoding") if k in read}
    same = recipe in (None, raw.get("recipe"))
    run = make(override({
        "recipe": recipe or raw.get("recipe") or "dpo", "set": raw.get("set", {}) if same else {},
        "policy": {**start, "name": str(folder), "revision": None, "lora": None},
        "reference": reference or raw.get("reference") or (start and {**start, "lora": None}) or adapter_base(folder),
        "tokenizer": raw.get("tokenizer"), "train": {**raw.get("train", {}), "shard": False},
        "data": {**read, "train": held_out, "eval": held_out, "cache_reference": False}}, overrides), "evaluation")
    from prefopt.forward import frozen_models
    if frozen_models(run.objective().reads()) and run.reference is None:
        raise ValueError(f"{run.recipe} compares the policy with its reference: say which model training started from, "
                         f"with --reference MODEL, or choose a recipe without one, such as --recipe simpo")
    return run


def adapter_base(folder: Path) -> str | None:
    """The model below an adapter folder."""
    path = folder / "adapter_config.json"
    return json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"] if path.exists() else None


def evaluate(run: Run) -> dict[str, float]:
    """Metrics of `run.policy` on `run.data.eval`, as training measures them (see METRICS)."""
    from transformers.utils.logging import disable_progress_bar

    from prefopt import setup
    from prefopt.checkpoints import read_parts
    from prefopt.folder import dataset
    from prefopt.held_out import evaluate
    from prefopt.models import check_head
    disable_progress_bar()
    accelerator = setup.accelerator(run)
    objective = run.objective()
    check_head(run.policy.name, objective)
    tokenizer = setup.tokenizer(run, objective)
    with TemporaryDirectory() as cache:
        data = dataset(run.model_copy(update={"data": run.data.model_copy(update={"cache": cache})}), tokenizer, True)
        models = setup.load_models(run, objective, tokenizer, None, accelerator.device)
        read_parts(Path(run.policy.name), objective)
        found = evaluate(models, objective, data, run, accelerator)
    return {key.removeprefix("eval/"): value for key, value in found.items()}


def ordered(found: Mapping[str, float]) -> dict[str, float]:
    """Metrics in the order of METRICS, terms of the loss behind it, others at the end."""
    terms = sorted(k for k in found if k.startswith(("loss/", "reward/", "pass@")) and k not in METRICS)
    order = [*list(METRICS)[:2], *terms, *list(METRICS)[2:], *sorted(set(found) - set(METRICS) - set(terms))]
    return {k: found[k] for k in order if k in found}
