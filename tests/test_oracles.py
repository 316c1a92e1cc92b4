"""Every recipe against an independent version: plain loops over rows, pairs and tokens, written from the equations."""
import inspect
import math

import pytest
import torch
from columns_for_tests import OFF_POLICY, SETTINGS, close, columns_for, leaves, objective_for, outcome

from data_tools import Batch
from prefopt import recipes


def ls(z):
    """log sigmoid, on numbers with gradient."""
    return -torch.log1p(torch.exp(-z)) if z > 0 else z - torch.log1p(torch.exp(z))


def sigma(z):
    return 1 / (1 + torch.exp(-z))


class Rows:
    """Columns of one step, read one row, one token at a time."""

    def __init__(self, columns):
        self.c = columns
        self.groups = {}
        for i, g in enumerate(columns["group"].tolist()):
            self.groups.setdefault(g, []).append(i)
        self.psi = columns["relevance"].tolist()

    def tokens(self, i, column="logp"):
        return [x for x, m in zip(self.c[column][i], self.c["mask"][i].tolist(), strict=True) if m]

    def lp(self, i):
        return sum(self.tokens(i), torch.zeros((), dtype=torch.float64))

    def lr(self, i):
        return sum(self.tokens(i, "logp_ref"), torch.zeros((), dtype=torch.float64))

    def rho(self, i):
        return self.lp(i) - self.lr(i)

    def length(self, i):
        return max(1, len(self.tokens(i)))

    def alp(self, i):
        return self.lp(i) / self.length(i)

    def labelled(self, group):
        return [i for i in group if not math.isnan(self.psi[i])]

    def pairs(self, group):
        return [(w, j) for w in group for j in group if self.psi[w] > self.psi[j]]

    def best(self, group):
        top = max(self.psi[i] for i in self.labelled(group))
        return [i for i in self.labelled(group) if self.psi[i] == top]

    def pair_mean(self, loss, keep=lambda w, j: True):
        """Mean over a group's pairs, then over the groups that have any."""
        means = []
        for group in self.groups.values():
            losses = [loss(w, j) for w, j in self.pairs(group) if keep(w, j)]
            if losses:
                means.append(sum(losses) / len(losses))
        return sum(means) / len(means)

    def group_mean(self, loss):
        """Mean over groups that hold a labelled row."""
        groups = [g for g in self.groups.values() if self.labelled(g)]
        return sum(loss(g) for g in groups) / len(groups)

    def row_mean(self, loss):
        rows = [i for g in self.groups.values() for i in self.labelled(g)]
        return sum(loss(i) for i in rows) / len(rows)


def smoothed(z, eps):
    return -(1 - eps) * ls(z) - eps * ls(-z)


def logistic(score):
    """The recipes that are DPO with another score of a response."""
    return lambda r, beta, label_smoothing=0.0, **s: r.pair_mean(
        lambda w, j: smoothed(beta * (score(r, w, **s) - score(r, j, **s)), label_smoothing))


def best_nll(r, per_token):
    def one(group):
        best = r.best(group)
        return -sum(r.alp(i) if per_token else r.lp(i) for i in best) / len(best)
    return r.group_mean(one)


def rho_desensitised(r, i, alpha):
    group = next(g for g in r.groups.values() if i in g)
    shared = min(len(r.tokens(j)) for j in r.labelled(group))
    each = [p - q for p, q in zip(r.tokens(i), r.tokens(i, "logp_ref"), strict=True)]
    return sum(each[:shared]) + alpha * sum(each[shared:])


def simpo(r, beta, gamma_beta_ratio, label_smoothing, sft):
    z = lambda w, j: beta * (r.alp(w) - r.alp(j) - gamma_beta_ratio)
    both = lambda w, j: r.tokens(w) and r.tokens(j)
    return r.pair_mean(lambda w, j: smoothed(z(w, j), label_smoothing), both) + sft * best_nll(r, True)


def log1mexp(a):
    return torch.log(1 - torch.exp(torch.minimum(a, torch.tensor(-1e-6, dtype=a.dtype))))


def orpo(r, weight):
    odds = lambda i: r.alp(i) - log1mexp(r.alp(i))
    return best_nll(r, True) - weight * r.pair_mean(lambda w, j: ls(odds(w) - odds(j)))


def all_tokens(r):
    return [t for g in r.groups.values() for i in r.labelled(g) for t in r.tokens(i)]


def cpl(r, alpha, bias, bc, score=Rows.lp):
    contrast = r.pair_mean(lambda w, j: -ls(alpha * (score(r, w) - bias * score(r, j))))
    return contrast - bc * sum(all_tokens(r)) / len(all_tokens(r))


def exo(r, beta, label_smoothing):
    def one(w, j):
        z, eps = beta * (r.rho(w) - r.rho(j)), label_smoothing
        return sigma(z) * (ls(z) - math.log(1 - eps)) + sigma(-z) * (ls(-z) - math.log(eps))
    return r.pair_mean(one)


def discopop(r, beta, tau):
    def one(w, j):
        z = beta * (r.rho(w) - r.rho(j))
        return (1 - sigma(z / tau)) * -ls(z) + sigma(z / tau) * torch.exp(-z)
    return r.pair_mean(one)


def sorted_by(pairs, key):
    return sorted(pairs, key=lambda p: float(key(*p).detach()))


def aot(r, beta, label_smoothing):
    pairs = [p for g in r.groups.values() for p in r.pairs(g)]
    policy = [r.lp(w) - r.lp(j) for w, j in sorted_by(pairs, lambda w, j: r.lp(w) - r.lp(j))]
    reference = [r.lr(w) - r.lr(j) for w, j in sorted_by(pairs, lambda w, j: r.lr(w) - r.lr(j))]
    return sum(smoothed(beta * (p - q), label_smoothing) for p, q in zip(policy, reference, strict=True)) / len(pairs)


def aot_unpaired(r, beta, label_smoothing):
    ranked = sorted(range(len(r.psi)), key=lambda i: float(r.rho(i).detach()))
    good, bad = ([i for i in ranked if r.psi[i] == label] for label in (1, 0))
    z = [beta * (r.rho(w) - r.rho(j)) for w, j in zip(good, bad, strict=True)]
    return sum(smoothed(x, label_smoothing) for x in z) / len(z)


def smpo(r, beta, tau, scale):
    reward = r.c["reward"].tolist()
    p = lambda w, j: 1 / (1 + math.exp(-(reward[w] - reward[j]) / tau))
    return r.pair_mean(lambda w, j: -ls(scale * (2 * p(w, j) - 1) * beta * (r.rho(w) - r.rho(j))))


def wpo(r, beta, label_smoothing):
    def u(i):
        each = [float(p.detach()) - float(c) for p, c in zip(r.tokens(i), r.tokens(i, "collision"), strict=True)]
        return math.exp(sum(each) / max(1, len(each)))
    return r.pair_mean(lambda w, j: u(w) * u(j) * smoothed(beta * (r.rho(w) - r.rho(j)), label_smoothing))


def kto(r, beta, desirable, undesirable):
    z0 = max(0.0, sum(r.c["mismatched"].tolist()) / len(r.psi))
    return r.row_mean(lambda i: desirable * (1 - sigma(beta * (r.rho(i) - z0))) if r.psi[i] > 0.5
                      else undesirable * (1 - sigma(beta * (z0 - r.rho(i)))))


def bco(r, beta):
    delta = sum(float(beta * r.rho(i).detach()) for i in range(len(r.psi))) / len(r.psi)
    return r.row_mean(lambda i: -ls(beta * r.rho(i) - delta) if r.psi[i] > 0.5 else -ls(delta - beta * r.rho(i)))


def of_pair(loss):
    """A function of the two scores, mean over pairs."""
    return lambda r, beta: r.pair_mean(lambda w, j: loss(r.rho(w), r.rho(j), beta))


def of_list(loss):
    """A function of the labels and scores of a list, mean over lists."""
    return lambda r, beta: r.group_mean(lambda g: loss([r.psi[i] for i in g], [beta * r.rho(i) for i in g]))


def ordered_pairs(psi):
    return [(i, j) for i in range(len(psi)) for j in range(len(psi)) if psi[i] > psi[j]]


ZERO = torch.zeros((), dtype=torch.float64)


def lambda_loss(psi, s):
    order = sorted(range(len(s)), key=lambda i: -float(s[i].detach()))
    rank = {i: k + 1 for k, i in enumerate(order)}
    gain = lambda i: 2 ** psi[i] - 1
    delta = lambda i, j: abs(gain(i) - gain(j)) * abs(1 / math.log2(1 + rank[i]) - 1 / math.log2(1 + rank[j]))
    return sum((delta(i, j) * -ls(s[i] - s[j]) for i, j in ordered_pairs(psi)), ZERO)


def list_mle(psi, s):
    order = sorted(range(len(s)), key=lambda i: -psi[i])
    return -sum((s[i] - torch.log(sum(torch.exp(s[j]) for j in order[k:])) for k, i in enumerate(order)), ZERO)


def log_softmax(s):
    return [x - torch.log(sum(torch.exp(y) for y in s)) for x in s]


def net(share):
    def loss(psi, s):
        shares = share(psi)
        return -sum((shares[i] * x for i, x in enumerate(log_softmax(s))), ZERO)
    return loss


def in_context(r, beta):
    def one(group):
        n, total = len(group), ZERO
        if n == 1:
            return total
        score = {i: beta * (r.alp(i) - r.lr(i) / r.length(i)) for i in group}
        for i in group:
            q = torch.log(sum(torch.exp(score[j] - score[i]) for j in group if j != i)) - math.log(n - 1)
            total = total - (2 ** r.psi[i] - 1) / math.log2(1 + int(r.c["position"][i])) * ls(-q) / n
        return total
    return r.group_mean(one)


def trpa(r, beta, factor, kappa):
    u = lambda i: (r.lp(i) - r.lr(i)) / r.length(i)
    pairs = [p for g in r.groups.values() for p in r.pairs(g)]
    losses = [-ls((factor if r.psi[w] == -1 else 1.0) * beta * (u(w) - u(j))) for w, j in pairs]
    d = [old - new for i in range(len(r.psi)) for old, new in zip(r.tokens(i, "logp_old"), r.tokens(i), strict=True)]
    return sum(losses) / len(losses) + kappa * sum(torch.exp(x) - x - 1 for x in d) / len(d)


def masked_pair(r, beta, mu, md):
    """SparsePO: U and D over response tokens, with masks given as functions of row and token position."""
    def sums(i):
        at = [t for t, m in enumerate(r.c["mask"][i].tolist()) if m]
        u = sum((mu(i, t) * (r.c["logp"][i, t] - r.c["logp_ref"][i, t]) for t in at), ZERO)
        return u, sum((md(i, t) * r.c["token_kl"][i, t] for t in at), ZERO)

    def one(w, j):
        (u_w, d_w), (u_l, d_l) = sums(w), sums(j)
        return -ls(beta * ((u_w - u_l) - (d_l - d_w)))
    return r.pair_mean(one)


def learned(module, states):
    """`simple_all` at one token: LayerNorm, a linear layer and relu for each layer, then a linear layer and relu."""
    out = ZERO
    for layer, h in enumerate(states):
        x = (h - h.mean()) / torch.sqrt(((h - h.mean()) ** 2).mean() + module.norm.eps)
        inner = sum(module.inner[layer] * (x * module.norm.weight + module.norm.bias)) + module.bias[layer]
        out = out + module.outer[layer] * torch.relu(inner)
    return torch.relu(out)


def sparsepo(r, modules, beta, l1_reward, l1_kl, **_):
    mu, md = (lambda i, t, m=m: learned(m, r.c["states_ref"][i, t]) for m in (modules[0], modules[-1]))
    norm = lambda f: r.group_mean(lambda g: sum(
        abs(f(i, t)) for i in r.labelled(g) for t, m in enumerate(r.c["mask"][i].tolist()) if m))
    half = 0.5 if len(modules) == 1 else 1.0                  # a common mask halves both coefficients
    return masked_pair(r, beta, mu, md) + half * l1_reward * norm(mu) + half * l1_kl * norm(md)


def dpo(r, beta):
    return logistic(Rows.rho)(r, beta)


def hypo(r, beta, kl):
    prompts = []
    for group in r.groups.values():
        fresh = [i for i in group if r.c["online"][i]]
        kappa = {i: float(r.rho(i).detach()) for i in fresh}
        if fresh:
            others = lambda i, fresh=fresh, kappa=kappa: [kappa[j] for j in fresh if j != i]
            advantage = {i: kappa[i] - sum(others(i)) / max(1, len(fresh) - 1) for i in fresh}
            prompts.append(sum(advantage[i] * r.lp(i) for i in fresh) / len(fresh))
    return dpo(r, beta) + kl * sum(prompts) / len(prompts)


def rationale(r, beta, gamma):
    return dpo(r, beta) + r.group_mean(lambda g: sum((-gamma * r.lp(i) for i in g if r.c["rationale"][i]), ZERO))


def rationale_released(r, beta, gamma):
    return dpo(r, beta) + r.group_mean(lambda g: sum((-ls(gamma * r.lp(i)) for i in g if r.c["rationale"][i]), ZERO))


def mapl(r, beta, intra, inter):
    level = r.c["level"].tolist()
    one = lambda w, j: -ls(beta * (r.rho(w) - r.rho(j)))
    of = lambda n: r.pair_mean(one, lambda w, j: level[w] == level[j] == n)
    fours = [g for g in r.groups.values() if any(r.c["contrast"][i] for i in g)]
    gap = lambda g: sum(int(r.c["contrast"][i]) * beta * r.rho(i) for i in g)
    return of(0) + intra * of(1) + inter * sum(-ls(gap(g)) for g in fours) / len(fours)


def degree(r, modules, beta, gamma, degrees):
    head, total = modules[0], dpo(r, beta)
    for side in (1, 0):
        rows = [i for i in range(len(r.psi)) if r.c["side"][i] == side]
        logits = [[sum(head.weight[m] * r.c["last_state"][i]) + head.bias[m] for m in range(degrees)] for i in rows]
        total = total + gamma * sum(-log_softmax(z)[r.c["degree"][i]] for i, z in zip(rows, logits, strict=True)) / len(rows)
    return total


def optimistic(r, beta):
    return r.pair_mean(lambda w, j: -ls(beta * ((r.lp(w) - r.lp(j)) - max(0.0, float(r.lr(w) - r.lr(j))))))


def alpha_score(r, i, alpha):
    return (torch.exp((alpha - 1) * r.rho(i)) - 1) / (alpha - 1)


# ------------------------------------------------------------------------------------------- reward models
def output(r, i, k=0):
    return r.c["outputs"][i][k]


def bradley_terry(r, label_smoothing, target, centring):
    def one(w, j):
        gap = output(r, w) - output(r, j) - target * (r.psi[w] - r.psi[j])
        return smoothed(gap, label_smoothing) + centring * (output(r, w) + output(r, j)) ** 2
    return r.pair_mean(one)


def with_ties(r, modules, nu):
    nu, means = torch.exp(modules[0].log_nu), []
    for group in r.groups.values():
        losses = []
        for a, i in enumerate(group):
            for j in group[:a]:
                s_i, s_j = output(r, i), output(r, j)
                shares = torch.exp(s_i), torch.exp(s_j), nu * torch.exp((s_i + s_j) / 2)
                happened = 2 if r.psi[i] == r.psi[j] else 0 if r.psi[i] > r.psi[j] else 1
                losses.append(-torch.log(shares[happened] / sum(shares)))
        if losses:
            means.append(sum(losses) / len(losses))
    return sum(means) / len(means)


def ordinal(r, modules, levels, tie):
    def one(i):
        reached = [1, *(sigma(output(r, i, k) - modules[0].thresholds[k]) for k in range(levels - 1)), 0]
        y = int(r.psi[i])
        kept = reached[y] - reached[y + 1]
        if kept <= 0:                                         # crossed
            kept = reached[y] * (1 - reached[y + 1]) * -math.expm1(-1e-6)
        return -torch.log(kept) + tie * sum(abs(output(r, i, k) - output(r, i, k - 1)) for k in range(1, levels - 1))
    return r.row_mean(one)


def gaussian(r, entropy, least):
    s = lambda i: torch.exp(output(r, i, 1))
    link = lambda w, j: torch.sqrt(1 + math.pi * (s(w) ** 2 + s(j) ** 2) / 8)
    entropy_of = lambda s: 0.5 * torch.log(2 * math.pi * math.e * s ** 2)
    floor = r.row_mean(lambda i: torch.relu(entropy_of(least + ZERO) - entropy_of(s(i))))
    return r.pair_mean(lambda w, j: -ls((output(r, w) - output(r, j)) / link(w, j))) + entropy * floor


def general_preference(r, dim, tau, modules=()):
    def gates(i):
        if not modules:
            return [1.0] * (dim // 2)
        logits = [sum(row * r.c["prompt_state"][i]) / math.sqrt(3) for row in modules[0].weight]
        return [dim // 2 * torch.exp(x) / sum(torch.exp(y) for y in logits) for x in logits]

    def embedding(i):
        v = r.c["outputs"][i]
        return v / torch.sqrt(sum(v ** 2))

    def one(w, j):
        v, u, total = embedding(w), embedding(j), ZERO
        for k, (g, h) in enumerate(zip(gates(w), gates(j), strict=True)):
            total = total + g * v[2 * k] * u[2 * k + 1] - h * v[2 * k + 1] * u[2 * k]
        return -ls(total / tau)
    return r.pair_mean(one)


def multi_objective(r, aspects):
    total, labels = ZERO, r.c["rewards"].tolist()
    for k in range(aspects):
        rows = [i for i in range(len(r.psi)) if not math.isnan(labels[i][k])]
        total = total + sum((output(r, i, k) - labels[i][k]) ** 2 for i in rows) / len(rows)
    return total


def multi_preference(r, aspects):
    total, labels = ZERO, r.c["rewards"].tolist()
    for k in range(aspects):
        means = []
        for group in r.groups.values():
            losses = [-ls(output(r, w, k) - output(r, j, k)) for w in group for j in group if labels[w][k] > labels[j][k]]
            means += [sum(losses) / len(losses)] if losses else []
        total = total + sum(means) / len(means)
    return total


def process(r):
    losses = [-a * ls(v) - (1 - a) * ls(-v) for i in range(len(r.psi)) for v, a in
              zip(r.tokens(i, "token_reward"), map(float, r.tokens(i, "step_label")), strict=True) if not math.isnan(a)]
    return sum(losses) / len(losses)


def written(r, segments):
    """Mean of -log pi over the tokens of these kinds of segments; 0 where there are none."""
    losses = [-lp for i in range(len(r.psi)) for lp, kind in zip(r.tokens(i), r.tokens(i, "segment"), strict=True)
              if int(kind) in segments]
    return sum(losses) / len(losses) if losses else ZERO


def graded(r, modules):
    head, = modules[0].weight

    def score(i):
        return sum(w * h for w, h in zip(head, r.c["last_state"][i], strict=True))
    return r.pair_mean(lambda w, j: -ls(score(w) - score(j)))


def tool_augmented(r, modules, alpha, beta, omega):
    return graded(r, modules) + alpha * (written(r, {1}) + beta * written(r, {2}) + omega * written(r, {3}))


def cross_entropy(r, score, desirable=1.0, undesirable=1.0):
    return r.row_mean(lambda i: -desirable * r.psi[i] * ls(score(i)) - undesirable * (1 - r.psi[i]) * ls(-score(i)))


def anyloss(r, amplification, beta):
    tp, fn, fp = ZERO, ZERO, ZERO
    for i, y in enumerate(r.psi):
        a = sigma(amplification * (sigma(output(r, i)) - 0.5))
        tp, fn, fp = tp + y * a, fn + y * (1 - a), fp + (1 - y) * a
    return 1 - (1 + beta ** 2) * tp / ((1 + beta ** 2) * tp + beta ** 2 * fn + fp)


def dice(r, alpha, smooth):
    p = [sigma(output(r, i)) for i in range(len(r.psi))]
    q = [(1 - x) ** alpha * x for x in p]
    return 1 - (2 * sum(x * y for x, y in zip(q, r.psi, strict=True)) + smooth) / (sum(q) + sum(r.psi) + smooth)


ORACLES = {
    "dpo": logistic(Rows.rho),
    "dpo_forward_kl": logistic(lambda r, i: 1 - torch.exp(-r.rho(i))),
    "dpo_js": logistic(lambda r, i: math.log(2) + ls(r.rho(i))),
    "dpo_alpha": logistic(alpha_score),
    "dpo_norm": logistic(lambda r, i: r.rho(i) / r.length(i)),
    "dpo_gamma": logistic(lambda r, i, gamma: r.lp(i) - gamma * r.lr(i)),
    "ipo": lambda r, tau: r.pair_mean(
        lambda w, j: (r.rho(w) / r.length(w) - r.rho(j) / r.length(j) - 1 / (2 * tau)) ** 2),
    "ipo_summed": lambda r, tau: r.pair_mean(lambda w, j: (r.rho(w) - r.rho(j) - 1 / (2 * tau)) ** 2),
    "rdpo": lambda r, beta, flip: r.pair_mean(
        lambda w, j: (-(1 - flip) * ls(beta * (r.rho(w) - r.rho(j))) + flip * ls(-beta * (r.rho(w) - r.rho(j))))
        / (1 - 2 * flip)),
    "hinge": of_pair(lambda w, j, beta: torch.relu(1 - beta * (w - j))),
    "slic": lambda r, delta, sft: r.pair_mean(lambda w, j: torch.relu(delta - r.lp(w) + r.lp(j))) + sft * best_nll(r, False),
    "rso": lambda r, gamma: dpo(r, gamma),
    "rso_hinge_norm": lambda r, gamma: r.pair_mean(lambda w, j: torch.relu(1 - gamma * (r.rho(w) - r.rho(j)))),
    "rso_hinge": lambda r, gamma: r.pair_mean(lambda w, j: torch.relu(1 - gamma * (r.lp(w) - r.lp(j)))),
    "rpo": lambda r, beta, eta: dpo(r, beta) + eta * beta * best_nll(r, False),
    "rpo_mean": lambda r, beta, alpha: dpo(r, beta) + alpha * best_nll(r, True),
    "simpo": simpo, "orpo": orpo, "cpl": cpl, "exo": exo, "discopop": discopop, "aot": aot, "smpo": smpo, "wpo": wpo,
    "cpl_kl": lambda r, **s: cpl(r, **s, score=Rows.rho),
    "apo_down": of_pair(lambda w, j, beta: sigma(beta * w) + 1 - sigma(beta * (w - j))),
    "ld_dpo": logistic(rho_desensitised),
    "tr_dpo": lambda r, beta, alpha, every: dpo(r, beta),
    "kto": kto, "bco": bco, "aot_unpaired": aot_unpaired,
    "bco_pair": of_pair(lambda w, j, beta: -ls(beta * w) - ls(-beta * j)),
    "nca": of_pair(lambda w, j, beta: -ls(beta * w) - 0.5 * ls(-beta * w) - 0.5 * ls(-beta * j)),
    "sppo_hard": of_pair(lambda w, j, beta: (w - 1 / (2 * beta)) ** 2 + (j + 1 / (2 * beta)) ** 2),
    "apo_zero": of_pair(lambda w, j, beta: 1 - sigma(beta * w) + sigma(beta * j)),
    "lipo": of_list(lambda psi, s: sum((-ls(s[i] - s[j]) for i, j in ordered_pairs(psi)), ZERO)),
    "lipo_hinge": of_list(lambda psi, s: sum((torch.relu(1 - (s[i] - s[j])) for i, j in ordered_pairs(psi)), ZERO)),
    "lipo_lambda": of_list(lambda_loss),
    "lipo_list_mle": of_list(list_mle),
    "lipo_softmax": of_list(net(lambda psi: [y / sum(psi) for y in psi])),
    "list_net": of_list(net(lambda psi: [math.exp(y) / sum(math.exp(z) for z in psi) for y in psi])),
    "lipo_point_mse": of_list(lambda psi, s: sum((y - x) ** 2 for y, x in zip(psi, s, strict=True))),
    "lipo_point_sigmoid": of_list(
        lambda psi, s: -sum(y * ls(x) + (1 - y) * ls(-x) for y, x in zip(psi, s, strict=True))),
    "irpo_ranking": in_context, "trpa": trpa, "hypo": hypo, "hypo_optimistic": optimistic, "rationale": rationale,
    "rationale_released": rationale_released, "mapl": mapl, "spo_degree": degree, "sparsepo": sparsepo,
    "sparsepo_independent": sparsepo,
    "tdpo": lambda r, beta: masked_pair(r, beta, lambda i, t: 1, lambda i, t: 1),
    "bradley_terry": bradley_terry, "bt_ties": with_ties, "ordinal": ordinal, "gaussian": gaussian,
    "bt_list": lambda r: r.group_mean(lambda g: list_mle([r.psi[i] for i in g], [output(r, i) for i in g])),
    "general_preference": general_preference, "gpm_gated": general_preference, "multi_objective": multi_objective,
    "multi_preference": multi_preference, "process": process, "anyloss": anyloss, "dice": dice,
    "outcome": lambda r: cross_entropy(r, lambda i: output(r, i)),
    "love": lambda r, **weights: cross_entropy(r, lambda i: output(r, i), **weights),
    "implicit_ce": lambda r, beta: cross_entropy(r, lambda i: beta * r.rho(i)),
    "implicit_dpo": dpo, "implicit_kto": kto,
    "implicit_nca": of_pair(lambda w, j, beta: -ls(beta * w) - 0.5 * ls(-beta * w) - 0.5 * ls(-beta * j)),
    "tool_augmented": tool_augmented,
    "tool_augmented_released": lambda r, modules, pair: pair * graded(r, modules) + written(r, {1, 2, 3}),
    "mapo": lambda r, beta: masked_pair(r, beta, *[lambda i, t: r.c["activation_mask"][i, t]] * 2),
}


# ---------------------------------------------------------------------------------------------- games, and rewards as labels
def unordered_mean(r, loss):
    """Mean over all pairs of a group's rows, then over the groups that have any; loss(i, j) = loss(j, i)."""
    means = []
    for group in r.groups.values():
        losses = [loss(i, j) for n, i in enumerate(group) for j in group[:n]]
        if losses:
            means.append(sum(losses) / len(losses))
    return sum(means) / len(means)


def every_row_mean(r, loss):
    return r.group_mean(lambda group: sum(loss(i) for i in group) / len(group))


def win_rates(r, beta):
    q = r.c["reward"].tolist()
    return unordered_mean(r, lambda i, j: (r.rho(i) - r.rho(j) - (q[i] - q[j]) / beta) ** 2)


def dno(r, beta):
    q = r.c["reward"].tolist()

    def one(i, j):
        w, z = 1 / (1 + math.exp(q[j] - q[i])), beta * (r.rho(i) - r.rho(j))
        return -w * ls(z) - (1 - w) * ls(-z)
    return unordered_mean(r, one)


def two_anchors(r, beta, anchor):
    old = lambda i: sum(float(x) for x in r.tokens(i, "logp_old"))
    score = lambda i: r.lp(i) - anchor * r.lr(i) - (1 - anchor) * old(i)
    return r.pair_mean(lambda w, j: (score(w) - score(j) - 1 / (2 * beta)) ** 2)


def xpo(r, beta, alpha):
    means = []
    for group in r.groups.values():
        reference = [r.lp(i) for i in group if bool(r.c["from_reference"][i])]
        means += [sum(reference) / len(reference)] if reference else []
    return dpo(r, beta) + alpha * sum(means) / len(means)


def copg(r, beta):
    def one(group):
        d = [r.psi[i] - beta * r.rho(i) for i in group]
        pairs = [(x - y) ** 2 for n, x in enumerate(d) for y in d[:n]]
        return sum(pairs) / (len(group) - 1) if pairs else torch.zeros((), dtype=torch.float64)
    return r.group_mean(one)


ORACLES |= {
    "online_dpo": ORACLES["dpo"], "copg": copg, "apo_accel": lambda r, beta, alpha, every: dpo(r, beta),
    **dict.fromkeys(("online_ipo", "ipo_md"), lambda r, beta: ORACLES["ipo_summed"](r, beta)),
    **dict.fromkeys(("egpo", "nash_md"), win_rates), "dno": dno, "inpo": two_anchors, "xpo": xpo,
    "sppo": lambda r, beta: every_row_mean(r, lambda i: (r.rho(i) - (float(r.c["reward"][i]) - 0.5) / beta) ** 2),
    "gpo": lambda r, beta, limit: every_row_mean(
        r, lambda i: (r.rho(i) - min(max(float(r.c["reward"][i]) / beta, -limit), limit)) ** 2),
    "gpo_offline": lambda r, beta, limit: r.pair_mean(lambda w, j: (r.rho(w) - r.rho(j) - limit) ** 2)}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", OFF_POLICY)                  # tests/test_policy.py has the loops of the others
def test_recipe_equals_its_loops(name, seed):
    columns = columns_for(name, seed=seed)
    objective = objective_for(name)
    with torch.no_grad():                                     # heads start at zero: move them
        for p in (p for m in objective.modules() for p in m.parameters()):
            p.add_(0.2 * torch.randn_like(p))
    value, gradients = outcome(objective, columns)

    wrt = {**leaves(columns), **{f"{i}.{k}": p for i, m in enumerate(objective.modules()) for k, p in m.named_parameters()}}
    settings = {k: p.default for k, p in inspect.signature(getattr(recipes, name)).parameters.items()}
    settings.update(SETTINGS.get(name, {}))
    if objective.modules():
        settings["modules"] = objective.modules()
    expected = ORACLES[name](Rows({**columns, **wrt}), **settings)
    keys = list(wrt)
    expected_gradients = torch.autograd.grad(expected, [wrt[k] for k in keys], allow_unused=True)
    close(value, expected.detach(), 1e-11)
    for key, gradient in zip(keys, expected_gradients, strict=True):
        close(gradients[key], torch.zeros_like(wrt[key]) if gradient is None else gradient, 1e-11)


def test_the_step_of_the_oracle_is_not_trivial():
    """The random steps hold what they should: an empty response, holes in masks, lists of several sizes, ties."""
    columns = columns_for("dpo")
    lengths = columns["mask"].sum(1)
    assert int(lengths.min()) == 0 and len(lengths.unique()) > 3
    assert ((columns["mask"].long().diff(dim=1) > 0).any())
    assert sorted(set(torch.bincount(Batch(columns).index).tolist())) == [1, 2, 3, 4]
    assert (columns["logp"] - columns["logp_ref"]).abs().max() > 1
