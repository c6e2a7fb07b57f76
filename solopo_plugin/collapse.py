"""See in the trainer's log that the alignment is bought by unlearning the short answer. Nothing of torch is imported.

The alignment term is 0 where both rewards are equal, also where both are low: its gradient through the short side can
pull the short reward down to the long one (docs/training.md, "Diagnostics").
"""

REWARD, GAP, NLL = "solopo/reward_short", "solopo/reward_gap", "solopo/nll"
# All ours, chosen on the lab's runs (docs/lab.md) to be silent in doubt; single logs of runs that end well pass each.
UNLEARNED = 0.25  # nats per token that the chosen answer has to lose at least, where doubling is less
SHARE = 0.5  # of the first gap, which the short reward has to lose
LOGS = 3  # in a row, so that a log of hard rows is not taken for it


def collapse(log_history: list[dict]) -> tuple[dict, dict] | None:
    """Return the first and the latest logged means if each of the last `LOGS` logs shows the collapse, else None.

    Args:
        log_history: As in the trainer's state; entries without the step's metrics (evaluations) are passed over.
    """
    log = [entry for entry in log_history if NLL in entry]
    if len(log) <= LOGS or not all(collapsed(log[0], now) for now in log[-LOGS:]):
        return None
    return log[0], log[-1]


def collapsed(start: dict, now: dict) -> bool:
    """Return whether the short answer is unlearned, and its reward's fall is much of what closed the gap.

    The short reward has to fall by `SHARE` of the first gap, and the NLL, whose scale is the same for every loss, to
    double. Rewards are compared with rewards only, so that their scale cancels. Where the gap closes by less than a
    third of the fall, the long reward falls along, which the preference loss alone can do; where by more than twice the
    fall, the long reward has risen further.
    """
    fall, closed = start[REWARD] - now[REWARD], start[GAP] - now[GAP]
    doubled = now[NLL] - start[NLL] > max(UNLEARNED, start[NLL])
    return doubled and fall > SHARE * start[GAP] and fall / 3 < closed < 2 * fall
