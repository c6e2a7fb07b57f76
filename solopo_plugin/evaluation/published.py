"""Hold the numbers of the paper that stand beside, never among, what is measured here: SoLoPO, arXiv:2505.11166.

Averages of LongBench v1 QA and RULER QA (F1, 0 to 100) by model and training, from the paper's Table 3. All of them are
the paper's; this project has measured none. They are comparable in so far as the benchmark is; what is known to differ
stands in `CAVEATS`.
"""

from dataclasses import dataclass

from .items import LONGBENCH

SOURCE = "arXiv:2505.11166"
CAVEATS = (
    "The published numbers are the paper's averages. Its prompt is not published; this one is worded otherwise. "
    "Its checkpoints were chosen by LongBench v1 QA itself. Its RULER questions and distractors are not these."
)
DOUBTFUL = "? Doubtful: the paper's LongBench v1 rows of these two repeat its rows of SFT in every column."


@dataclass(frozen=True)
class Published:
    """One row of the paper: averages over all tasks (and lengths) of a benchmark."""

    model: str
    training: str  # what it was trained by, and on which contexts
    averages: dict[str, float]  # benchmark -> F1
    doubtful: tuple[str, ...] = ()  # benchmarks whose value is to be doubted

    @property
    def name(self) -> str:
        """Name of the row in a table."""
        return f"{self.model}, {self.training}"


def _row(model: str, training: str, longbench: float, ruler: float, doubtful: tuple[str, ...] = ()) -> Published:
    return Published(model, training, {"longbench_qa": longbench, "ruler_qa": ruler}, doubtful)


QWEN, LLAMA = "Qwen2.5-7B", "Llama3.1-8B"
PUBLISHED = [
    _row(QWEN, "instruct model", 34.4, 44.0),
    _row(QWEN, "SFT short", 38.6, 48.7),
    _row(QWEN, "SFT long", 45.3, 59.5),
    _row(QWEN, "DPO short", 43.2, 56.6),
    _row(QWEN, "DPO long", 46.9, 62.2),
    _row(QWEN, "SoLo-DPO", 47.8, 62.8),
    _row(QWEN, "SimPO short", 44.1, 56.0),
    _row(QWEN, "SimPO long", 44.6, 57.5),
    _row(QWEN, "SoLo-SimPO", 48.4, 63.9),
    _row(QWEN, "ORPO short", 38.6, 57.1, ("longbench_qa",)),
    _row(QWEN, "ORPO long", 45.3, 55.1, ("longbench_qa",)),
    _row(QWEN, "SoLo-ORPO", 49.5, 65.1),
    _row(QWEN, "LongPO, trained again by the paper", 43.7, 52.2),
    _row(QWEN, "LongPO-Qwen2.5-7B-128K, its authors' checkpoint", 32.9, 45.9),
    _row(LLAMA, "instruct model", 39.8, 46.5),
    _row(LLAMA, "SFT short", 44.6, 59.2),
    _row(LLAMA, "SFT long", 46.1, 58.4),
    _row(LLAMA, "ORPO short", 44.1, 58.4),
    _row(LLAMA, "ORPO long", 45.4, 58.9),
    _row(LLAMA, "SoLo-ORPO", 46.3, 61.3),
    _row("Qwen2.5-32B", "instruct model", 41.9, 50.1),
    _row("Qwen2.5-72B", "instruct model", 49.4, 61.6),
    _row("Llama3.1-70B", "instruct model", 46.3, 54.1),
]
# what the averages run over; an evaluation of anything less or else is not put beside them
TASKS = {
    "longbench_qa": set(LONGBENCH),
    "ruler_qa": {"squad", "hotpotqa", "musique"},
}
LENGTHS = {4096, 8192, 16384, 32768}  # tokens, of ruler_qa


def matches(benchmark: str, tasks: set[str], lengths: set[int]) -> bool:
    """Tell whether the paper's averages of `benchmark` run over the same tasks and lengths."""
    return tasks == TASKS.get(benchmark) and (benchmark != "ruler_qa" or lengths == LENGTHS)
