"""A check of the tests: each fault that would train the wrong thing in silence makes the test named beside it fail.

The package is copied, one line of the copy is changed, and the named test runs against the copy in a process of its
own. It must fail there by an assertion (not by an import or a collection error), and pass on the unchanged copy.

Importing the host takes longer than all these tests, so one process imports it, with the plugin off and its modules
not loaded, and forks for each fault; see zygote.py.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from zygote import Zygote

pytestmark = pytest.mark.slow
STEP = "test_losses.py::test_step_is_the_loop_by_hand"
FAULTS = {  # name: (file, source as it stands there exactly once, what it becomes, the test that must fail)
    # the sign of the alignment
    "alignment is rewarded": (
        "losses.py",
        "return 2 * lost_B**2 if kind == \"auto\" and pref_loss == \"ipo\" else lost_B.abs()",
        "return 2 * lost_B**2 if kind == \"auto\" and pref_loss == \"ipo\" else -lost_B.abs()",
        "test_losses.py::test_alignment_defaults_are_the_papers",
    ),
    "alignment is subtracted from the loss": (
        "losses.py",
        "po_B + spec.solopo_alpha * align_B if",
        "po_B - spec.solopo_alpha * align_B if",
        f"{STEP}[simpo]",
    ),
    "a gain costs instead of a drop": (
        "losses.py",
        "return torch.relu(lost_B)",
        "return torch.relu(-lost_B)",
        "test_losses.py::test_drop_costs_only_what_the_long_context_makes_worse",
    ),
    # the label shift
    "labels are read unshifted": (
        "logps.py",
        "targets_BK = labels_BT[:, positions_K + 1]",
        "targets_BK = labels_BT[:, positions_K]",
        "test_logps.py::test_the_logits_before_a_label_predict_it",
    ),
    "logits are taken unshifted": (
        "logps.py",
        "(labels_BT[:, 1:] != IGNORE)",
        "(labels_BT[:, :-1] != IGNORE)",
        "test_logps.py::test_the_logits_before_a_label_predict_it",
    ),
    # chosen and rejected
    "chosen and rejected change places in the batch": (
        "data.py",
        'sequences = (_sequences(pairs, "short", response) for response in RESPONSES)',
        'sequences = (_sequences(pairs, "short", response) for response in RESPONSES[::-1])',
        "test_data.py::test_collator_by_hand",
    ),
    "chosen and rejected change places in the step": (
        "forward.py",
        "chosen_B, rejected_B = short.logps_B.chunk(2)\n        nll_B",
        "rejected_B, chosen_B = short.logps_B.chunk(2)\n        nll_B",
        f"{STEP}[sigmoid]",
    ),
    "chosen and rejected change places in the known reference": (
        "trainer.py",
        'inputs["reference_P2"].unbind(1)',
        'inputs["reference_P2"].flip(1).unbind(1)',
        "test_losses.py::test_step_with_a_known_reference",
    ),
    # the wrong side
    "aligned with the rejected response": (
        "losses.py",
        "alignment(logps.chosen_B, logps.long_chosen_B, *form)",
        "alignment(logps.rejected_B, logps.long_chosen_B, *form)",
        f"{STEP}[ipo]",
    ),
    "short aligned with short": (
        "losses.py",
        "alignment(logps.chosen_B, logps.long_chosen_B, *form)",
        "alignment(logps.chosen_B, logps.chosen_B, *form)",
        f"{STEP}[orpo]",
    ),
    "the long side is detached": (
        "losses.py",
        "short_B = short_B.detach() if detach_short else short_B",
        "long_B = long_B.detach() if detach_short else long_B",
        "test_losses.py::test_gradient_flows_through_both_sides_or_only_the_long",
    ),
    "equal prompts are aligned and different ones are not": (
        "forward.py",
        '~batch["long_is_short_B"]',
        'batch["long_is_short_B"]',
        f"{STEP}[hinge]",
    ),
    "the rejected response's rise is taken for a drop": (
        "losses.py",
        "*form, rise=True)",
        "*form)",
        f"{STEP}[orpo, both, drop]",
    ),
    "LongPO's reference changes sides": (
        "losses.py",
        "dpo(logps.chosen_B, logps.rejected_B, logps.ref_chosen_B, logps.ref_rejected_B, spec",
        "dpo(logps.chosen_B, logps.rejected_B, logps.ref_rejected_B, logps.ref_chosen_B, spec",
        "test_losses.py::test_longpo_step_is_the_loop_by_hand",
    ),
    # the packed row
    "a packed rejected response does not see its prompt": (
        "packing.py",
        "alone = Segment((first, end), ((start, behind), (first, end)))",
        "alone = Segment((first, end), ((first, end),))",
        "test_packing.py::test_every_query_sees_its_own_sequence_and_nothing_else",
    ),
    "a packed response's positions restart": (
        "packing.py",
        "places.extend(range(len(prompt), len(prompt) + len(response)))",
        "places.extend(range(len(response)))",
        "test_packing.py::test_layout_of_a_sample_by_hand",
    ),
    "packed logits are taken unshifted": (
        "packing.py",
        "score([behind - 1, *range(first, end - 1)], response)",
        "score(range(first, end), response)",
        "test_packing.py::test_packed_step_is_the_loop_by_hand[sigmoid-3]",
    ),
    "the bottom-right mask is top-left": (
        "attention.py",
        "tril(keys - queries)",
        "tril()",
        "test_packing.py::test_packed_is_two_stage_on_every_architecture[llama-both]",
    ),
    "recomputed layers attend across segments": (
        "attention.py",
        "for module in (model.base_model, *layers):",
        "for module in (model.base_model,):",
        "test_packing.py::test_checkpointing_recomputes_in_segments[llama-reentrant]",
    ),
    "a window is a key too wide": (
        "attention.py",
        "triu_(keys - queries - window + 1)",
        "triu_(keys - queries - window)",
        "test_packing.py::test_a_window_is_a_masked_softmax",
    ),
    # self-distillation, the anchor, several rejected responses
    "the long context teaches the short one": (
        "forward.py",
        "token_kl(logits_KV, rows[-1], teacher or Rows(logits_KV, rows[0]), form)",
        "token_kl(logits_KV, rows[0], teacher or Rows(logits_KV, rows[-1]), form)",
        "test_distill.py::test_every_form_in_a_step",
    ),
    "the divergence is turned round": (
        "distill.py",
        'if kind == "forward":',
        'if kind == "reverse":',
        "test_distill.py::test_two_words_by_hand",
    ),
    "the temperature is left out of the gradient": (
        "distill.py",
        "None] / ctx.form.temperature",
        "None]",
        "test_distill.py::test_value_and_gradient_are_the_definitions",
    ),
    "words beside the likeliest get no gradient": (
        "distill.py",
        "(share_nV * slope_nC[:, -1:])",
        "(0 * share_nV)",
        "test_distill.py::test_value_and_gradient_are_the_definitions",
    ),
    "the anchor pushes away": (
        "losses.py",
        "loss_B + spec.solopo_anchor *",
        "loss_B - spec.solopo_anchor *",
        "test_distill.py::test_step_is_the_loop_by_hand",
    ),
    "losses of a row's pairs are added": (
        "losses.py",
        "of_sample.mean(0)",
        "of_sample.sum(0)",
        "test_rejected.py::test_a_row_is_the_mean_of_its_pairs",
    ),
    # scale and edge
    "ORPO's odds are not clamped": (
        "losses.py",
        "x_B = avg_logps_B.clamp(max=MAX_LOGP)",
        "x_B = avg_logps_B",
        "test_losses.py::test_orpo_is_finite_and_right_at_the_edges_in_fp32",
    ),
    "beta is left out of the reward": (
        "losses.py",
        'return logps_B if pref_loss == "ipo" else beta * logps_B',
        "return logps_B",
        "test_losses.py::test_reward_is_what_the_loss_is_a_function_of",
    ),
    "ipo's s(t) is not doubled": (
        "losses.py",
        'return 2 * lost_B**2 if kind == "auto"',
        'return lost_B**2 if kind == "auto"',
        "test_theory.py::test_s_of_auto_bounds_the_loss_and_is_tight_at_zero",
    ),
    # what the log is watched for
    "both rewards falling is taken for the alignment's doing": (
        "collapse.py",
        "fall / 3 < closed < 2 * fall",
        "closed < 2 * fall",
        "test_collapse.py::test_both_contexts_falling_together_is_not_the_alignments_doing",
    ),
    # rows
    "the prompt is trained on": (
        "data.py",
        "[IGNORE] * len(prompt) + response",
        "prompt + response",
        "test_data.py::test_collator_by_hand",
    ),
    "a row of exactly cutoff_len is refused": (
        "data.py",
        "return length <= cutoff_len",
        "return length < cutoff_len",
        "test_data.py::test_fits_is_exact_at_the_boundary",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def host_alone():
    """A zygote without the plugin, so that a run can import the plugin from where it likes."""
    running = Zygote("hypothesis", "pytest", SOLOPO_PLUGIN="off")
    yield running
    running.end()


@pytest.fixture
def outcome(host_alone, tmp_path):
    """Run tests against a copy of the package, with a fault or without; returns what each of them did."""

    def run(tests: list[str], fault: str | None = None) -> dict:
        package = tmp_path / "solopo_plugin"
        shutil.copytree(ROOT / "solopo_plugin", package, ignore=shutil.ignore_patterns("__pycache__"))
        if fault is not None:
            file, source, replacement, _ = FAULTS[fault]
            text = (package / file).read_text(encoding="utf-8")
            count = text.count(source)
            assert count == 1, f"{file} has {count} times: {source} -- bring the table of faults up to date"
            (package / file).write_text(text.replace(source, replacement), encoding="utf-8")
        environment = os.environ | {"SOLOPO_PLUGIN": "off", "OMP_NUM_THREADS": "1"}
        environment.pop("PYTEST_ADDOPTS", None)
        words = [*(ROOT / "tests" / test for test in tests), *(["-x"] if fault else [])]
        script, log = ROOT / "tests" / "run_on_copy.py", tmp_path / "output.txt"
        status = host_alone.start(script, *words, log=log, cwd=tmp_path, env=environment).wait()
        assert status == 0, log.read_text()
        found = json.loads((tmp_path / "outcome.json").read_text())
        # the copy was tested, not the installed package
        assert Path(found["file"]) == package / "losses.py"
        return found | {"output": log.read_text()}

    return run


def test_the_named_tests_pass_without_a_fault(outcome):
    found = outcome(sorted({test for *_, test in FAULTS.values()}))
    assert found["code"] == 0 and not found["failed"] and not found["other"], found["output"]
    ran = {node.split("tests/")[1] for node in found["passed"]}
    for *_, test in FAULTS.values():  # each was there and ran, at least one case of it
        assert any(node == test or node.startswith(f"{test}[") for node in ran), test


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(outcome, fault):
    found = outcome([FAULTS[fault][-1]], fault)
    assert found["code"] == 1 and found["failed"] and not found["other"], found["output"]
    for when, exceptions in found["failed"].values():
        assert when == "call" and "AssertionError" in exceptions, found["output"]


def test_the_four_faults_that_matter_most_are_there():
    """Sign, shift, swap and wrong side, in the step as well as in its parts."""
    assert len(FAULTS) == 32
    # in solopo, longpo, forward.py, trainer.py
    ours = "po_B", "logps.", "*form", "short.", "long_is_short_B", "reference_P2"
    assert sum(any(word in source for word in ours) for _, source, *_ in FAULTS.values()) == 8
