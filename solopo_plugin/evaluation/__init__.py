"""From a model to numbers: questions of the benchmarks, answers, scores, statistics, a report.

What stands in an evaluation's folder (JSON lines, one object a line; see items.py and results.py for the fields):

    items.jsonl               every question with its prompt and gold answers
    answers.db                every answer as soon as it comes; see qa/store.py
    answers/<model>.jsonl     what a model answered, with the hash of the prompt; written when it has answered
    scores/<model>.jsonl      each answer's scores
    results.json              means with intervals, comparisons, the choice of a checkpoint
    report/                   the same as a page, Markdown, CSV and pictures
"""
