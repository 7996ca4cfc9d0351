"""How good a model's answers, passages and probabilities are (paper §4 and appendix H).

questions = read_questions("questions.jsonl")
evaluation = evaluate(rag, questions, k=5)
evaluation.summary["exact_match"], evaluation.intervals["exact_match"]
"""

from ragstone.evaluation.results import (
    Evaluation,
    Prediction,
    ReadPassage,
    compare,
    read_predictions,
    summarize,
    write_predictions,
)
from ragstone.evaluation.running import evaluate
from ragstone.evaluation.statistics import Comparison, bootstrap_interval, compare_scores
from ragstone.evaluation.trec import Run, read_run, write_run
from ragstone.questions import Question, read_questions

__all__ = [
    "Comparison",
    "Evaluation",
    "Prediction",
    "Question",
    "ReadPassage",
    "Run",
    "bootstrap_interval",
    "compare",
    "compare_scores",
    "evaluate",
    "read_predictions",
    "read_questions",
    "read_run",
    "summarize",
    "write_predictions",
    "write_run",
]
