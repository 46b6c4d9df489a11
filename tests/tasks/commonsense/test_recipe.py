"""As LLM-Adapters trains and tests: whole sequences, cut at their end, chosen by loss, one model for eight sets."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

import flora.models
from flora.config import instantiate
from flora.models import TransformersModel
from flora.tasks import Commonsense
from flora.tasks.commonsense.questions import EIGHT, TRAINING_PROMPT
from flora.tasks.metrics import SetsOfQuestions
from flora.training.resume import KeepBest
from tests.tasks.commonsense.test_task import ROWS, Writer, boolq, language_model, load, task  # noqa: F401
from tests.tasks.texts import WORDS, word_tokenizer, write_rows

CONFIGS = Path(__file__).parents[3] / "configs"
END = 3  # of word_tokenizer


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def spec(monkeypatch):
    monkeypatch.setattr(TransformersModel, "tokenizer", lambda self: word_tokenizer())
    return flora.models.get("smollm2_135m")


def composed(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", ["task=commonsense", "model=llama_7b", *overrides])


def test_the_recipe_is_that_of_llm_adapters():
    cfg = composed()
    mine, settings, protocol = instantiate(cfg.task), instantiate(cfg.trainer), instantiate(cfg.protocol)
    # finetune.py and its command for the commonsense sets: batch 16, 3 epochs, cutoff 256, 120 to evaluate on every 80
    # steps, train_on_inputs true, warm-up 100, linear; commonsense_evaluate.py: four beams.
    assert (mine.loss_on, mine.max_length, mine.validation_size, mine.beams) == ("sequence", 256, 120, 4)
    assert (settings.batch_size, settings.epochs, settings.eval_steps, settings.warmup_steps) == (16, 3, 80, 100)
    assert (settings.schedule, settings.weight_decay) == ("linear", 0.0)
    assert (protocol.select, protocol.select_by, protocol.final_train) == ("best", "loss", "train")
    arguments = settings.arguments(Path("x"), 0, "loss", True, False)
    assert (arguments.greater_is_better, arguments.eval_steps) == (False, 80)


def test_the_prompt_to_train_on_is_that_of_finetune_py():
    lines = TRAINING_PROMPT.split("\n")
    task_, *rest = lines
    assert task_.endswith("Write a response that appropriately completes the request.  ")
    assert rest == [
        "",
        f"{'':16}### Instruction:",
        f"{'':16}{{instruction}}",
        f"{'':16}",
        f"{'':16}### Response:",
        f"{'':16}",
    ]


def test_every_token_is_learnt_and_the_text_is_one(boolq):  # noqa: F811
    tokenizer, train = word_tokenizer(), load(boolq, loss_on="sequence").train
    known = []
    for i in range(12):
        question = ROWS["boolq"][1].replace("is the cat true", f"is the {WORDS[2 + i % 2]} {WORDS[i]}")
        text = TRAINING_PROMPT.format(instruction=question) + f"the correct answer is {('false', 'true')[i % 2]}"
        known.append(tokenizer(text)["input_ids"])  # its template ends them
    rows = [train[i] for i in range(len(train))]
    assert len(rows) == 10
    for row in rows:
        assert row["input_ids"].tolist() in known
        assert row["labels"].tolist() == [-100, *row["input_ids"].tolist()[1:]]
        assert row["input_ids"][-1] == END


def test_the_loss_is_that_of_transformers_on_all_tokens_and_is_what_validation_says(boolq, spec):  # noqa: F811
    model, splits = language_model(), load(boolq, loss_on="sequence")
    mine, rows = task(loss_on="sequence"), splits.validation.answered
    batch = splits.validation.__getitems__([0, 1])
    each = [(rows[i]["input_ids"][None], len(rows[i]["input_ids"]) - 1) for i in range(2)]
    with torch.no_grad():
        expected = sum(model(input_ids=ids, labels=ids).loss * n for ids, n in each) / sum(n for _, n in each)
        scores, targets = mine.forward(spec)(model, batch, False)
        assert mine.loss(scores, targets, 0.0).item() == pytest.approx(expected.item(), abs=1e-5)
        training = mine.loss(*mine.forward(spec)(model, rows.__getitems__([0, 1]), True), 0.0)
        assert training.item() == pytest.approx(expected.item(), abs=1e-5)
    assert scores.shape == (2, 2)


def test_long_texts_lose_their_end_in_training_and_nothing_where_they_are_asked(boolq):  # noqa: F811
    questions = {"question": ["cat " * 90] * 8, "label": [0, 1] * 4}
    for split in ("train", "validation"):
        write_rows(boolq / "boolq" / f"{split}.parquet", questions)
    splits = load(boolq, loss_on="sequence", max_length=60)
    assert splits.facts["truncated"] == {"train": 6, "validation": 0, "test": 0}
    assert set(splits.train.lengths) == {60}
    row = splits.train[0]["input_ids"].tolist()
    assert row[0] == 2, "the beginning stays"
    assert row[-1] != END, "there is no room for the end"
    assert min(splits.test.lengths) > 100


@pytest.mark.parametrize("beams", [1, 4])
def test_what_is_written_is_searched_for_with_beams(boolq, spec, beams):  # noqa: F811
    class Asked(Writer):
        def generate(self, input_ids, **options):
            self.options = options
            return super().generate(input_ids, **options)

    writer = Asked("is false")
    splits = load(boolq)
    mine = task(answers="generated", beams=beams)
    scores, _ = mine.forward(spec)(writer, splits.test.__getitems__([0, 1]), False)
    assert scores.argmax(1).tolist() == [1, 1]
    assert (writer.options["num_beams"], writer.options["max_new_tokens"]) == (beams, 32)
    assert writer.options["do_sample"] is False
    # To choose on, nothing is written: a network that can only write would fail.
    _, targets = mine.forward(spec)(language_model(), splits.validation.__getitems__([0]), False)
    assert targets.shape == (1, 2)


def test_four_beams_find_a_likelier_text_than_the_likeliest_tokens():
    from flora.tasks.text.causal import write_out

    torch.manual_seed(0)
    model, ids = language_model(), torch.tensor([[2, 5, 6]])
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.6)

    def likelihood(beams):
        written = write_out(model, ids, torch.ones_like(ids), 4, 0, END, beams)
        whole = torch.cat([ids, written], 1)
        with torch.no_grad():
            logs = model(whole).logits.log_softmax(-1)[0, 2:-1]
        return logs.gather(1, written[0, :, None]).sum().item()

    assert likelihood(4) >= likelihood(1)


def test_the_usual_answer_is_that_of_training_among_the_same_answers(tmp_path, spec):
    three = {"label": list("ABC"), "text": list("abc")}
    two = {"label": ["1", "2"], "text": list("ab")}
    columns = {"question": ["who"] * 10, "choices": [three] * 6 + [two] * 4, "answerKey": [*"CCCCAB", *"2221"]}
    write_rows(tmp_path / "arc_c" / "train.parquet", columns)
    write_rows(tmp_path / "arc_c" / "test.parquet", {key: values[4:8] for key, values in columns.items()})
    mine = task("arc_c", answers="majority", validation_size=1)
    splits = load(tmp_path, "arc_c", validation_size=1)
    scores, right = mine.forward(spec)(None, splits.test.__getitems__([0, 1, 2, 3]), False)
    assert scores.argmax(1).tolist() == [2, 2, 1, 1]
    assert right.tolist() == [0, 1, 1, 1]
    assert mine.metrics().compute(predictions=scores.numpy(), references=right.numpy())["accuracy"] == 0.5


@pytest.fixture
def eight(tmp_path):
    """LLM-Adapters' files: its mix, and of each set two questions, of which the answers are as in ROWS."""
    folders = {"siqa": "social_i_qa", "arc_e": "ARC-Easy", "arc_c": "ARC-Challenge", "obqa": "openbookqa"}
    rows = {name: {"instruction": ROWS[name][1], "answer": ROWS[name][2]} for name in EIGHT}
    for name, row in rows.items():
        place = tmp_path / folders.get(name, name) / "test.json"
        place.parent.mkdir()
        place.write_text(json.dumps([row] * 2))
    (tmp_path / "commonsense_170k.json").write_text(json.dumps(list(rows.values()) * 2))
    return tmp_path


def test_one_model_answers_all_eight_sets(eight, spec):
    mine = task("all", train="mix")
    splits = load(eight, "all", train="mix")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (14, 2, 16)
    assert len(mine.files(eight)[1]) == 9
    batch = splits.test.__getitems__(range(16))
    assert batch["labels"][:, 1].tolist() == [i // 2 for i in range(16)]
    with torch.no_grad():
        scores, right = mine.forward(spec)(language_model(), batch, False)
    assert mine.loss(scores, right, 0.0).isfinite()
    metrics = mine.metrics().compute(predictions=scores.numpy(), references=right.numpy())
    assert metrics.keys() == {"accuracy", *(f"{name}_accuracy" for name in EIGHT)}
    assert splits.test.subset(5).sets.tolist() == sorted(splits.test.subset(5).sets.tolist())
    held_out = splits.validation.__getitems__([0, 1])["labels"]
    assert mine.metrics().compute(predictions=np.eye(2)[[0, 0]], references=held_out.numpy()).keys() == {"accuracy"}


def test_the_accuracy_over_sets_is_the_mean_of_theirs():
    references = np.array([[0, 0], [0, 0], [0, 0], [0, 0], [1, 1], [1, 1]])
    found = SetsOfQuestions(["a", "b"]).compute(predictions=np.eye(2)[[0, 0, 0, 1, 1, 0]], references=references)
    assert found == {"accuracy": 0.625, "a_accuracy": 0.75, "b_accuracy": 0.5}


def test_the_least_loss_is_kept():
    model = nn.Linear(1, 1, bias=False)
    keep = KeepBest(model, "loss")
    for step, (weight, loss) in enumerate([(1.0, 0.9), (2.0, 0.3), (3.0, 0.5)], 1):
        nn.init.constant_(model.weight, weight)
        keep.on_evaluate(None, SimpleNamespace(global_step=step), None, {"eval_loss": loss, "eval_accuracy": weight})
    keep.on_train_end(None, SimpleNamespace(global_step=3), None)
    assert (model.weight.item(), keep.step) == (2.0, 2)


def test_saved_runs_from_before_are_tested_as_they_were():
    old = Commonsense(name="commonsense", dataset="boolq", epochs=1)
    assert (old.loss_on, old.beams) == ("answer", 1)
