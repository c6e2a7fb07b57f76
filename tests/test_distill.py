"""The divergence of two distributions, token by token: against closed forms in float64, gradcheck and TRL's GKD.

Chunks, and as many likeliest words as there are words, change nothing; equal distributions give exactly 0; the teacher
gets no gradient; no more fp32 rows exist than are asked for.
"""

import math
from typing import get_args

import pytest
import torch
from by_hand import (
    BASE,
    MODELS,
    POLICY,
    REFERENCE,
    STEP_TOLERANCE,
    STEPS_OF_KL,
    Live,
    assert_gradients_close,
    by_hand_kl,
    by_hand_solopo,
    qwen2_float64,
    step,
    tiny_rows,
)
from test_packing import assert_equal, both_ways

from solopo_plugin.args import FIELDS
from solopo_plugin.distill import Form, Rows, Top, divergence, token_kl, top_of, top_of_rows

T, W = 6, 11  # tokens and words
KINDS = get_args(FIELDS["solopo_distill_kl"].type)


def logits(seed: int = 0, n: int = T, words: int = W, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """A student's and a teacher's, of size 3."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(n, words, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()


def kl(student, teacher, form: Form) -> torch.Tensor:
    at = torch.arange(len(student))
    return token_kl(student, at, Rows(teacher, at) if isinstance(teacher, torch.Tensor) else teacher, form)


def by_definition(student: torch.Tensor, teacher: torch.Tensor, kind: str, temperature=1.0, top=0) -> torch.Tensor:
    """Sums over words as they are written, in float64, one token after the other."""
    values = []
    for z, t in zip(student.double(), teacher.double().detach(), strict=True):
        q, p = ((x / temperature).softmax(0) for x in (z, t))
        if top:
            ids = p.argsort(descending=True)[:top]
            q, p = (torch.cat([x[ids], (1 - x[ids].sum())[None]]) for x in (q, p))
        m = (p + q) / 2
        of = {"forward": lambda p, q, m: p * (p / q).log(), "reverse": lambda p, q, m: q * (q / p).log(),
              "jsd": lambda p, q, m: p * (p / m).log() / 2 + q * (q / m).log() / 2}[kind]  # fmt: skip
        values.append(of(p, q, m).sum())
    return torch.stack(values)


FORMS = [(kind, temperature, top) for kind in KINDS for temperature in (1.0, 2.5) for top in (0, 1, 4)]


@pytest.mark.parametrize("kind, temperature, top", FORMS)
def test_value_and_gradient_are_the_definitions(kind, temperature, top):
    student, teacher = logits()
    values, truth = (
        kl(student, teacher, Form(kind, temperature, top)),
        by_definition(student, teacher, kind, temperature, top),
    )
    torch.testing.assert_close(values, truth, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 2, T, dtype=torch.float64)  # so that tokens mixed up would show
    torch.testing.assert_close(
        *(torch.autograd.grad((x * weights).sum(), student)[0] for x in (values, truth)), rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("kind, temperature, top", FORMS)
def test_gradcheck(kind, temperature, top):
    student, teacher = logits(n=3, words=5)
    assert torch.autograd.gradcheck(lambda z: kl(z, teacher, Form(kind, temperature, top, chunk=4)), student)


def test_two_words_by_hand():
    """Teacher 3/4, 1/4, student 1/2, 1/2."""
    student, teacher = torch.tensor([[0.5, 0.5]]).log().double(), torch.tensor([[0.75, 0.25]]).log().double()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    jsd = (0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3) + 0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)) / 2
    got = [kl(student, teacher, Form(kind)).item() for kind in KINDS]
    assert got == pytest.approx([forward, reverse, jsd], rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind, beta", [("forward", 0), ("reverse", 1), ("jsd", 0.5)])
def test_it_is_what_trl_computes(kind, beta, temperature):
    """TRL's GKD, which nobody here wrote, in value and gradient; it counts neither the temperature's square."""
    import llamafactory.train.dpo.trainer  # noqa: F401  # it mends what TRL takes for installed
    from trl.trainer.gkd_trainer import GKDTrainer

    student, teacher = logits(5)
    theirs = GKDTrainer.generalized_jsd_loss(
        student[None], teacher.detach()[None], beta=beta, temperature=temperature, reduction="none"
    )[0].sum(-1)
    ours = kl(student, teacher, Form(kind, temperature))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)  # its mixture's weight is rounded to fp32
    torch.testing.assert_close(
        *(torch.autograd.grad(x.sum(), student)[0] for x in (ours, theirs)), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("top", [0, 4])
@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(kind, chunk, top):
    """Bit for bit: tokens do not meet. Rows are taken from anywhere, and what is not taken gets a gradient of 0."""
    student, teacher = logits(1, n=9, dtype=torch.float32)
    at, of_teacher = torch.tensor([7, 0, 3, 2, 8]), Rows(teacher, torch.tensor([1, 1, 4, 0, 6]))
    whole, parts = (token_kl(student, at, of_teacher, Form(kind, 1.5, top, n)) for n in (10, chunk))
    assert torch.equal(whole, parts) and whole.dtype == torch.float32
    gradients = [torch.autograd.grad((x * torch.arange(5.0)).sum(), student)[0] for x in (whole, parts)]
    assert torch.equal(*gradients)
    untouched = [n for n in range(9) if n not in at.tolist()]
    assert not gradients[0][untouched].any() and gradients[0][[0, 3, 2, 8]].any(-1).all()
    truth = by_definition(student[at], teacher[of_teacher.at_N], kind, 1.5, top)
    torch.testing.assert_close(whole.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_all_words_as_likeliest_is_the_full_vocabulary(kind):
    student, teacher = logits(2)
    full = kl(student, teacher, Form(kind, 2.0))
    for some in (
        kl(student, teacher, Form(kind, 2.0, W)),
        kl(student, top_of(teacher.detach() / 2, W), Form(kind, 2.0)),
    ):
        torch.testing.assert_close(some, full, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            *(torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (some, full)), rtol=1e-11, atol=1e-12
        )


@pytest.mark.parametrize("kind", KINDS)
def test_likeliest_words_bound_from_below(kind):
    """Each further word can only add: one class for several words hides how they differ."""
    student, teacher = logits(3, n=50)
    by_top = torch.stack([kl(student, teacher, Form(kind, 1.0, top)) for top in (*range(1, W), 0)])
    assert (by_top.diff(dim=0) >= -1e-12).all() and by_top[0].min() >= -1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top", [0, 4, W])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_give_exactly_0(kind, top, dtype):
    student, _ = logits(4, dtype=dtype)
    values = kl(student, student.detach(), Form(kind, 1.7, top))
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert not values.any() and not gradient.any() and gradient.dtype == dtype


@pytest.mark.parametrize("top", [0, 4])
def test_the_teacher_gets_no_gradient(top):
    """Also where it is rows of the student's own logits, as in a packed row."""
    student, teacher = logits()
    assert torch.autograd.grad(kl(student, teacher, Form(top=top)).sum(), teacher, allow_unused=True) == (None,)
    at, of_teacher = torch.tensor([3, 4, 5]), Rows(student, torch.tensor([0, 1, 2]))
    (gradient,) = torch.autograd.grad(token_kl(student, at, of_teacher, Form(top=top)).sum(), student)
    assert not gradient[:3].any() and gradient[3:].any(-1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_distributions_far_apart_stay_finite(kind):
    """A teacher that is sure of one word and a student of another, 200 nats apart."""
    student = torch.tensor([[100.0, 0.0, -100.0]], requires_grad=True)
    for top in (0, 1, 2):
        value = kl(student, torch.tensor([[-100.0, 0.0, 100.0]]), Form(kind, top=top))
        apart = (
            100 if top == 1 and kind == "reverse" else 200
        )  # the student's word is one of the rest, by its likeliest
        assert value.item() == pytest.approx(math.log(2) if kind == "jsd" else apart, rel=1e-3)
        assert torch.autograd.grad(value.sum(), student)[0].isfinite().all()


def test_no_tokens():
    student, teacher = logits()
    nothing = torch.zeros(0, dtype=torch.long)
    for of_teacher in (Rows(teacher, nothing), Top(nothing[:, None].expand(0, 3), torch.zeros(0, 4))):
        values = token_kl(student, nothing, of_teacher, Form())
        (gradient,) = torch.autograd.grad(values.sum(), student)
        assert values.shape == (0,) and not gradient.any()


def test_likeliest_words_of_rows():
    _, teacher = logits(6, dtype=torch.bfloat16)
    at = torch.tensor([4, 0, 2, 5, 1])
    ids, logps = top_of_rows(teacher.detach(), at, 3, chunk=2)
    assert logps.dtype == torch.float32 and ids.shape == (5, 3) and logps.shape == (5, 4)
    p = teacher.detach().double().softmax(-1)[at]
    torch.testing.assert_close(logps[:, :3].double().exp(), p.topk(3).values, rtol=1e-5, atol=0)
    torch.testing.assert_close(logps[:, 3].double().exp(), 1 - p.topk(3).values.sum(-1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("top", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_no_more_fp32_rows_than_a_chunk_exist(kind, top):
    """Of all tensors that forward and backward make over the vocabulary, those in fp32 have half of a chunk's rows,
    as the student's and the teacher's are there at once; what is kept in between are the bf16 logits."""
    n, words, chunk = 40, 501, 8
    student = torch.randn(n, words, dtype=torch.bfloat16, requires_grad=True)
    teacher, at, fp32, kept = torch.randn(n, words, dtype=torch.bfloat16), torch.arange(n), set(), []

    class Fp32(Live):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = super().__torch_dispatch__(function, types, args, kwargs)
            for x in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(x, torch.Tensor) and x.dtype != torch.bfloat16 and words in x.shape:
                    fp32.add(tuple(x.shape))
            return output

    pack = lambda x: kept.append(x.dtype) or x  # noqa: E731
    with Fp32(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        token_kl(student, at, Rows(teacher, at), Form(kind, 1.0, top, chunk)).sum().backward()
    assert fp32 == {(chunk // 2, words)}
    assert torch.float32 not in kept


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_are_the_differences(kind):
    """`divergence` itself, of any number of classes."""
    student, teacher = logits(7, n=2, words=3)
    teacher = teacher.detach().log_softmax(-1)
    _, slope = divergence(teacher, student.detach().log_softmax(-1), kind)
    for n in range(2):
        for c in range(3):
            step = torch.zeros_like(teacher)
            step[n, c] = 1e-6
            up, down = (divergence(teacher, (student + s).log_softmax(-1), kind)[0].sum() for s in (step, -step))
            assert slope[n, c].item() == pytest.approx(((up - down) / 2e-6).item(), abs=1e-8)


# ---- in a step; what `solopo_align: distill` does beside each loss is among `by_hand.STEPS`


@pytest.mark.parametrize("forward", ["packed", "two_stage"])
@pytest.mark.parametrize("case", STEPS_OF_KL)
def test_step_is_the_loop_by_hand(case, forward):
    """Alone and with the anchor: losses, metrics and gradients against one sequence at a time, in float64."""
    model, ref_model, rows = qwen2_float64(POLICY), qwen2_float64(REFERENCE), tiny_rows()
    keys = BASE | dict(pref_loss=case.split(",")[0]) | STEPS_OF_KL[case]
    losses_B, metrics = step(model, ref_model, rows, solopo_forward=forward, **keys)
    truth = [by_hand_solopo(model, ref_model, row, keys) for row in rows]
    by_hand = torch.stack([t["loss"] for t in truth])
    assert losses_B.tolist() == pytest.approx(by_hand.tolist(), rel=0, abs=STEP_TOLERANCE)
    for name in set(truth[0]) - {"loss"}:
        want = [t[name].item() for t in truth]
        assert metrics[name].tolist() == pytest.approx(want, rel=0, abs=STEP_TOLERANCE), name
    parameters = list(model.parameters())
    assert_gradients_close(*(torch.autograd.grad(x.mean(), parameters) for x in (losses_B, by_hand)))
    assert metrics["solopo/align_loss"][2] == 0  # exactly: the row's long prompt is its short prompt
    assert metrics["solopo/align_loss"][:2].min() > 0.05 and ("solopo/anchor_kl" in metrics) == ("anchor" in case)


@pytest.mark.parametrize("forward", ["packed", "two_stage"])
@pytest.mark.parametrize("kind, temperature, top", FORMS)
def test_every_form_in_a_step(kind, temperature, top, forward):
    """Direction, temperature, likeliest words; and an anchor to fewer words than there are, which the cases lack."""
    from solopo_plugin import forward as module

    model, ref_model, rows = qwen2_float64(POLICY), qwen2_float64(REFERENCE), tiny_rows()
    keys = BASE | dict(pref_loss="orpo", solopo_align="distill", solopo_distill_kl=kind, solopo_distill_topk=top,
                       solopo_distill_temperature=temperature, solopo_anchor=0.6, solopo_reference="online",
                       solopo_forward=forward)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ANCHOR_TOP", 3)
        losses_B, metrics = step(model, ref_model, rows, **keys)
    of_policy = [by_hand_kl((model, "long"), (model, "short"), row, "chosen", kind, temperature, top) for row in rows]
    of_anchor = [by_hand_kl((model, "short"), (ref_model, "short"), row, "chosen", k=3) for row in rows]
    for name, truth in (("solopo/align_loss", of_policy), ("solopo/anchor_kl", of_anchor)):
        assert metrics[name].tolist() == pytest.approx([x.item() for x in truth], rel=0, abs=STEP_TOLERANCE), name
    parameters = list(model.parameters())
    plain = step(model, None, rows, **BASE | dict(pref_loss="orpo", solopo_alpha=0.0, solopo_forward=forward))[0]
    of_both = 0.7 * torch.stack(of_policy) + 0.6 * torch.stack(of_anchor)
    got, po, want = (torch.autograd.grad(x.mean(), parameters) for x in (losses_B, plain, of_both))
    assert_gradients_close([a - b for a, b in zip(got, po, strict=True)], want)


@pytest.mark.parametrize("name", MODELS)
def test_packed_is_two_stages_on_every_architecture(name):
    keys = dict(solopo_align="distill", solopo_align_on="both", solopo_anchor=0.5, solopo_reference="online")
    assert_equal(*both_ways(name, tiny_rows(), pref_loss="sigmoid", **keys))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pref_loss", ["sigmoid", "ipo", "hinge", "simpo", "orpo"])
def test_packed_is_two_stages_for_every_loss(pref_loss, kind):
    keys = dict(solopo_align="distill", solopo_distill_kl=kind, solopo_distill_topk=5 if kind == "jsd" else 0)
    assert_equal(*both_ways("qwen3", tiny_rows(), pref_loss=pref_loss, **keys))


@pytest.mark.parametrize("forward", ["packed", "two_stage"])
def test_equal_prompts_cost_nothing(forward, monkeypatch):
    """All rows' long prompts are their short ones: the divergence is exactly 0, over no token at all."""
    from solopo_plugin import forward as module

    seen = []
    monkeypatch.setattr(module, "token_kl", lambda s, at, *a: seen.append(len(at)) or token_kl(s, at, *a))
    rows = [tiny_rows()[2], tiny_rows()[2] | dict(name="rows[3]")]
    keys = BASE | dict(pref_loss="orpo", solopo_align="distill", solopo_align_on="both", solopo_forward=forward)
    losses_B, metrics = step(qwen2_float64(POLICY), None, rows, **keys)
    assert losses_B.requires_grad and not metrics["solopo/align_loss"].any() and sum(seen) == 0
    alone = dict(solopo_objective="distill", solopo_forward=forward)
    losses_B, _ = step(qwen2_float64(POLICY), None, rows, **alone)
    losses_B.sum().backward()
    assert losses_B.tolist() == [0, 0]


# ---- in real runs


RUN = dict(max_samples=6, num_train_epochs=1.0, per_device_train_batch_size=2, gradient_accumulation_steps=1,
           solopo_anchor=0.5, solopo_reference="online", learning_rate=1e-2)  # fmt: skip


@pytest.mark.parametrize("forward", ["packed", "two_stage"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_run(run, recipe, tuning, forward):
    """The loss is the sum that docs/training.md states; the anchor is 0 at the start alone; evaluation has it."""
    from solopo_plugin.losses import ANCHOR, METRICS

    keys = RUN | dict(pref_loss="orpo", solopo_align="distill", solopo_alpha=2.0, finetuning_type=tuning)
    log = run(recipe(solopo_forward=forward, val_size=2, eval_strategy="epoch", **keys)).log
    steps, (last,) = ([e for e in log if name in e] for name in ("loss", "eval_loss"))
    assert steps[0][ANCHOR] == pytest.approx(0, abs=1e-6) and steps[-1][ANCHOR] > 1e-4 and last[f"eval_{ANCHOR}"] > 1e-4
    for e in steps:
        want = e["solopo/po_loss"] + 2 * e["solopo/align_loss"] + 0.5 * e[ANCHOR]
        assert e["loss"] == pytest.approx(want, rel=1e-5) and {*METRICS, ANCHOR} == {k for k in e if "/" in k}
        assert e["rewards/margins"] == pytest.approx(0.1 * (e["logps/chosen"] - e["logps/rejected"]), rel=1e-4)


def test_distillation_alone_learns_the_short_contexts_answers(run, recipe):
    """No reference is scored, and the divergence falls."""
    keys = RUN | dict(solopo_objective="distill", solopo_anchor=None, solopo_reference=None, num_train_epochs=30.0)
    steps = [e for e in run(recipe(**keys | dict(max_samples=2, learning_rate=3e-3))).log if "loss" in e]
    assert steps[-1]["solopo/align_loss"] < steps[0]["solopo/align_loss"] / 2
    assert steps[0]["loss"] == pytest.approx(steps[0]["solopo/align_loss"]) and steps[0]["solopo/po_loss"] == 0
