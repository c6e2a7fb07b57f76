"""Check the packed step on one GPU: is it right, which kernels run, how fast is its attention.

    python scripts/gpu/check.py --out OUT --until EPOCH [--dry] [--cli] [--parts PART ...]

Part of `run.sh`; OUT/gpu.json gets every part's result at once. What is compared is in 16 bits on the card, so the
yardstick is what else runs in 16 bits there: "right" is at most twice its distance to fp32, and 1e-3.

    cli      four steps by `llamafactory-cli train` on a tiny model
    op       attention of a packed row, forward and gradients, against a masked softmax in fp32
    model    log-probs and gradients of a small Qwen2, packed both ways and each sequence alone, against fp32
    trainer  loss and gradients of a step through the real trainer: two stages, packed both ways, checkpointing on and
             off, LoRA and full, against two stages in fp32; the loss also against one by hand
    kernels  launches of a forward and backward, by name
    speed    forward and backward of attention alone, 8K to 64K
    options  the host's `torch_compile`, `use_unsloth_gc` and `enable_liger_kernel`, each beside a step without it

`--dry` runs the same on a CPU: small shapes, the kernel of the GPU replaced by a loop.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(Path(__file__).parent)]
import benchmark_run  # noqa: E402
import record  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from record import tell  # noqa: E402

from solopo_plugin import attention, packing  # noqa: E402
from solopo_plugin.logps import token_logps  # noqa: E402
from solopo_plugin.packing import pack  # noqa: E402

PATHS = {
    "sdpa": attention.sdpa_segments, "varlen": attention.varlen_segments, "long apart": attention.long_apart_segments,
}  # fmt: skip


def loop_varlen(query, key, value, cu_queries, cu_keys, longest_queries, longest_keys, *, scale, window_size):
    """Do what `torch.nn.attention.varlen.varlen_attn` is documented to do, on a CPU.

    `window_size`: how many keys before its own a query sees, -1 for all; then 0.
    """
    outputs, groups = [], query.shape[1] // key.shape[1]
    q, k = cu_queries.tolist(), cu_keys.tolist()
    for a, b, c, d in zip(q, q[1:], k, k[1:], strict=False):
        keys, values = (x[c:d].float().repeat_interleave(groups, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[a:b].float(), keys) * scale
        seen, ahead = torch.ones(b - a, d - c, dtype=torch.bool), (d - c) - (b - a)
        seen = seen.tril(ahead).triu(ahead - window_size[0]) if window_size[0] >= 0 else seen.tril(ahead)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
    return torch.cat(outputs).to(query.dtype)


@contextmanager
def attending(how: str, dry: bool, long: int = 24):
    """Let packed rows attend in one of the ways of `PATHS`, whatever would be chosen; segments are long from `long`."""
    before = attention.runs_varlen, attention.runs_cudnn, attention.varlen_attn, attention.GRAIN, packing.LONG
    attention.runs_varlen = lambda *args: how != "sdpa"
    attention.runs_cudnn = lambda *args: how == "long apart"
    packing.LONG = long
    if dry:
        attention.varlen_attn, attention.GRAIN = loop_varlen, 32
    try:
        yield
    finally:
        attention.runs_varlen, attention.runs_cudnn, attention.varlen_attn, attention.GRAIN, packing.LONG = before


def far(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the norm of the difference over the norm."""
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def is_right(error: float, yardstick: float) -> bool:
    """Return whether an error is at most twice the yardstick's, and 1e-3."""
    return error <= 2 * yardstick + 1e-3


def row_of(shapes, seed=0):
    """Make a packed row of (short, long, chosen, rejected) lengths, and its groups."""
    draw, groups = random.Random(seed), []

    def tokens(n):
        return draw.choices(range(64), k=n)

    for short, long, chosen, rejected in shapes:
        response = tokens(chosen)
        groups += [(tokens(short), [response, tokens(rejected)]), (tokens(long), [response])]
    return pack(groups), groups


def states(T, H, K, D, device, dtype=torch.bfloat16, seed=0):
    """Draw queries, keys and values, shape (1, H or K, T, D), in the memory order that a projection leaves: T, H, D."""
    make = torch.Generator(device).manual_seed(seed)
    raw = [torch.randn(1, T, h, D, generator=make, device=device).to(dtype).transpose(1, 2) for h in (H, K, K)]
    return [x.detach().requires_grad_() for x in raw]


def masked_softmax(query, key, value, row, scale, window=None):
    """Return attention by the whole T x T softmax, with a mask made of the row's plan; shape (1, T, H, D)."""
    T, groups = query.shape[2], query.shape[1] // key.shape[1]
    seen = torch.zeros(T, T, dtype=torch.bool, device=query.device)
    for segment in row["plan"].segments:
        a, b = segment.query
        for c, d in segment.keys:
            seen[a:b, c:d] = True
    seen &= torch.ones_like(seen).tril()
    if window:
        places = row["position_ids"][0].to(query.device)
        seen &= places[:, None] - places[None] < window
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


# ---- the parts; each takes dry and device and returns what goes into the JSON


def cli(dry: bool, device: str) -> dict:
    """Train through the real command line: stage, start hook and card."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder) / "tiny"
        subprocess.run([sys.executable, "scripts/make_tiny_model.py", tiny], cwd=ROOT, check=True)
        recipe = dict(
            model_name_or_path=tiny, stage="solopo", do_train=True, finetuning_type="lora", pref_loss="sigmoid",
            dataset="demo_solopo", dataset_dir=ROOT / "data", template="qwen", cutoff_len=1024, max_samples=16,
            output_dir=Path(folder) / "out", max_steps=4, per_device_train_batch_size=2, logging_steps=1,
            gradient_accumulation_steps=1, report_to="none", save_strategy="no", preprocessing_num_workers=1,
            **({"use_cpu": True} if dry else {"bf16": True}),
        )  # fmt: skip
        options = [str(x) for key, value in recipe.items() for x in (f"--{key}", value)]
        command = str(Path(sys.executable).parent / "llamafactory-cli")
        done = subprocess.run([command, "train", *options], capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n")
    said = done.stdout + done.stderr
    losses = [float(x) for x in re.findall(r"'loss': '?(-?[\d.]+(?:e-?\d+)?)", said)]
    form = re.findall(r"A step runs [^\n]*", said)
    right = done.returncode == 0 and len(losses) == 4 and "runs packed" in "".join(form)
    return {"right": right, "exit status": done.returncode, "losses": losses, "log": form[:1]}


def op(dry: bool, device: str) -> dict:
    """Return the errors of output, dq, dk, dv; the larger of the four counts."""
    found = {}
    heads = ((28, 4, 128), (32, 8, 128), (8, 8, 64), (8, 2, 256), (12, 12, 80))
    rows = {
        "one": [(70, 300, 33, 21)],
        "two": [(70, 300, 33, 21), (5, 129, 1, 1)],
        "edge": [(1, 2, 1, 1), (128, 256, 128, 64)],
    }
    for H, K, D in heads[2:4] if dry else heads:
        for label, shapes in rows.items():
            row, _ = row_of(shapes)
            given, layout, scale = states(row["input_ids"].shape[1], H, K, D, device), row["plan"].layout, D**-0.5
            for name, function in PATHS.items():
                for window in (None, 64) if name != "long apart" else (None,):
                    exact = [x.detach().float().requires_grad_() for x in given]
                    want = masked_softmax(*exact, row, scale, window)
                    slope = torch.randn(want.shape, generator=torch.Generator(device).manual_seed(1), device=device)
                    want.backward(slope)
                    x = [t.detach().clone().requires_grad_() for t in given]
                    with attending(name, dry):
                        of_window = {"window": window} if window else {}
                        got = function(*x, layout(torch.device(device)), scale, **of_window)
                    got.backward(slope.to(got.dtype))
                    errors = [far(got, want), *(far(a.grad, b.grad) for a, b in zip(x, exact, strict=True))]
                    found[f"{H}/{K}x{D} {label}{' window' * bool(window)} {name}"] = [round(e, 5) for e in errors]
    worst = {name: max(max(errors) for key, errors in found.items() if key.endswith(name)) for name in PATHS}
    right = all(is_right(worst[name], worst["sdpa"]) for name in PATHS)
    return {"right": right, "worst": worst, "all": found}


def small_qwen2(dry: bool, vocabulary: int):
    """Make a model in fp32 whose log-probs differ from token to token, yet not so much that 16 bits are all noise."""
    from transformers import AutoConfig, AutoModelForCausalLM

    width = dict(hidden_size=64, intermediate_size=96) if dry else dict(hidden_size=1024, intermediate_size=2816)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "qwen2", vocab_size=vocabulary, num_hidden_layers=2 if dry else 4, num_attention_heads=4 if dry else 8,
        num_key_value_heads=2, initializer_range=0.08 if dry else 0.03, pad_token_id=0, bos_token_id=None,
        eos_token_id=0, **width,
    ), attn_implementation="sdpa")  # fmt: skip


def alone(model, groups, device) -> list[torch.Tensor]:
    """Return log-probs of each response's tokens, one sequence at a time."""
    found = []
    for prompt, responses in groups:
        for response in responses:
            ids = torch.tensor([[*prompt, *response]], device=device)
            keep = torch.arange(len(prompt) - 1, ids.shape[1] - 1, device=device)
            logits = model(input_ids=ids, logits_to_keep=keep, use_cache=False).logits
            found.append(token_logps(logits[0], ids[0, len(prompt) :]))
    return found


def model(dry: bool, device: str) -> dict:
    """Compare forms of a packed row. Every sequence alone in fp32 is the truth; in 16 bits it is the yardstick."""
    exact = small_qwen2(dry, 64).to(device).train()
    row, groups = row_of([(20, 60, 5, 7), (9, 30, 1, 2)] if dry else [(200, 1500, 40, 60), (90, 700, 1, 17)])
    row = {k: v.to(device) if torch.is_tensor(v) else v for k, v in row.items()}

    def packed(m):
        logits = m(input_ids=row["input_ids"], position_ids=row["position_ids"], logits_to_keep=row["positions_K"],
                   use_cache=False, solopo_segments=row["plan"]).logits  # fmt: skip
        return token_logps(logits[0], row["targets_K"]).split(row["counts"])

    def measured(m, forward):
        m.zero_grad()
        means = torch.stack([logps.mean() for logps in forward(m)])
        means.sum().backward()
        return means.detach(), torch.cat([p.grad.float().flatten() for p in m.parameters()])

    def loop(m):
        return alone(m, groups, device)

    want, slopes = measured(exact, loop)
    half = deepcopy(exact).to(torch.bfloat16)
    attention.prepare(half)
    found = {}
    for name in ("alone", *(f"packed {path}" for path in PATHS)):
        with attending(name.removeprefix("packed "), dry):
            got, gradients = measured(half, loop if name == "alone" else packed)
        found[name] = {"log-probs": (got - want).abs().mean().item(), "gradients": far(gradients, slopes)}
    half.gradient_checkpointing_enable({"use_reentrant": False})
    with attending("long apart", dry):
        found["checkpointed to not"] = far(measured(half, packed)[1], gradients)
    attention.prepare(exact)
    with attending("long apart", dry), torch.autocast(device, dtype=torch.bfloat16):
        found["autocast"] = {"gradients": far(measured(exact, packed)[1], slopes)}
    yardstick = found["alone"]
    right = all(is_right(found[f"packed {path}"][key], yardstick[key]) for path in PATHS for key in yardstick)
    right = right and found["checkpointed to not"] <= yardstick["gradients"]  # a GPU's sums have no fixed order
    return {"right": right and is_right(found["autocast"]["gradients"], yardstick["gradients"])} | found


def catcher():
    """Make a callback that keeps the gradients of the first step, before the optimizer, and its loss."""
    from transformers import TrainerCallback

    class Catcher(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            grads = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
            self.gradients = torch.cat(grads).cpu()

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.loss = logs.get("loss", getattr(self, "loss", None))

        def on_train_end(self, args, state, control, **kwargs):
            raise benchmark_run.Finished

    return Catcher()


def by_hand(model, rows, device: str) -> float:
    """Return SoLo-ORPO's loss with the squared penalty by definition, one sequence at a time; beta 0.1, alpha 1."""

    def odds(x):
        return x - torch.log(1 - torch.exp(x))

    losses = []
    for row in rows:
        pair = [row["chosen_ids"], row["rejected_ids"]]
        w, r, long_w = (x.mean() for x in alone(
            model, [(row["short_prompt_ids"], pair), (row["long_prompt_ids"], pair[:1])], device
        ))  # fmt: skip
        losses.append(-w - 0.1 * F.logsigmoid(odds(w) - odds(r)) + (odds(w) - odds(long_w)) ** 2)
    return torch.stack(losses).mean().item()


@contextmanager
def small_trainings(dry: bool, device: str):
    """Give a function that takes one step of a small model through the real trainer, and its folder: model, rows.

    The penalty is squared: the absolute one has a kink at 0, where rounding alone turns a gradient round.
    """
    from benchmark_run import put_back
    from llamafactory.train.tuner import run_exp
    from make_tiny_model import train_tokenizer

    lengths = dict(short=24, response=8, L=64) if dry else dict(short=200, response=40, L=1500)
    settings = dict(model={"vocab_size": 512}, device=device, attention="sdpa", optim="sgd", **lengths)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        weights = small_qwen2(dry, 512).to(torch.bfloat16)  # the same in both, so that their rounding is no error
        for name, dtype in (("half", torch.bfloat16), ("model", torch.float32)):
            weights.to(dtype).save_pretrained(folder / name)
            train_tokenizer(["text"], 512).save_pretrained(folder / name)
        benchmark_run.write_rows(folder, settings, settings["L"])

        def take(variant, how, half, checkpointing, tuning, loss, **options):
            run = dict(variant=variant, tuning=tuning, length=settings["L"], loss=loss, steps=1, reference=None)
            own = settings | {"dtype": "bfloat16" if half else "float32", "checkpointing": checkpointing}
            changes = dict(train_from_scratch=False, max_steps=1, per_device_train_batch_size=2, max_grad_norm=0.0,
                           pref_beta=0.1, solopo_alpha=1.0, solopo_penalty="squared")  # fmt: skip
            if half and not dry:  # a model keeps the precision of its checkpoint
                changes["model_name_or_path"] = str(folder / "half")
            recipe = benchmark_run.recipe_of(own, run, folder) | changes | options
            if dry and recipe["pure_bf16"]:  # the host has that on a GPU only
                recipe |= {"pure_bf16": False, "bf16": True}
            seen = catcher()
            with put_back(), attending(how, dry):
                benchmark_run.use_rows_as_given()
                try:
                    run_exp(recipe, callbacks=[seen])
                except benchmark_run.Finished:
                    pass
            return seen

        yield take, folder


def trainer(dry: bool, device: str) -> dict:
    """Compare the forms of a step with two stages in fp32, and that with a loss by hand."""
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM

    forms = {
        # name: recipe's form, attention of a packed row, 16 bits, checkpointing
        "two stages, fp32": ("S1", "sdpa", False, True),
        "two stages": ("P2", "sdpa", True, True),
        "packed sdpa": ("S3", "sdpa", True, True),
        "packed varlen": ("S3", "varlen", True, True),
        "packed long apart": ("S3", "long apart", True, True),
        "packed long apart, not checkpointed": ("S3", "long apart", True, False),
    }
    found, right = {}, True
    with small_trainings(dry, device) as (take, folder):
        rows = load_from_disk(str(next(folder.glob("*-solopo"))))["train"].select(range(2))
        exact = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="sdpa").to(device)
        with torch.no_grad():
            found["orpo by hand, fp32"] = {"loss": by_hand(exact, rows, device)}
        for tuning, loss in (("full", "orpo"), ("lora", "sigmoid")):
            seen = {name: take(*form, tuning, loss) for name, form in forms.items()}
            truth, yardstick = seen["two stages, fp32"], seen["two stages"]
            size, error = abs(yardstick.loss - truth.loss), far(yardstick.gradients, truth.gradients)
            for name, step in seen.items():
                gradients = far(step.gradients, truth.gradients)
                ok = is_right(abs(step.loss - truth.loss), size) and is_right(gradients, error)
                right = right and (ok or name == "packed sdpa")
                found[f"{tuning} {loss} {name}"] = {"loss": step.loss, "gradients": gradients}
            if loss == "orpo":
                right = right and abs(truth.loss - found["orpo by hand, fp32"]["loss"]) < 1e-3 * abs(truth.loss)
    return {"right": right} | found


def options(dry: bool, device: str) -> dict:
    """Compare a packed step under keys of the host that change how a model runs with one without; fp32 is the truth.

    Dry, the compiler is left out (its frontend runs), and what needs a GPU is not run.
    """
    keys = {"torch_compile": {"torch_compile": True, "torch_compile_backend": "eager" if dry else "inductor"}}
    if not dry:
        keys["use_unsloth_gc"] = {"use_unsloth_gc": True}
    if not dry and find_spec("liger_kernel"):
        keys["enable_liger_kernel"] = {"enable_liger_kernel": True}  # the last: it replaces modules for good
    found, right = {}, True
    with small_trainings(dry, device) as (take, _):
        truth = take("S1", "sdpa", False, True, "full", "orpo")
        plain = take("S3", "long apart", True, True, "full", "orpo")
        error, size = far(plain.gradients, truth.gradients), abs(plain.loss - truth.loss)
        found["none of them"] = {"loss": plain.loss, "gradients": error}
        for name, key in keys.items():
            step = take("S3", "long apart", True, True, "full", "orpo", **key)
            gradients = far(step.gradients, truth.gradients)
            right = right and is_right(abs(step.loss - truth.loss), size) and is_right(gradients, error)
            found[name] = {"loss": step.loss, "gradients": gradients}
    return {"right": right} | found


def both_ways(path, x, plan, slope, dry):
    """Return a function without arguments that runs one attention forward and backward, by a path's name."""

    def run():
        for t in x:
            t.grad = None
        with attending(path, dry, 24 if dry else packing.LONG):
            PATHS[path](*x, plan.layout(x[0].device), x[0].shape[-1] ** -0.5).backward(slope)

    return run


def at_7b(row, device):
    """Draw states of Qwen2.5-7B's heads for a row, and a slope for the output."""
    x = states(row["input_ids"].shape[1], 28, 4, 128, device)
    return x, torch.ones(1, x[0].shape[2], 28, 128, dtype=torch.bfloat16, device=device)


def kernels(dry: bool, device: str) -> dict:
    """Name the kernels that one attention call of a packed row launches."""
    from torch.profiler import ProfilerActivity, profile

    found = {}
    for batch in (1, 4):
        row, _ = row_of([(16, 64, 8, 8) if dry else (128, 1024, 64, 64)] * batch)
        x, slope = at_7b(row, device)
        for name in PATHS:
            run = both_ways(name, x, row["plan"], slope, dry)
            run()
            with profile(activities=[ProfilerActivity.CPU if dry else ProfilerActivity.CUDA]) as seen:
                run()
                if not dry:
                    torch.cuda.synchronize()
            names = [e.name for e in seen.events() if dry or "cuda" in str(e.device_type).lower()]
            attends = Counter(n[:60] for n in names if any(s in n.lower() for s in ("flash", "fmha", "cudnn", "sdp")))
            found[f"batch {batch}, {name}"] = {"launches": len(names), "attention": dict(attends.most_common(6))}
    return found


def seconds(function: Callable[[], None], dry: bool) -> float:
    """Return the wall clock of a call, in seconds, its work on the card included."""
    if not dry:
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if not dry:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def speed(dry: bool, device: str) -> dict:
    """Time attention of a packed row: once at a length that was there before (ms), once at a new one (new_ms).

    Real rows are new lengths, for which cuDNN prepares first. Causal pairs only are counted: forward 4 FLOP each and
    head dimension, backward 2.5 times that.
    """
    found: dict = {"apart_from": 24 if dry else packing.LONG}
    S, R = (16, 8) if dry else (1024, 256)
    for L in (64,) if dry else (1024, 2048, 4096, 8192, 16384, 32768, 65536):
        flops = 3.5 * 4 * 28 * 128 * ((S + R) ** 2 / 2 + R * S + R * R / 2 + (L + R) ** 2 / 2)
        times = {name: [] for name in PATHS}
        for more in (0, 1, 2, 3):
            row, _ = row_of([(S + more, L + more, R + more, R)])
            x, slope = at_7b(row, device)
            for name, path in times.items():
                run = both_ways(name, x, row["plan"], slope, dry)
                path.append((seconds(run, dry), min(seconds(run, dry) for _ in range(2))))
            del x, slope
        for name, path in times.items():
            new, known = (statistics.median(kind) for kind in zip(*path[1:], strict=True))
            rate = {"TFLOP/s": round(flops / known / 1e12, 2)}
            found[f"{L} {name}"] = {"ms": round(1e3 * known, 3), "new_ms": round(1e3 * new, 3)} | rate
    return found


PARTS = {part.__name__: part for part in (op, model, trainer, kernels, speed, options)}
LAST = ("options",)  # of the command: less telling than steps, and a compiler takes its time


def arguments(argv: list[str] | None = None) -> SimpleNamespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds since 1970 at which to end")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--cli", action="store_true", help="this part alone")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[n for n in PARTS if n not in LAST])
    return parser.parse_args(argv)


def is_done(name: str, seen: dict, dry: bool) -> bool:
    """Return whether a part was measured, came out right, and lacks no package that is here now."""
    lacks = name == "options" and not dry and find_spec("liger_kernel") and "enable_liger_kernel" not in seen
    return seen.get("status") == "ok" and seen.get("right", True) and not lacks


def main(argv: list[str] | None = None) -> bool:
    """Run the parts that the JSON lacks or has as wrong; returns whether all that can be right is."""
    args = arguments(argv)
    device, all_right = "cpu" if args.dry else "cuda", True
    if not args.dry and not torch.cuda.is_available():
        sys.exit("> This needs a GPU and torch sees none; `--dry` runs on a CPU.")
    document = record.dated(record.load(args.out, hardware=benchmark_run.hardware(device))) | {"dry": args.dry}
    for name, part in {"cli": cli}.items() if args.cli else [(name, PARTS[name]) for name in args.parts]:
        if is_done(name, document["check"].get(name, {}), args.dry):
            continue
        if time.time() > args.until:
            tell(f"{name}: skipped, no time left")
            all_right = False
            continue
        began = time.perf_counter()
        try:
            seen = {"status": "ok"} | part(args.dry, device)
        except Exception as error:  # one part must not take the others with it
            import traceback

            seen = {"status": "failed", "log": "".join(traceback.format_exception(error))[-3000:]}
        document["check"][name] = seen | {"whole_s": round(time.perf_counter() - began, 1)}
        record.save(document, args.out)
        all_right = all_right and seen["status"] == "ok" and seen.get("right", True)
        verdict = seen["log"].strip().splitlines()[-1] if seen["status"] == "failed" else json.dumps(seen)[:300]
        tell(f"{name} ({document['check'][name]['whole_s']} s): {verdict}")
    return all_right


if __name__ == "__main__":
    code = 0 if main() else 1
    sys.stdout.flush()
    os._exit(code)  # threads of the host may outlive the interpreter
