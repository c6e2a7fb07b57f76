"""The mathematics, proven without the code under test.

Every preference loss, reward, penalty, alignment and LongPO equal closed forms written out here and evaluated in
400-digit decimal arithmetic; the preference losses also equal the host's own methods (TRL's `dpo_loss`, the host's
SimPO and ORPO). Gradients pass gradcheck, and values *and* gradients are finite and right in fp32 at the edges of
ORPO's odds. Why the losses are what they are is in test_theory.py.

The last part drives one step of the trainer on a tiny model against a loop written by hand.
"""

import itertools
import math
from decimal import Decimal, localcontext
from types import SimpleNamespace

import pytest
import torch
from by_hand import (
    BASE,
    POLICY,
    REFERENCE,
    STEP_TOLERANCE,
    STEPS,
    assert_gradients_close,
    by_hand_logps,
    by_hand_solopo,
    qwen2_float64,
    step,
    tiny_rows,
)

from solopo_plugin import losses

PREF_LOSSES = ("sigmoid", "ipo", "hinge", "simpo", "orpo")
KINDS = ("auto", "abs", "squared", "drop")
EPS32 = 2.0**-23  # distance of 1 to the next fp32 number: bounds the relative error of one faithfully rounded operation
LOG2 = math.log(2)

# Closed forms in float64 against 400 digits: at most ten roundings of 1.1e-16, each amplified by at most the exponent
# of exp (relative condition of -log sigma(z) at large z is z; |z| <= 2.5 * 150 below): 10 * 1.1e-16 * 375 = 4e-13.
# `abs` is the same for values near 0 that are differences of numbers of size 1 (ipo: 2 |d| * 10 * 1.1e-16 * 200).
CLOSE = dict(rel=1e-12, abs=1e-12)


# ---- the truth, in decimals. A float converts to Decimal exactly; 400 digits keep 1 + exp(-375) and 1 - exp(-1e-12)


def exact(function):
    """Evaluate a formula of Decimals at given floats, rounding once at the end."""

    def at(*numbers):
        with localcontext() as context:
            context.prec = 400
            return float(function(*(Decimal(float(x)) for x in numbers)))

    return at


def d_softplus(x: Decimal) -> Decimal:
    """log(1 + exp(x)) = -log sigma(-x), since sigma(-x) = 1 / (1 + exp(x))."""
    return (1 + x.exp()).ln()


def d_log_odds(x: Decimal) -> Decimal:
    """p = exp(x): log(p / (1 - p)) = x - log(1 - exp(x))."""
    return x - (1 - x.exp()).ln()


def d_margin(c, r, ref_c, ref_r):
    return (c - ref_c) - (r - ref_r)


def d_dpo(c, r, ref_c, ref_r, beta, gamma, smoothing):
    """With probability `smoothing` the label is wrong: (1 - eps) * -log sigma(z) + eps * -log sigma(-z)."""
    z = beta * d_margin(c, r, ref_c, ref_r)
    return (1 - smoothing) * d_softplus(-z) + smoothing * d_softplus(z)


def d_ipo(c, r, ref_c, ref_r, beta, gamma, smoothing):
    """Expected squared distance of the log-ratio margin to 1 / (2 tau), tau = beta."""
    return (d_margin(c, r, ref_c, ref_r) - 1 / (2 * beta)) ** 2


def d_slic(c, r, ref_c, ref_r, beta, gamma, smoothing):
    """Hinge with delta = 1 on the scaled margin."""
    return max(Decimal(0), 1 - beta * d_margin(c, r, ref_c, ref_r))


def d_simpo(c, r, ref_c, ref_r, beta, gamma, smoothing):
    """-log sigma(beta/|y| log pi(w) - beta/|y| log pi(l) - gamma): the target margin is subtracted unscaled."""
    return d_softplus(-(beta * c - beta * r - gamma))


def d_orpo(c, r, ref_c, ref_r, beta, gamma, smoothing):
    """NLL(w) + beta * -log sigma(log(odds(w) / odds(l))), odds = p / (1 - p)."""
    odds = [x.exp() / (1 - x.exp()) for x in (c, r)]
    return -c + beta * d_softplus(-(odds[0] / odds[1]).ln())


PO_TRUTH = {"sigmoid": exact(d_dpo), "ipo": exact(d_ipo), "hinge": exact(d_slic),
            "simpo": exact(d_simpo), "orpo": exact(d_orpo)}  # fmt: skip


def d_reward(pref_loss, x, beta):
    """Table of rewards: what stands inside f for one response, without the reference's constant."""
    if pref_loss == "orpo":
        return d_log_odds(x)
    return x if pref_loss == "ipo" else beta * x


def d_penalty(lost, kind, pref_loss):
    """s of the signed loss of reward; `auto` is 2 t^2 for the squared loss and |t| for the 1-Lipschitz ones."""
    if kind == "auto":
        kind = "double" if pref_loss == "ipo" else "abs"
    return {"abs": abs(lost), "squared": lost * lost, "double": 2 * lost * lost, "drop": max(Decimal(0), lost)}[kind]


def alignment_truth(short, long, beta, pref_loss, align, kind, rise):
    def formula(s, lo, b):
        if align == "reward":
            s, lo = d_reward(pref_loss, s, b), d_reward(pref_loss, lo, b)
        return d_penalty(lo - s if rise else s - lo, kind, pref_loss)

    return exact(formula)(short, long, beta)


def batch(seed: int, size: int = 64, columns: int = 4, dtype=torch.float64) -> list[torch.Tensor]:
    """Log-probs over the range that training sees: means of -0.01 to sums of -60."""
    uniform = torch.rand(columns, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return list((-0.01 - 60 * uniform**3).to(dtype))


KNOBS = [(0.1, 0.5, 0.0), (0.05, 0.0, 0.2), (1.0, 1.6, 0.1), (2.5, 0.5, 0.0)]  # beta, gamma, smoothing


# ---- L_PO


@pytest.mark.parametrize("beta, gamma, smoothing", KNOBS)
@pytest.mark.parametrize("pref_loss", PREF_LOSSES)
def test_preference_loss_is_the_closed_form(pref_loss, beta, gamma, smoothing):
    columns = batch(seed=1)
    got = losses.PO_LOSSES[pref_loss](*columns, beta=beta, gamma=gamma, smoothing=smoothing)
    truth = [PO_TRUTH[pref_loss](*row, beta, gamma, smoothing) for row in zip(*columns, strict=True)]
    assert got.shape == (64,) and got.dtype == torch.float64  # per sample, not reduced
    assert got.tolist() == pytest.approx(truth, **CLOSE)


def test_five_losses_are_defined():
    assert tuple(losses.PO_LOSSES) == PREF_LOSSES == tuple(PO_TRUTH)


def test_hand_computed_values():
    """One number per loss that fits on a napkin; chosen -1, rejected -2, reference -1.5 for both, beta 0.5.

    Margin 1, beta * margin 0.5. DPO: log(1 + e^-0.5). IPO: (1 - 1)^2 = 0. Hinge: 1 - 0.5. SimPO, gamma 0.5:
    -log sigma(0) = log 2. ORPO: odds(-1) = 1 / (e - 1), odds(-2) = 1 / (e^2 - 1), their ratio is e + 1 and
    -log sigma(log(e + 1)) = log(1 + 1 / (e + 1)): 1 + 0.5 * that.
    """
    columns = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -2.0, -1.5, -1.5)]
    got = {name: loss(*columns, beta=0.5, gamma=0.5).item() for name, loss in losses.PO_LOSSES.items()}
    want = dict(sigmoid=math.log(1 + math.exp(-0.5)), ipo=0.0, hinge=0.5, simpo=LOG2,
                orpo=1 + 0.5 * math.log(1 + 1 / (math.e + 1)))  # fmt: skip
    assert got == pytest.approx(want, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("pref_loss", ["sigmoid", "hinge", "ipo"])
def test_preference_loss_is_trls(pref_loss, smoothing, dtype):
    """TRL's own method, called unbound: the same operations in the same order, so equal bit for bit."""
    from llamafactory.train.dpo.trainer import DPOTrainer  # TRL's; alone it does not import beside transformers 5

    stub = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), reference_free=False, beta=0.3,
                           f_divergence_type="reverse_kl", label_smoothing=smoothing)  # fmt: skip
    columns = batch(seed=2, dtype=dtype)
    theirs, _, _ = DPOTrainer.dpo_loss(stub, *columns, loss_type=pref_loss)
    ours = losses.PO_LOSSES[pref_loss](*columns, beta=0.3, smoothing=smoothing)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_simpo_is_the_hosts(dtype):
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    chosen, rejected, *_ = batch(seed=3, dtype=dtype)
    theirs = CustomDPOTrainer.simpo_loss(SimpleNamespace(beta=2.5, simpo_gamma=0.7), chosen, rejected)
    assert torch.equal(losses.simpo(chosen, rejected, None, None, beta=2.5, gamma=0.7), theirs)


def test_orpo_is_the_hosts_where_that_is_finite():
    """Another formula for 1 - p, so rounding may differ: log1p(-exp(x)) loses 1 / (1 - p) <= 100 at x <= -0.01,
    in float64 100 * 1.1e-16 on numbers of size 1 or more, a few times."""
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    chosen, rejected, *_ = batch(seed=4)
    theirs = CustomDPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.3), chosen, rejected)
    ours = losses.orpo(chosen, rejected, None, None, beta=0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)

    chosen = torch.tensor([-1e-8], requires_grad=True)  # and where it is not, which is why ours is another
    CustomDPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.3), chosen, torch.tensor([-1.0])).sum().backward()
    assert not chosen.grad.isfinite().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("pref_loss", PREF_LOSSES)
def test_preference_loss_gradcheck(pref_loss, smoothing):
    """All four inputs. The hinge's corner, beta * margin = 1, is kept out: there is no derivative there."""
    columns = [c / 8 for c in batch(seed=5, size=12)]  # means per token, -0.001 to -7.5
    margin = (columns[0] - columns[1]) - (columns[2] - columns[3])
    assert ((0.4 * margin - 1).abs() > 1e-3).all() and (0.4 * margin > 1).any()  # both sides of the corner
    columns = [c.requires_grad_() for c in columns]
    loss = losses.PO_LOSSES[pref_loss]
    assert torch.autograd.gradcheck(lambda *xs: loss(*xs, beta=0.4, gamma=0.3, smoothing=smoothing), columns)


@pytest.mark.parametrize("pref_loss", PREF_LOSSES)
def test_finite_in_fp32_at_huge_margins(pref_loss):
    """Sums of log-probs reach -1e4 for a thousand tokens; ten times that, either way, must not overflow."""
    numbers = (-0.5, -1e4, -1e5)
    columns = [torch.tensor(c).requires_grad_() for c in zip(*itertools.product(numbers, repeat=4), strict=True)]
    loss = losses.PO_LOSSES[pref_loss](*columns, beta=2.5, gamma=0.5, smoothing=0.1)
    gradients = torch.autograd.grad(loss.sum(), columns, allow_unused=True)
    assert len(loss) == 81 and loss.isfinite().all()
    assert sum(g is not None for g in gradients) == (2 if pref_loss in ("simpo", "orpo") else 4)
    assert all(g.isfinite().all() for g in gradients if g is not None)


# ---- the odds near p = 1

ABOVE, BELOW = (float(torch.nextafter(torch.tensor(-LOG2), torch.tensor(to))) for to in (0.0, -1.0))
EDGES = (0.0, -1e-12, -1e-8, -1e-7, -1e-6, -1e-3, ABOVE, -LOG2, BELOW, -1.0, -50.0, -1e4)
CLAMP = torch.tensor(losses.MAX_LOGP).item()  # as fp32 has it


def edge_values(columns: int) -> list[torch.Tensor]:
    """Every combination of edges, fp32."""
    return [torch.tensor(c).requires_grad_() for c in zip(*itertools.product(EDGES, repeat=columns), strict=True)]


def log_odds_error(x: float) -> float:
    """Bound of the fp32 error of log_odds: expm1 or exp, log, and the final difference are each faithful to 2^-23.

    A relative error e of 1 - p is an absolute one of log(1 - p); on the far branch exp(x) <= 1/2 so that
    d log1p(-exp(x)) = e * p / (1 - p) <= e. Then one rounding of the logarithm and one of the difference.
    """
    log1mexp = exact(lambda d: (1 - d.exp()).ln())(x)
    return EPS32 * (1 + abs(log1mexp) + abs(x - log1mexp))


@pytest.mark.parametrize("x", [e for e in EDGES if e <= -1e-7] + [-1e-5, -0.01, -0.3, -0.6, -0.8, -3.0, -16.0, -17.0])
def test_log_odds_in_fp32_is_the_truth(x):
    """Value, and gradient: d/dx (x - log(1 - e^x)) = 1 / (1 - e^x), from five faithful operations of 2^-23 each."""
    tensor = torch.tensor([x], requires_grad=True)
    at = tensor.item()  # what fp32 made of x
    value = losses.log_odds(tensor)
    value.sum().backward()
    assert value.item() == pytest.approx(exact(d_log_odds)(at), rel=0, abs=log_odds_error(at))
    assert tensor.grad.item() == pytest.approx(exact(lambda d: 1 / (1 - d.exp()))(at), rel=5 * EPS32)


@pytest.mark.parametrize("x", [-1e-6, -0.01, -0.5, -LOG2, -0.7, -3.0, -60.0, -700.0])
def test_log_odds_in_float64_is_the_truth(x):
    tensor = torch.tensor([x], dtype=torch.float64)
    assert losses.log_odds(tensor).item() == pytest.approx(exact(d_log_odds)(x), **CLOSE)


@pytest.mark.parametrize("x", [0.0, -1e-12, -1e-8, -5e-8])
def test_log_odds_above_the_clamp_count_as_the_clamp(x):
    tensor = torch.tensor([x], requires_grad=True)
    value = losses.log_odds(tensor)
    value.sum().backward()
    assert value.item() == pytest.approx(exact(d_log_odds)(CLAMP), rel=0, abs=log_odds_error(CLAMP))
    assert tensor.grad.item() == 0


def test_log_odds_does_not_jump_or_fall_where_the_formulas_meet():
    """The derivative is 2 at -log 2: over 2000 neighbouring fp32 numbers the value may not fall by more than both
    sides' rounding, and must rise by their distance times 2."""
    x = (-LOG2 + torch.arange(-1000, 1000, dtype=torch.float64) * 2.0**-24).float()
    y = losses.log_odds(x).double()
    error = 2 * log_odds_error(-LOG2)
    assert len(set(x.tolist())) == 2000 and (y.diff() > -error).all()
    assert (y[-1] - y[0]).item() == pytest.approx(2 * (x[-1].double() - x[0].double()).item(), abs=error, rel=1e-3)


def orpo_odds_gradient(chosen: float, rejected: float) -> float:
    """d/d(log-odds of chosen) of -log sigma(difference) is -sigma(-difference)."""
    return -exact(lambda c, r: 1 / (1 + (d_log_odds(c) - d_log_odds(r)).exp()))(chosen, rejected)


def test_orpo_is_finite_and_right_at_the_edges_in_fp32():
    """All pairs of edges: the loss and both gradients against the closed form at the clamped fp32 inputs.

    Loss: -c is exact; softplus is 1-Lipschitz, so the two odds' errors and the rounding of their difference pass
    undiminished at most; then one rounding of it and one of the sum. Gradients: a product sigma * 1 / (1 - p); the
    first factor's relative error is at most the absolute error of its argument, the second's 5 * 2^-23.
    """
    beta, (chosen, rejected) = 0.3, edge_values(2)
    loss = losses.orpo(chosen, rejected, None, None, beta=beta)
    grad_c, grad_r = torch.autograd.grad(loss.sum(), [chosen, rejected])
    assert len(loss) == len(EDGES) ** 2
    assert loss.isfinite().all() and grad_c.isfinite().all() and grad_r.isfinite().all()
    for c, r, value, gc, gr in zip(*(t.tolist() for t in (chosen, rejected, loss, grad_c, grad_r)), strict=True):
        cc, rr = min(c, CLAMP), min(r, CLAMP)
        truth = -c + beta * exact(lambda a, b: d_softplus(d_log_odds(b) - d_log_odds(a)))(cc, rr)
        spread = abs(exact(d_log_odds)(cc) - exact(d_log_odds)(rr))
        argument = log_odds_error(cc) + log_odds_error(rr) + EPS32 * spread
        assert value == pytest.approx(truth, rel=0, abs=beta * (argument + EPS32 * (spread + 1)) + EPS32 * abs(truth))
        pull = beta * orpo_odds_gradient(cc, rr)
        slopes = [0.0 if x > CLAMP else exact(lambda d: 1 / (1 - d.exp()))(x) for x in (c, r)]
        for got, want, size in ((gc, -1 + pull * slopes[0], slopes[0]), (gr, -pull * slopes[1], slopes[1])):
            # fp32 flushes sigma below 1e-38 to 0: the absolute part; argument is capped where sigma is that small
            allowed = abs(pull) * size * (math.expm1(min(argument, 1.0)) + 8 * EPS32) + 2e-38 * size + EPS32 * abs(want)
            assert got == pytest.approx(want, rel=0, abs=allowed)


@pytest.mark.parametrize("align, kind, detach, rise",
                         list(itertools.product(("reward", "logp"), KINDS, (False, True), (False, True))))  # fmt: skip
@pytest.mark.parametrize("pref_loss", PREF_LOSSES)
def test_alignment_is_finite_at_the_edges_in_fp32(pref_loss, align, kind, detach, rise):
    short, long = edge_values(2)
    value = losses.alignment(short, long, pref_loss, 0.3, align, kind, detach, rise)
    value.sum().backward()
    assert value.isfinite().all() and (value >= 0).all()
    assert long.grad.isfinite().all() and (detach or short.grad.isfinite().all())


# ---- rewards, penalties, alignment


@pytest.mark.parametrize("beta", [0.1, 2.5])
@pytest.mark.parametrize("pref_loss", PREF_LOSSES)
def test_reward_is_the_closed_form(pref_loss, beta):
    (logps,) = batch(seed=6, columns=1)
    truth = [exact(lambda x, b: d_reward(pref_loss, x, b))(x, beta) for x in logps]
    assert losses.reward(pref_loss, logps, beta).tolist() == pytest.approx(truth, **CLOSE)


@pytest.mark.parametrize("pref_loss", PREF_LOSSES)
def test_reward_is_what_the_loss_is_a_function_of(pref_loss):
    """L_PO must depend on the chosen log-prob through the reward alone (ORPO: apart from its NLL).

    So, with the reference's log-probs at 0, f recovered from L_PO and the rewards by the definitions of the table
    gives L_PO again: -log sigma(z), (z - 1/(2 beta))^2, max(0, 1 - z), -log sigma(z - gamma), beta * -log sigma(z).
    """
    beta, gamma = 0.4, 0.3
    chosen, rejected = (c / 10 for c in batch(seed=7, columns=2))
    zero = torch.zeros_like(chosen)
    loss = losses.PO_LOSSES[pref_loss](chosen, rejected, zero, zero, beta=beta, gamma=gamma)
    z = losses.reward(pref_loss, chosen, beta) - losses.reward(pref_loss, rejected, beta)
    want = {
        "sigmoid": -torch.log(torch.sigmoid(z)),
        "ipo": (z - 1 / (2 * beta)) ** 2,
        "hinge": (1 - z).clamp(min=0),
        "simpo": -torch.log(torch.sigmoid(z - gamma)),
        "orpo": -chosen - beta * torch.log(torch.sigmoid(z)),
    }[pref_loss]
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pref_loss", PREF_LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_penalty_table(kind, pref_loss):
    """Exact: powers of two square and double without rounding."""
    lost = torch.tensor([-2.0, -0.5, 0.0, 0.25, 4.0])
    double = {"sigmoid": False, "ipo": True, "hinge": False, "simpo": False, "orpo": False}[pref_loss]
    want = {"abs": [2, 0.5, 0, 0.25, 4], "squared": [4, 0.25, 0, 0.0625, 16], "drop": [0, 0, 0, 0.25, 4]}
    want["auto"] = [8, 0.5, 0, 0.125, 32] if double else want["abs"]
    assert losses.penalty(lost, kind, pref_loss).tolist() == want[kind]


@pytest.mark.parametrize("rise", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("align", ["reward", "logp"])
@pytest.mark.parametrize("pref_loss", PREF_LOSSES)
def test_alignment_is_the_closed_form(pref_loss, align, kind, rise):
    short, long = batch(seed=8, size=48, columns=2)
    got = losses.alignment(short, long, pref_loss, 0.3, align, kind, rise=rise)
    truth = [alignment_truth(s, lo, 0.3, pref_loss, align, kind, rise) for s, lo in zip(short, long, strict=True)]
    assert got.shape == (48,)
    assert got.tolist() == pytest.approx(truth, **CLOSE)
    assert len({t > 0 for t in truth}) == (2 if kind == "drop" else 1)  # both sides of `drop` were seen


def test_alignment_defaults_are_the_papers():
    """SoLo-RA, s(t) = t, gradient through both sides, and it *costs*: the term is positive whichever side is larger."""
    short, long = torch.tensor([-1.0, -3.0], requires_grad=True), torch.tensor([-3.0, -1.0], requires_grad=True)
    value = losses.alignment(short, long, "sigmoid", 0.5)
    value.sum().backward()
    assert value.tolist() == [1.0, 1.0]  # 0.5 * |2|
    assert short.grad.tolist() == [0.5, -0.5] and long.grad.tolist() == [-0.5, 0.5]


def test_descending_the_alignment_closes_the_gap():
    """A step against the gradient brings the rewards together; with the sign flipped it would drive them apart."""
    for pref_loss, align, kind in itertools.product(PREF_LOSSES, ("reward", "logp"), ("auto", "abs", "squared")):
        short, long = (c.div(20).sub(0.05).requires_grad_() for c in batch(seed=9, columns=2))
        gap = (short - long).abs()
        value = losses.alignment(short, long, pref_loss, 0.3, align, kind)
        grad_s, grad_l = torch.autograd.grad(value.sum(), [short, long])
        step = 1e-9  # times slopes of at most 2 t * 20, t < 10: far below the smallest gap, so nothing overshoots
        closer = ((short - step * grad_s) - (long - step * grad_l)).abs()
        assert (gap > 1e-4).all() and (closer < gap).all(), (pref_loss, align, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pref_loss", ["sigmoid", "hinge", "simpo", "ipo"])
def test_solo_kl_at_alpha_times_beta_is_solo_ra(pref_loss, kind):
    """These rewards are beta times the log-prob (ipo: the log-prob), so s takes out beta to its degree.

    Loss and both gradients, bit for bit: beta is a power of two, by which nothing is rounded. With SoLo-RA's own alpha
    SoLo-KL is SoLo-RA at alpha / beta, whose gradient is that much larger.
    """
    alpha, beta = 3.0, 2.0**-3
    squared = kind == "squared" or (kind, pref_loss) == ("auto", "ipo")
    factor = 1.0 if pref_loss == "ipo" else beta ** (2 if squared else 1)

    def weighed(align: str, alpha: float) -> list[torch.Tensor]:
        short, long = (c.requires_grad_() for c in batch(seed=10, columns=2))
        value = alpha * losses.alignment(short, long, pref_loss, beta, align, kind)
        return [value, *torch.autograd.grad(value.sum(), [short, long])]

    reward = weighed("reward", alpha)
    assert all(map(torch.equal, weighed("logp", alpha * factor), reward)) and (reward[0] > 0).any()
    assert all(map(torch.equal, weighed("logp", alpha), weighed("reward", alpha / factor)))


def test_no_alpha_makes_solo_kl_of_orpo_its_solo_ra():
    """d log-odds / d log-prob = 1 / (1 - p) is another factor in every row, from 1 to 100 in this batch."""
    short, long = batch(seed=10, columns=2)
    odds, logp = (losses.alignment(short, long, "orpo", 0.3, align) for align in ("reward", "logp"))
    assert (odds / logp).min() < 1.1 < 2 < (odds / logp).max()


CASES = list(itertools.product(PREF_LOSSES, ("reward", "logp"), KINDS, (False, True)))


def test_alignment_gradcheck():
    """Both sides, all 80 combinations, away from the corner of |t| at 0 (gaps above 1e-3)."""
    assert len(CASES) == 80
    for pref_loss, align, kind, rise in CASES:
        short, long = (c.div(20).requires_grad_() for c in batch(seed=11, size=12, columns=2))
        assert ((short - long).abs() > 1e-3).all()

        def both(s, lo, pref_loss=pref_loss, align=align, kind=kind, rise=rise):
            return losses.alignment(s, lo, pref_loss, 0.3, align, kind, False, rise)

        assert torch.autograd.gradcheck(both, (short, long)), (pref_loss, align, kind, rise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alignment_of_equal_contexts_is_exactly_zero(dtype):
    """Bit for bit, value and gradient, also at the edges where the odds' slope is 1e7."""
    for pref_loss, align, kind, rise in CASES:
        for detach in (False, True):
            short, long = (torch.tensor(EDGES, dtype=dtype, requires_grad=True) for _ in range(2))
            value = losses.alignment(short, long, pref_loss, 0.3, align, kind, detach, rise)
            value.sum().backward()
            for tensor in (value, long.grad, *([] if detach else [short.grad])):
                assert torch.equal(tensor, torch.zeros_like(tensor)), (pref_loss, align, kind, rise, detach)


@pytest.mark.parametrize("kind", ["auto", "abs", "squared"])
@pytest.mark.parametrize("align", ["reward", "logp"])
@pytest.mark.parametrize("pref_loss", PREF_LOSSES)
def test_gradient_flows_through_both_sides_or_only_the_long(pref_loss, align, kind):
    short, long = (c.div(20).requires_grad_() for c in batch(seed=12, columns=2))
    both = losses.alignment(short, long, pref_loss, 0.3, align, kind)
    grad_s, grad_l = torch.autograd.grad(both.sum(), [short, long])
    assert (grad_s != 0).all() and (grad_l != 0).all()
    assert (grad_s * grad_l < 0).all()  # they pull towards each other

    alone = losses.alignment(short, long, pref_loss, 0.3, align, kind, detach_short=True)
    assert torch.equal(alone, both)  # the value does not change
    no_grad, same_grad = torch.autograd.grad(alone.sum(), [short, long], allow_unused=True)
    assert no_grad is None and torch.equal(same_grad, grad_l)


def test_drop_costs_only_what_the_long_context_makes_worse():
    """Chosen: a reward lost. Rejected (`rise`): a reward gained."""
    short, long = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0])
    assert losses.alignment(short, long, "ipo", 1.0, kind="drop").tolist() == [1.0, 0.0]
    assert losses.alignment(short, long, "ipo", 1.0, kind="drop", rise=True).tolist() == [0.0, 1.0]


# ---- LongPO


def longpo_alone(chosen, rejected, ref_chosen, ref_rejected):
    """LongPO's preference term: the objective without NLL, lambda 1, beta 0.3."""
    spec = SimpleNamespace(pref_beta=0.3, solopo_longpo_lambda=1.0)
    logps = losses.LogProbs(chosen, rejected, torch.zeros_like(chosen), None, None, ref_chosen, ref_rejected)
    return losses.longpo(logps, spec)


def test_longpo_is_the_closed_form():
    """-log sigma(r(w) - r(l)), r(y) = beta * log(pi(y | x_long) / pi_ref(y | x_short))."""

    def formula(lc, lr, rc, rr, beta):
        return d_softplus(beta * (lr - rr) - beta * (lc - rc))

    columns = batch(seed=13)
    got, parts = longpo_alone(*columns)
    truth = [exact(formula)(*row, 0.3) for row in zip(*columns, strict=True)]
    assert got.shape == (64,)
    assert got.tolist() == pytest.approx(truth, **CLOSE)
    assert parts["solopo/po_loss"].tolist() == pytest.approx(truth, rel=1e-6) and not parts["solopo/align_loss"].any()


def test_longpo_gradcheck():
    columns = [c.div(20).requires_grad_() for c in batch(seed=14, size=16)]
    assert torch.autograd.gradcheck(lambda *xs: longpo_alone(*xs)[0], columns)


# ---- one step of the trainer


@pytest.mark.parametrize("case", STEPS)
def test_step_is_the_loop_by_hand(case):
    """Losses, metrics and gradients of a padded, ragged batch against one sequence at a time."""
    model, ref_model, rows = qwen2_float64(POLICY), qwen2_float64(REFERENCE), tiny_rows()
    keys = BASE | dict(pref_loss=case.split(",")[0]) | STEPS[case]
    if keys["pref_loss"] in ("simpo", "orpo"):
        keys.pop("ref_model")
    parameters = list(model.parameters())
    losses_B, metrics = step(model, ref_model, rows, **keys)
    gradients = torch.autograd.grad(losses_B.mean(), parameters)

    truth = [by_hand_solopo(model, ref_model, row, keys) for row in rows]
    assert max(t["solopo/align_loss"] for t in truth) > 0.1 and truth[2]["solopo/align_loss"] == 0
    by_hand = torch.stack([t["loss"] for t in truth])
    assert losses_B.tolist() == pytest.approx(by_hand.tolist(), rel=0, abs=STEP_TOLERANCE)
    for name in set(truth[0]) - {"loss"}:
        want = [t[name].item() for t in truth]
        assert metrics[name].tolist() == pytest.approx(want, rel=0, abs=STEP_TOLERANCE), name
    assert_gradients_close(gradients, torch.autograd.grad(by_hand.mean(), parameters))
    assert metrics["solopo/align_loss"][2] == 0  # exactly: the row's long prompt is its short prompt


@pytest.mark.parametrize("forward", ["packed", "two_stage"])
def test_step_with_a_known_reference(forward):
    """Rows that bring their reference's log-probs need no reference model, and get the loss by hand."""
    model, ref_model = qwen2_float64(POLICY), qwen2_float64(REFERENCE)
    rows = [
        row | {
            f"ref_{name}_logps": [by_hand_logps(ref_model, row["short_prompt_ids"], row[f"{name}_ids"]).sum().item()]
            for name in ("chosen", "rejected")
        }
        for row in tiny_rows()
    ]  # fmt: skip
    keys = BASE | dict(pref_loss="sigmoid")
    losses_B, _ = step(model, None, rows, solopo_forward=forward, **keys)
    by_hand = [by_hand_solopo(model, ref_model, row, keys)["loss"].item() for row in rows]
    assert losses_B.tolist() == pytest.approx(by_hand, rel=0, abs=STEP_TOLERANCE)


@pytest.mark.parametrize("pref_loss", ["sigmoid", "hinge", "simpo"])
def test_the_comparable_step_of_solo_kl_is_that_of_solo_ra(pref_loss):
    """A step of the trainer, loss and every gradient, bit for bit: alpha x beta on log-probs, alpha on rewards."""
    model, ref_model, rows = qwen2_float64(POLICY), qwen2_float64(REFERENCE), tiny_rows()
    keys = BASE | dict(pref_loss=pref_loss, pref_beta=0.25)
    if pref_loss == "simpo":
        keys.pop("ref_model")
    found = []
    for align, alpha in (("reward", 3.0), ("logp", 0.75), ("logp", 3.0)):
        losses_B, _ = step(model, ref_model, rows, **keys | dict(solopo_align=align, solopo_alpha=alpha))
        found.append([losses_B, *torch.autograd.grad(losses_B.mean(), list(model.parameters()))])
    assert all(map(torch.equal, found[0], found[1]))
    assert (found[2][0] > found[0][0] + 0.01).any(), "the same alpha pulls harder"


def test_longpo_step_is_the_loop_by_hand():
    """NLL of all of `x_long y_w`, context included, plus lambda * -log sigma(r(w) - r(l)) with
    r(y) = beta * (log pi(y | x_long) - log pi_ref(y | x_short)); lambda large, so that both terms show."""
    model, ref_model, rows = qwen2_float64(POLICY), qwen2_float64(REFERENCE), tiny_rows()
    keys = dict(pref_loss="sigmoid", pref_beta=0.4, ref_model="a reference", solopo_objective="longpo",
                solopo_longpo_lambda=0.8)  # fmt: skip
    by_hand, parameters = [], list(model.parameters())
    for row in rows:
        chosen, rejected = (
            by_hand_logps(model, row["long_prompt_ids"], row[f"{response}_ids"]).sum()
            - by_hand_logps(ref_model, row["short_prompt_ids"], row[f"{response}_ids"]).sum().detach()
            for response in ("chosen", "rejected")
        )
        ids = row["long_prompt_ids"] + row["chosen_ids"]
        nll = -by_hand_logps(model, ids[:1], ids[1:]).mean()
        by_hand.append(nll + 0.8 * torch.log(1 + torch.exp(-0.4 * (chosen - rejected))))
    losses_B, metrics = step(model, ref_model, rows, **keys)
    by_hand = torch.stack(by_hand)
    assert losses_B.tolist() == pytest.approx(by_hand.tolist(), rel=0, abs=STEP_TOLERANCE)
    gradients = torch.autograd.grad(losses_B.mean(), parameters)
    assert_gradients_close(gradients, torch.autograd.grad(by_hand.mean(), parameters))
    assert metrics["solopo/align_loss"].tolist() == [0, 0, 0]
