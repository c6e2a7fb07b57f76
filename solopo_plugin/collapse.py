"""Sees in the trainer's log that the alignment is bought by unlearning the short answer. Nothing of torch is imported.

The alignment term is 0 where both rewards are equal, also where both are low: its gradient through the short side can
pull the short reward down to the long one (README, "Diagnostics").
"""

REWARD, GAP, NLL = "solopo/reward_short", "solopo/reward_gap", "solopo/nll"
# Both ours, chosen to be silent in doubt. Nats per token mean the same for every loss, beta and length: at 1 the chosen
# answer's tokens are e times less probable than at the start. DPO alone also lowers its chosen responses. In the lab
# (docs/lab.md) single logs of runs that ended well rose by up to 1.5 on the way, collapsed runs ended 3 to 8 above.
UNLEARNED = 1.0
LOGS = 3  # in a row, so that a log of hard rows is not taken for it


def collapse(log_history: list[dict]) -> tuple[dict, dict] | None:
    """The first and the latest logged means if each of the last `LOGS` logs shows the collapse, else None.

    Args:
        log_history: As in the trainer's state; entries without the step's metrics (evaluations) are passed over.
    """
    log = [entry for entry in log_history if NLL in entry]
    if len(log) <= LOGS or not all(collapsed(log[0], now) for now in log[-LOGS:]):
        return None
    return log[0], log[-1]


def collapsed(start: dict, now: dict) -> bool:
    """Whether the short answer is unlearned, and its reward's fall is most of what closed the gap.

    The NLL has to rise by `UNLEARNED` and, where it was above that, to double. Rewards are compared with rewards only,
    so that their scale cancels. Where the gap closes by less than half of the fall, the long reward falls along, which
    the preference loss alone can do; where by more than twice the fall, the long reward has risen further.
    """
    fall, closed = start[REWARD] - now[REWARD], start[GAP] - now[GAP]
    return now[NLL] - start[NLL] > max(UNLEARNED, start[NLL]) and fall / 2 < closed < 2 * fall
