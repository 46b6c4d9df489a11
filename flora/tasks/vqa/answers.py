"""How written answers are scored: exactly, as VQAv2 does against ten people, and yes or no as POPE does."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from flora.tasks.vqa.dialogues import Dialogue

# Goyal et al. 2017, arXiv 1612.00837, in the words of vqaEval.py of github.com/GT-Vision-Lab/VQA: how answers are
# brought to one form. A contraction that lacks an apostrophe gets it back, unless it is another word without it.
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA = re.compile(r"\d,\d")
_NO = {"no", "not", "false"}
_YES = {"yes", "true"}


def _with_gaps(word: str) -> list[str]:
    """A contraction without one or several of its apostrophes."""
    parts = word.split("'")
    joints = itertools.product(("'", ""), repeat=len(parts) - 1)
    return ["".join(itertools.chain(*zip(parts, [*joint, ""], strict=True))) for joint in joints][1:]


_WHOLE = {gap: word for word in _CONTRACTIONS.split() for gap in _with_gaps(word)}


def without_punctuation(text: str) -> str:
    """A text without the marks that VQAv2's evaluation drops; between words they become spaces."""
    plain = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_space or _COMMA.search(text) else " ")
    return _PERIOD.sub("", plain)


def normalised(text: str) -> str:
    """An answer as VQAv2's evaluation compares it: small letters, digits, no articles, no punctuation."""
    words = without_punctuation(" ".join(text.split())).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_WHOLE.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(written: str, answers: Sequence[str]) -> float:
    """VQAv2's accuracy against the answers of ten people: the mean over the nine others of min(1, those who agree / 3).

    People's answers lose their punctuation only where they differ, as in the official evaluation.
    """
    given = [without_punctuation(answer) for answer in answers] if len(set(answers)) > 1 else list(answers)
    same = [answer == normalised(written) for answer in given]
    return float(np.mean([min(1.0, (sum(same) - mine) / 3) for mine in same]))


def textvqa_accuracy(written: str, answers: Sequence[str]) -> float:
    """TextVQA's accuracy: as ``vqa_accuracy``, but people's answers are brought to one form as the written one is.

    Singh et al. 2019, arXiv 1904.08920; the form is that of EvalAI's processor (pythia/tasks/processors.py of
    github.com/facebookresearch/mmf), which also drops commas and question marks, and sets a possessive apart.
    """
    one, *given = (
        normalised(text.lower().replace(",", "").replace("?", "").replace("'s", " 's")) for text in (written, *answers)
    )
    same = [answer == one for answer in given]
    return float(np.mean([min(1.0, (sum(same) - mine) / 3) for mine in same]))


def says_yes(text: str) -> bool:
    """Whether an answer says yes, as POPE reads it: unless its first sentence has a word that says no.

    Li et al. 2023, arXiv 2305.10355, evaluate.py of github.com/RUCAIBox/POPE; ``false`` is a no here as well.
    """
    words = text.split(".")[0].replace(",", "").lower().split()
    return not _NO.intersection(words)


def scores(written: Sequence[str], asked: Sequence[Dialogue]) -> dict[str, float]:
    """All scores of written answers, in [0, 1].

    ``exact_match`` with the first answer after ``normalised``, also per kind of question; ``vqa_accuracy`` where all
    questions have several answers, and ``any_match`` with any of them where some have; of questions to be answered by
    yes or no (or true or false) ``yes_no_accuracy``, ``yes_no_precision``, ``yes_no_recall``, ``yes_no_f1`` and
    ``yes_share``, the share of yes.
    """
    right = [normalised(text) == normalised(dialogue.answers[0]) for text, dialogue in zip(written, asked, strict=True)]
    values = {"exact_match": float(np.mean(right))}
    kinds = defaultdict(list)
    for ok, dialogue in zip(right, asked, strict=True):
        kinds[dialogue.kind].append(ok)
    values |= {f"exact_match_{kind}": float(np.mean(kinds[kind])) for kind in sorted(kinds) if len(kinds) > 1}
    if all(len(dialogue.answers) > 1 for dialogue in asked):
        each = [vqa_accuracy(text, dialogue.answers) for text, dialogue in zip(written, asked, strict=True)]
        values["vqa_accuracy"] = float(np.mean(each))
    if any(len(dialogue.answers) > 1 for dialogue in asked):
        accepted = [{normalised(answer) for answer in dialogue.answers} for dialogue in asked]
        hits = [normalised(text) in answers for text, answers in zip(written, accepted, strict=True)]
        values["any_match"] = float(np.mean(hits))
    return values | yes_no(written, [dialogue.answers[0].lower() for dialogue in asked])


def yes_no(written: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """The scores of yes or no among ``scores``, of the answers that are one of these; nothing where none is."""
    asked = [(text, answer) for text, answer in zip(written, answers, strict=True) if answer in ("no", "false", *_YES)]
    pairs = [(says_yes(text), answer in _YES) for text, answer in asked]
    if not pairs:
        return {}
    counts = Counter(pairs)
    hits, said, true = counts[True, True], counts[True, True] + counts[True, False], sum(yes for _, yes in pairs)
    precision, recall = hits / max(said, 1), hits / max(true, 1)
    return {
        "yes_no_accuracy": (hits + counts[False, False]) / len(pairs),
        "yes_no_precision": precision,
        "yes_no_recall": recall,
        "yes_no_f1": 2 * precision * recall / max(precision + recall, 1e-12),
        "yes_share": said / len(pairs),
    }


class Written(evaluate.Metric):
    """``scores`` of generated tokens, or others.

    Args:
        asked: every question of a task.
        decode: from tokens, negative ones being padding, to a text.
        score: all metrics of texts and the questions that they answer.

    Attributes:
        texts: what the last ``compute`` read, by index of the question.
    """

    greater_is_better = True

    def __init__(
        self,
        asked: Sequence[Dialogue],
        decode: Callable[[np.ndarray], str],
        score: Callable[[Sequence[str], Sequence[Dialogue]], dict[str, float]] = scores,
    ) -> None:
        self.asked, self.decode, self.score = asked, decode, score
        self.texts: Mapping[int, str] = {}
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(predictions=datasets.Value("string"), references=datasets.Value("int64"))
        return evaluate.MetricInfo(description=self.__class__.__doc__, citation="", features=features)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        """Score tokens ``[N, T]`` as answers to the questions of these indices ``[N]``, each question once."""
        indices = [int(index) for index in references]
        texts = [self.decode(np.asarray(row)) for row in predictions]
        self.texts = dict(zip(indices, texts, strict=True))
        return self.score(list(self.texts.values()), [self.asked[index] for index in self.texts])
