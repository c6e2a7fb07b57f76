"""The statements of docs/theory.md, each checked in float64, with the code's losses wherever it has them.

A row is a preference loss f of a margin of rewards, the s(t) that belongs to it and its constant C. Five rows are what
`losses.py` computes; the paper's two unnamed ones are written out here. Rewards carry beta, so eta is 1.

Rounding: every side of an inequality is a sum of at most six terms of at most ten roundings of 2^-53 each, relative to
the term (for orpo the way to log p and back costs the same again, see `with_reward`): `ROUNDING` times their size.
"""

import ast
import itertools
import math
import re
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from conftest import ROOT
from plan import read_config, shape_of, step_flops
from torch import Tensor

from solopo_plugin import losses
from solopo_plugin.args import FIELDS
from solopo_plugin.distill import Form, Rows, token_kl

PAGE = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())
PREF_LOSSES = ("sigmoid", "ipo", "hinge", "simpo", "orpo")
LIPSCHITZ = ("sigmoid", "simpo", "hinge", "orpo")
BETA, GAMMA = 0.4, 0.5  # GAMMA is SimPO's
LOG2 = math.log(2)
KINDS = get_args(FIELDS["solopo_distill_kl"].type)  # forward, reverse, jsd
ROUNDING = 120 * 2.0**-53


def with_reward(pref_loss: str, rewards: Tensor, beta: float) -> Tensor:
    """Log-probs whose reward is given: the inverse of the table of rewards (orpo: log p = log sigma(log-odds)).

    At log-odds of 12 log p is 6e-6, whose rounding 1 / (1 - p) = 1.6e5 amplifies back to that of a number of size 1.
    """
    if pref_loss == "orpo":
        return torch.nn.functional.logsigmoid(rewards)
    return rewards if pref_loss == "ipo" else rewards / beta


def preference(pref_loss: str, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """f of the margin of rewards by the code's L_PO: without ORPO's NLL and beta, with a reference of 0."""
    zero = torch.zeros_like(chosen)
    loss = losses.PO_LOSSES[pref_loss](chosen, rejected, zero, zero, beta=beta, gamma=GAMMA)
    return (loss + chosen) / beta if pref_loss == "orpo" else loss


@dataclass
class Row:
    """f(margin - gamma) as a function of the margin, s(t), C."""

    name: str
    gamma: float
    constant: float

    def f(self, margin: Tensor) -> Tensor:
        if self.name == "exponential":
            return torch.exp(self.gamma - margin)
        if self.name == "truncated quadratic":
            return torch.relu(1 + self.gamma - margin) ** 2
        return preference(self.name, *(with_reward(self.name, x, BETA) for x in (margin, 0 * margin)), BETA)

    def s(self, t: Tensor) -> Tensor:
        if self.name == "exponential":
            return math.exp(self.gamma) * torch.expm1(t)
        if self.name == "truncated quadratic":
            return 2 * t**2
        short, long = (with_reward(self.name, x, BETA) for x in (t, 0 * t))
        return losses.alignment(short, long, self.name, BETA)


ROWS = [
    Row("sigmoid", 0.0, 2 * LOG2),
    Row("simpo", GAMMA, 2 * math.log(1 + math.exp(GAMMA))),
    Row("orpo", 0.0, 2 * LOG2),
    Row("ipo", 1 / (2 * BETA), 2 * (1 / (2 * BETA)) ** 2),
    Row("hinge", 0.0, 2.0),  # delta 1
    *(Row("exponential", g, 2 * math.exp(g)) for g in (0.0, 0.5, 2.0)),
    *(Row("truncated quadratic", g, 2 * (1 + g) ** 2) for g in (0.0, 0.5, 2.0)),
]
of_every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name}, gamma {row.gamma:g}")


# ---- s(t)


@of_every_row
def test_s_bounds_the_loss_of_both_signs_and_is_tight_at_zero(row):
    """f(z - g) + f(-z - g) <= s(|z|) + C for all z, with equality at 0, where C = 2 f(-g)."""
    z = torch.linspace(-12, 12, 2401, dtype=torch.float64)
    z[1200] = 0
    left, right = row.f(z) + row.f(-z), row.s(z.abs()) + row.constant
    assert (left <= right + ROUNDING * right).all()
    assert left[1200].item() == pytest.approx(row.constant, rel=ROUNDING)
    assert (left > 0.5 * row.s(z.abs()) + row.constant + 1).any(), "half of s would do"


@of_every_row
def test_squares_need_2_t_squared_exactly(row):
    """ipo's s is the least one everywhere, the truncated square's up to |z| = 1 + g; no other row's is but at 0."""
    z = torch.linspace(0.01, 12, 1200, dtype=torch.float64)
    right = row.s(z) + row.constant
    least = row.f(z) + row.f(-z) >= right - ROUNDING * right
    upto = {"ipo": math.inf, "truncated quadratic": 1 + row.gamma}.get(row.name, 0)
    assert torch.equal(least, z <= upto)


@pytest.mark.parametrize("pref_loss", PREF_LOSSES)
def test_s_of_auto_bounds_the_loss_and_is_tight_at_zero(pref_loss):
    """The five rows of the code in its own scale: a wrong reward, a wrong s(t) of `auto` or a wrong f shows."""
    (row,) = (row for row in ROWS if row.name == pref_loss)
    test_s_bounds_the_loss_of_both_signs_and_is_tight_at_zero(row)
    if pref_loss == "ipo":  # |t| would not do
        z = torch.tensor([4.0], dtype=torch.float64)
        assert row.f(z) + row.f(-z) > z + row.constant + 1


# ---- the paper's bound


def all_quadruples() -> tuple[Tensor, ...]:
    """Rewards of chosen and rejected, short and then long context: every combination of nine values, -2 to 2."""
    values = torch.linspace(-2, 2, 9, dtype=torch.float64).tolist()
    return tuple(torch.tensor(list(itertools.product(values, repeat=4)), dtype=torch.float64).T)


def sides(row: Row, rewards: tuple[Tensor, ...], short_scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """The long loss, and (f(3 b) + s(3 |w|) + s(3 |l|) + 2 C) / 3 with the short margin b and both gaps."""
    short_w, short_l, long_w, long_l = rewards
    short = row.f(short_scale * (short_w - short_l))
    gaps = row.s(3 * (short_w - long_w).abs()) + row.s(3 * (short_l - long_l).abs())
    return row.f(long_w - long_l), (short + gaps + 2 * row.constant) / 3


def test_the_long_margin_is_the_sum_of_three():
    short_w, short_l, long_w, long_l = all_quadruples()
    three = (long_w - short_w, short_w - short_l, short_l - long_l)
    assert torch.equal(sum(three), long_w - long_l)  # dyadic numbers: exact


@of_every_row
def test_jensen_over_three_margins(row):
    """f(a + b + c) <= (f(3 a) + f(3 b) + f(3 c)) / 3 by f's convexity, and none is negative."""
    values = torch.linspace(-4, 4, 17, dtype=torch.float64)
    a, b, c = torch.cartesian_prod(values, values, values).T
    right = (row.f(3 * a) + row.f(3 * b) + row.f(3 * c)) / 3
    keep = (a + b + c).abs() <= 12  # beyond it orpo's odds are clamped
    assert (row.f(a + b + c) <= right + ROUNDING * right)[keep].all()
    assert (right >= 0).all()


@of_every_row
def test_the_papers_bound_holds_with_a_third_and_three_eta(row):
    long, bound = sides(row, all_quadruples())
    assert (long <= bound + ROUNDING * bound).all()


@of_every_row
def test_the_short_term_must_carry_three_eta(row):
    """With eta as in the preference loss itself the inequality is false, by far, where the short margin is negative."""
    b = torch.tensor(-12.0, dtype=torch.float64)
    zero = torch.zeros_like(b)
    long, wrong = sides(row, (b, zero, b, zero), short_scale=1.0)
    assert long > wrong + 1
    assert row.name != "sigmoid" or (f"{long:.0f}" == "12" and wrong < 5)  # as the page says
    b = b / 3  # within the range of orpo's odds
    long, bound = sides(row, (b, zero, b, zero))
    assert long <= bound


def test_the_papers_bound_is_attained_by_squares():
    """So of ipo no part of it can be smaller: all three margins are -g / 3, that is b = l = -g / 3 and w = g / 3."""
    (row,) = (row for row in ROWS if row.name == "ipo")
    third = torch.tensor(row.gamma / 3, dtype=torch.float64)
    zero = torch.zeros_like(third)
    long, bound = sides(row, (zero, third, -third, 2 * third))
    assert [long.item(), bound.item()] == pytest.approx([4 * row.gamma**2] * 2, rel=ROUNDING)


def test_of_dpo_the_papers_bound_is_never_within_0_46_nats():
    """Without any gap it is (f(3 b) + 4 log 2) / 3 >= f(b) + 2 / 3 log 2 by the same Jensen, equal at b = 0."""
    (row,) = (row for row in ROWS if row.name == "sigmoid")
    long, bound = sides(row, all_quadruples())
    assert (bound - long).min().item() == pytest.approx(2 / 3 * LOG2, rel=ROUNDING)
    assert f"{2 / 3 * LOG2:.2f} nats" in WORDS


def test_the_weight_of_the_gap_is_one_for_t_and_three_for_squares():
    """s(3 t) / 3 is s(t) for s(t) = t and 3 s(t) for 2 t^2: the 1/3 is not a smaller weight of the alignment."""
    t = torch.linspace(0, 4, 9, dtype=torch.float64)  # dyadic; the rows of the code that are exact on it
    for name, weight in (("hinge", 1.0), ("ipo", 3.0), ("truncated quadratic", 3.0)):
        row = next(row for row in ROWS if row.name == name)
        torch.testing.assert_close(row.s(3 * t) / 3, weight * row.s(t), rtol=ROUNDING, atol=0)


# ---- the one-sided bound


def triples(pref_loss: str, beta: float) -> list[Tensor]:
    """Random rewards: chosen and rejected given the short, then the long context; as log-probs.

    Uniform in [-4, 4) and dyadic (steps of 2^-10), so that sums and products with beta = 1/2 are exact.
    """
    integers = torch.randint(-(2**12), 2**12, (4, 4000), generator=torch.Generator().manual_seed(15))
    return [with_reward(pref_loss, row.double() / 2**10, beta) for row in integers]


@pytest.mark.parametrize("pref_loss", LIPSCHITZ)
def test_one_sided_penalty_bounds_the_long_loss(pref_loss):
    """f(D - g) <= f(b - g) + max(0, r_s(w) - r_l(w)) + max(0, r_l(l) - r_s(l)), D the long margin, b the short.

    f falls with slope in [-1, 0], so f(D) - f(b) <= max(0, b - D), and b - D is the chosen's loss plus the rejected's
    gain. No constant, and equality where the contexts agree. The hinge is exact on dyadic rewards; the logistic
    rounds at 1.1e-16 on numbers up to 9, in some forty operations (three terms, and for orpo the odds and back).
    """
    beta = 0.5
    rounding = 0.0 if pref_loss == "hinge" else 40 * 9 * 1.2e-16
    short_w, short_l, long_w, long_l = triples(pref_loss, beta)
    drop = dict(pref_loss=pref_loss, beta=beta, kind="drop")
    lost, gained = losses.alignment(short_w, long_w, **drop), losses.alignment(short_l, long_l, **drop, rise=True)
    short, long = preference(pref_loss, short_w, short_l, beta), preference(pref_loss, long_w, long_l, beta)
    assert (long <= short + lost + gained + rounding).all()

    # the objective itself, with the alpha that the page gives it; ORPO's NLL, on the short context, is a constant here
    alpha = beta if pref_loss == "orpo" else 1.0
    zero = torch.zeros_like(short_w)
    loss, nll = losses.PO_LOSSES[pref_loss], -short_w if pref_loss == "orpo" else zero
    objective = loss(short_w, short_l, zero, zero, beta=beta, gamma=GAMMA) + alpha * (lost + gained)
    assert (alpha * long <= objective - nll + rounding).all()

    equal = losses.alignment(short_w, short_w, **drop) + losses.alignment(short_l, short_l, **drop, rise=True)
    assert torch.equal(short + equal, short)
    # every part is needed: without either penalty, or with the rejected's turned round, some triples violate it
    turned = losses.alignment(short_l, long_l, **drop)
    for wrong in (short + lost, short + gained, short + lost + turned):
        assert (long > wrong + 0.1).any()


@of_every_row
def test_the_one_sided_bound_is_of_the_logistic_and_the_hinge_alone(row):
    """It needs a slope in [-1, 0], which a square and an exponential leave: a lost reward of 1 costs them more."""
    short_w, short_l, long_w, long_l = all_quadruples()
    lost = torch.relu(short_w - long_w) + torch.relu(long_l - short_l)
    long, bound = row.f(long_w - long_l), row.f(short_w - short_l) + lost
    holds = (long <= bound + ROUNDING * (bound.abs() + 1)).all()
    assert holds == (row.name in LIPSCHITZ)


# ---- chosen-only


@pytest.mark.parametrize("pref_loss", LIPSCHITZ)
def test_chosen_only_is_no_bound_for_any_alpha(pref_loss):
    """The chosen reward is 1 in both contexts, the rejected one -1 and then 3: the alignment is 0, alpha idle.

    And as the rejected one goes on to rise the long loss passes any constant, while what is trained on stays.
    """
    rewards = [torch.tensor([r], dtype=torch.float64) for r in (1.0, -1.0, 1.0)]
    short_w, short_l, long_w = (with_reward(pref_loss, r, BETA) for r in rewards)
    assert losses.alignment(short_w, long_w, pref_loss, BETA).item() == 0
    trained_on = preference(pref_loss, short_w, short_l, BETA).item()
    for rejected in (3.0, 6.0, 12.0):
        long_l = with_reward(pref_loss, torch.tensor([rejected], dtype=torch.float64), BETA)
        long = preference(pref_loss, long_w, long_l, BETA).item()
        assert long > trained_on + (rejected - 1.5)
        if (pref_loss, rejected) == ("sigmoid", 3.0):
            assert f"{trained_on:.3f}" == "0.127" and f"{long:.3f}" == "2.127" and "0.127" in WORDS and "2.127" in WORDS


@pytest.mark.parametrize("pref_loss", [*LIPSCHITZ, "ipo"])
def test_chosen_only_absolute_value_is_no_bound(pref_loss):
    """Count random triples: a sixth to a fifth violates it, as the page says, none once the rejected is aligned too.

    IPO's squares, which the one-sided bound leaves out, are violated by more, and by a tenth even then.
    """
    beta = 0.5
    short_w, short_l, long_w, long_l = triples(pref_loss, beta)
    short, long = preference(pref_loss, short_w, short_l, beta), preference(pref_loss, long_w, long_l, beta)
    chosen_only = short + losses.alignment(short_w, long_w, pref_loss, beta)
    share = (long > chosen_only + 1e-9).double().mean().item()
    both = chosen_only + losses.alignment(short_l, long_l, pref_loss, beta, rise=True)
    still = (long > both + 1e-12).double().mean().item()
    if pref_loss == "ipo":
        assert (f"{share:.0%}", f"{still:.0%}") == ("23%", "10%") and "23 %, and 10 % even then" in WORDS
        return
    assert 0.165 <= share <= 0.206 and "17 to 21 %" in WORDS
    assert still == 0


# ---- self-distillation


def long_and_short(tokens: int = 40, words: int = 7) -> tuple[Tensor, Tensor]:
    """Logits given the long context, with gradient, and given the short one: of size 3."""
    draw = torch.Generator().manual_seed(17)
    long, short = (3 * torch.randn(tokens, words, generator=draw, dtype=torch.float64) for _ in range(2))
    return long.requires_grad_(), short


def distilled(long: Tensor, short: Tensor, kind: str = "forward", temperature: float = 1.0, top: int = 0) -> Tensor:
    """The code's divergence of each token."""
    at = torch.arange(len(long))
    return token_kl(long, at, Rows(short, at), Form(kind, temperature, top))


def by_definition(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension."""
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_gradient_of_distillation_is_the_difference_of_probabilities(temperature):
    """By the code and by autograd through the definition; and what is left of it where T is large."""
    long, short = long_and_short()
    q, p = ((x / temperature).softmax(-1) for x in (long, short))
    for value in (distilled(long, short, temperature=temperature), by_definition(p, q)):
        (gradient,) = torch.autograd.grad(value.sum(), long, retain_graph=True)
        torch.testing.assert_close(gradient, (q - p) / temperature, rtol=0, atol=1e-13)
    apart = (long - short).detach()
    apart = apart - apart.mean(-1, keepdim=True)
    hot = distilled(long, short, temperature=1e4)  # where the next term of the series is 1e-3 of this one
    (gradient,) = torch.autograd.grad(hot.sum(), long)
    torch.testing.assert_close(gradient * 1e8, apart / apart.shape[-1], rtol=0, atol=1e-2)
    torch.testing.assert_close(hot.detach() * 1e8, apart.pow(2).mean(-1) / 2, rtol=1e-2, atol=0)


def test_near_agreement_jsd_is_a_quarter_of_the_others():
    """0 at the same logits, more than 0 elsewhere, and half a squared distance by Fisher's information between."""
    long, short = long_and_short()
    for kind in KINDS:
        value = distilled(long, long.detach(), kind)
        assert not value.any() and not torch.autograd.grad(value.sum(), long)[0].any()
        assert (distilled(long, short, kind) > 1e-3).all()
    step = 1e-4 * (short - long.detach())
    p = short.softmax(-1)
    fisher = (p * step**2).sum(-1) - (p * step).sum(-1) ** 2
    for kind, share in (("forward", 1 / 2), ("reverse", 1 / 2), ("jsd", 1 / 8)):
        torch.testing.assert_close(distilled(short - step, short, kind), share * fisher, rtol=1e-2, atol=0)


def test_forward_alone_pulls_at_a_word_that_the_long_context_has_lost():
    long, short = long_and_short(400)
    forward, reverse, jsd = (distilled(4 * long, 4 * short, kind) for kind in KINDS)
    assert (jsd <= LOG2).all() and (jsd <= (forward + reverse) / 4).all() and jsd.max() > 0.9 * LOG2
    assert min(forward.max(), reverse.max()) > 20
    lost = torch.tensor([[-30.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    of_short = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64)
    p, q = ((x / 2).softmax(-1)[0, 0].item() for x in (of_short, lost))
    pulls = [torch.autograd.grad(distilled(lost, of_short, kind, 2.0).sum(), lost)[0][0, 0].item() for kind in KINDS]
    assert p > 0.5 and q < 1e-6 and pulls[0] == pytest.approx(-p / 2, rel=1e-6) and max(map(abs, pulls[1:])) < 1e-5


def test_distillation_bounds_what_sampled_answers_lose():
    """All 343 responses of three words: the chain rule, and the worst set of right answers of all there are."""
    long, short = (x.detach() for x in long_and_short(1 + 7 + 49))  # a token's logits behind each beginning
    kl = distilled(long, short)
    p, q = (x.softmax(-1) for x in (short, long))
    reached = torch.cat([torch.ones(1), p[0], (p[0][:, None] * p[1:8]).flatten()]).double()  # by the short context
    of = lambda x: (x[0][:, None, None] * x[1:8][:, :, None] * x[8:].view(7, 7, 7)).flatten()  # noqa: E731
    total = (reached * kl).sum()
    assert total.item() == pytest.approx(by_definition(of(p), of(q)).item(), rel=1e-12)
    for scale in (1.0, 0.3, 0.01):  # short contexts that differ less and less
        nearer = long + scale * (short - long)
        p = nearer.softmax(-1)
        worst = (of(p) - of(q)).clamp(min=0).sum()  # right is what the long context finds less often
        assert 0 < worst <= (by_definition(of(p), of(q)) / 2).sqrt()
    assert worst > 0.5 * (by_definition(of(p), of(q)) / 2).sqrt()  # it is not loose by much


@pytest.mark.parametrize("top", [1, 3, 5])
def test_likeliest_words_hide_the_divergence_among_the_others(top):
    long, short = (x.detach() for x in long_and_short())
    p, q = short.softmax(-1), long.softmax(-1)
    others = p.argsort(dim=-1, descending=True)[:, top:]
    p_rest, q_rest = p.gather(-1, others), q.gather(-1, others)
    mass = p_rest.sum(-1)
    hidden = mass * by_definition(p_rest / mass[:, None], q_rest / q_rest.sum(-1, keepdim=True))
    shown = distilled(long, short, top=top)
    torch.testing.assert_close(shown + hidden, distilled(long, short), rtol=1e-12, atol=1e-12)
    assert (hidden > 0).all()


# ---- cost


@pytest.fixture(scope="module")
def qwen():
    return shape_of(read_config("qwen2.5-7b"))


def flops(shape, variant: str, rho: float, long: int, part: str | None = None) -> float:
    """Of a step without a reference on prompts alone; `part`: of attention, linear layers or head."""
    parts = step_flops(shape, variant, round(rho * long), 0, long)
    return parts[part] if part else sum(parts.values())


def test_attention_costs_1_plus_2_rho_squared_against_2(qwen):
    """The paper's model is the attention of scripts/plan.py without a response."""
    for sixteenths in range(17):
        rho = sixteenths / 16
        share = flops(qwen, "S1", rho, 2**15, "attention") / flops(qwen, "V0", rho, 2**15, "attention")
        assert share == pytest.approx((1 + 2 * rho**2) / 2, rel=1e-15)
    speed_up = 2 / (1 + 2 * 0.125**2)
    assert f"{speed_up:.2f} times" in WORDS


def test_attention_gains_below_70_7_percent(qwen):
    """1 + 2 rho^2 = 2 at rho = 1 / sqrt 2."""
    threshold = 1 / math.sqrt(2)
    assert 1 + 2 * threshold**2 == pytest.approx(2, rel=1e-15) and f"{threshold:.1%}" == "70.7%" and "70.7 %" in WORDS
    for rho, gains in ((0.70, True), (0.71, False)):
        cost = [flops(qwen, variant, rho, 2**15, "attention") for variant in ("S1", "V0")]
        assert (cost[0] < cost[1]) == gains


@pytest.mark.parametrize("long, threshold", [(2**13, 53), (2**15, 58), (2**17, 65)])
def test_with_linear_layers_the_threshold_is_lower(qwen, long, threshold):
    """They cost 2 S + L tokens against 2 L, so their own threshold is 50 %: between it and 70.7 %, rising with L."""
    assert flops(qwen, "S1", 0.5, long, "linear") == flops(qwen, "V0", 0.5, long, "linear")
    percents = [p for p in range(101) if flops(qwen, "S1", p / 100, long) < flops(qwen, "V0", p / 100, long)]
    assert percents == list(range(threshold)) or percents == list(range(threshold + 1))
    assert f"{threshold} %" in WORDS
    for rho in (0.25, 0.75, 0.99):  # the packed row runs S + L tokens
        assert flops(qwen, "S3", rho, long) < flops(qwen, "V0", rho, long)


# ---- the page


def named_tests() -> list[tuple[str, str]]:
    return re.findall(r"`tests/([\w/]+\.py)::(test_\w+)`", PAGE)


def test_every_statement_of_the_page_names_a_test_that_exists():
    functions = {}
    for file, name in named_tests():
        if file not in functions:
            tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
            functions[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in functions[file], f"{file}::{name}"
    statements = re.split(r"^(?=\d+\. )", PAGE, flags=re.M)[1:]
    assert [int(text.split(".")[0]) for text in statements] == list(range(1, len(statements) + 1))
    assert len(statements) == 20 and all("`tests/" in text for text in statements)


def test_every_test_here_stands_on_the_page():
    tree = ast.parse((ROOT / "tests/test_theory.py").read_text(encoding="utf-8"))
    here = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    about_the_page = {name for name in here if "page" in name}
    assert {name for file, name in named_tests() if file == "test_theory.py"} == here - about_the_page


def test_the_pages_table_is_that_of_the_code():
    """f, s and C of a row of the table, read as Python, are those of the row here."""
    cells = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    assert {cell[0].strip("`") for cell in cells} == {row.name for row in ROWS}
    t = torch.linspace(0, 4, 9, dtype=torch.float64)
    exp, log = (lambda x, of=of: of(torch.as_tensor(x, dtype=torch.float64)) for of in (torch.exp, torch.log))
    for name, _, *formulas in cells:
        for row in (row for row in ROWS if row.name == name.strip("`")):
            known = dict(t=t, z=t - row.gamma, gamma=row.gamma, delta=1.0, exp=exp, log=log, sigma=torch.sigmoid)
            known["max"] = lambda least, x: x.clamp(min=least)
            f, s, constant = (eval(text.strip("`").replace("^", "**"), known) for text in formulas)
            torch.testing.assert_close(f, row.f(t), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(s, row.s(t), rtol=1e-12, atol=1e-12)
            assert float(constant) == pytest.approx(row.constant, rel=ROUNDING)
