"""Hold what docs/benchmarks/ says to its JSON files and to the arithmetic."""

import json
import sys

import benchmark_page
import pytest
from conftest import ROOT
from step_cost import shape_of, step_flops
from transformers import AutoConfig

sys.path.insert(0, str(ROOT / "scripts" / "gpu"))
import page as gpu_page  # noqa: E402

FOLDER = ROOT / "docs" / "benchmarks"
TEXT = " ".join((FOLDER / "README.md").read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def gpu() -> dict:
    return json.loads((FOLDER / "gpu.json").read_text(encoding="utf-8"))


def test_pages_are_what_their_measurements_give(gpu):
    """`scripts/gpu/page.py --out docs/benchmarks` writes gpu.md again; cpu.md is scripts/benchmark_step.py's."""
    assert (FOLDER / "gpu.md").read_text(encoding="utf-8") == gpu_page.as_markdown(gpu)
    cpu = json.loads((FOLDER / "cpu.json").read_text(encoding="utf-8"))
    assert (FOLDER / "cpu.md").read_text(encoding="utf-8") == benchmark_page.as_markdown(cpu)


def test_ratios_on_a_gpu(gpu):
    def seconds(name: str) -> float:
        return gpu["runs"][name]["median_s"]

    def faster(other: str, packed: str, lengths=(8192, 16384)) -> list[str]:
        return [f"{seconds(f'{other} lora L{n}') / seconds(f'{packed} lora L{n}'):.2f}" for n in lengths]

    packed, referenced = "S3 orpo", "S3 sigmoid cached"
    host, trl = faster("V0 orpo", packed), faster("T sigmoid cached", referenced)
    (with_one,) = faster("V0 sigmoid online", referenced, [8192])
    fits = {
        variant: max(run["length"] for run in gpu["runs"].values() if is_orpo(run, variant) and run["status"] == "ok")
        for variant in ("S3", "V0")
    }
    longer = f"{fits['S3'] / fits['V0']:.1f}"
    assert (
        f"the packed step is {host[0]} and {host[1]} times as fast as the host's without a reference, {with_one} times "
        f"with one (8K), {trl[0]} and {trl[1]} times as fast as TRL's, and its prompt {longer} times as long"
    ) in TEXT
    stages = faster("S1 orpo", packed)
    assert f"Against the paper's two stages the packed row is {stages[0]} and {stages[1]} times as fast" in TEXT


def is_orpo(run: dict, variant: str) -> bool:
    return (run["variant"], run["loss"], run["tuning"]) == (variant, "orpo", "lora")


def test_timed_steps_on_a_gpu(gpu):
    ok = {key: run for key, run in gpu["runs"].items() if run["status"] == "ok" and not run["trial"]}
    timed = {key: len(run["step_s"]) for key, run in ok.items() if run["tuning"] == "lora"}
    packed = {n: times for key, times in timed.items() if key[:2] == "S3" and (n := int(key.rpartition("L")[2]))}
    others = {(int(key.rpartition("L")[2]), times) for key, times in timed.items() if key[:2] != "S3"}
    assert others == {(8192, 2), (16384, 1)}
    assert f"of the packed step {' / '.join(map(str, packed.values()))}, of V0, S1 and T 2 at 8K and 1 at 16K." in TEXT
    ((name, full),) = [(key, run) for key, run in ok.items() if run["tuning"] == "full"]
    assert name == "S3 orpo full L8192" and full["steps"] == len(full["step_s"]) == 2
    assert f"one packed step ({full['median_s']:.2f} s at 8K, {full['peak'] / 1e9:.1f} GB, SGD; two timed" in TEXT


def test_checks_on_a_gpu(gpu):
    """Hold the page to the distances of the trainer's gradients from fp32, in all forms and beside options."""
    trainer, options = (gpu["check"][name] for name in ("trainer", "options"))
    assert trainer["right"] and options["right"] and {"torch_compile", "use_unsloth_gc"} < options.keys()
    forms = {name: seen for name, seen in trainer.items() if name.startswith(("full orpo", "lora sigmoid"))}
    sixteen = {name: seen["gradients"] for name, seen in forms.items() if "fp32" not in name}
    assert len(sixteen) == 10
    low, high = (f"{extreme(sixteen.values()):.3f}" for extreme in (min, max))
    assert f"as in the two stages (gradients {low} to {high})." in TEXT
    beside = [options[name] for name in ("none of them", "torch_compile", "use_unsloth_gc")]
    ((loss, far),) = {(f"{seen['loss']:.5f}", f"{seen['gradients']:.4f}") for seen in beside}
    exact = f"in fp32 {trainer['orpo by hand, fp32']['loss']:.5f}; gradients {far} from fp32 in all three"
    assert f"loss {loss} with either and without, {exact}" in TEXT
    stages = {name[:4]: far for name, far in sixteen.items() if "two stages" in name}
    assert all(abs(far - stages[name[:4]]) < 0.1 * stages[name[:4]] for name, far in sixteen.items())


def test_tflop_of_both_ways_to_train(gpu):
    """Said twice, in full fine-tuning and with LoRA: the packed step, the host's long pair, the vanilla pair."""
    shape = shape_of(AutoConfig.for_model(**gpu["settings"]["model"]))

    def tflop(variant: str, lora: bool) -> str:
        lengths = (8192, 16384, 32768)
        return " / ".join(
            f"{sum(step_flops(shape, variant, 1024, 256, n, lora=lora).values()) / 1e12:.0f}" for n in lengths
        )

    packed, host, vanilla = ([tflop(variant, lora) for lora in (True, False)] for variant in ("S3", "V0", "V*"))
    assert f"with LoRA, as above, costs {packed[0]} TFLOP at 8K / 16K / 32K and the host's long pair {host[0]};" in TEXT
    assert f"; in full fine-tuning {packed[1]} and {host[1]}." in TEXT
    assert f"would cost {vanilla[0]} with LoRA and {vanilla[1]} in full," in TEXT
    assert f"full fine-tuning) such a pair would cost {vanilla[1]} TFLOP" in TEXT
    assert f"packed step costs {packed[1]}; with LoRA {vanilla[0]} and {packed[0]}." in TEXT
