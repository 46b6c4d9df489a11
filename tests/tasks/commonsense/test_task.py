"""Questions with listed answers: their words, what is trained on token by token, ranking and generation."""

import json

import pytest
import torch
import transformers
from torch.nn import functional as F

import flora.models
from flora.errors import ConfigError, DataError
from flora.methods import Full
from flora.methods.base import load as load_saved
from flora.models import TransformersModel
from flora.tasks import Commonsense
from flora.tasks.commonsense.questions import DATASETS, PROMPT, RESPONSE
from flora.tasks.commonsense.scores import named
from flora.tasks.text.dataset import TextDataset, starts_of
from tests.tasks.texts import SPECIAL, WORDS, word_tokenizer, write_rows

CHOICES = {"label": ["A", "B", "C"], "text": ["cats", "dogs", "mats"]}
# One row of each original dataset, and the instruction that LLM-Adapters makes of it.
ROWS = {
    "boolq": (
        {"question": "is the cat true", "passage": "the cat", "label": 0},
        "Please answer the following question with true or false, question: is the cat true?\n\n"
        "Answer format: true/false",
        "false",
    ),
    "piqa": (
        {"goal": "sat", "sol1": "on the mat", "sol2": "on the dog", "label": 1},
        "Please choose the correct solution to the question: sat\n\nSolution1: on the mat\n\nSolution2: on the dog\n\n"
        "Answer format: solution1/solution2",
        "solution2",
    ),
    "siqa": (
        {"context": "A cat sat.", "question": "Who sat?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
        "Please choose the correct answer to the question: A cat sat. Who sat?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
    ),
    "hellaswag": (
        {"activity_label": "Cats", "ctx": "A cat", "endings": ["sat", "ran", "slept", "is"], "label": "2"},
        "Please choose the correct ending to complete the given sentence: Cats: A cat\n\n"
        "Ending1: sat Ending2: ran Ending3: slept Ending4: is\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending3",
    ),
    "winogrande": (
        {"sentence": "The _ sat.", "option1": "cat", "option2": "mat", "answer": "1"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: The _ sat.\n\n"
        "Option1: cat Option2: mat Answer format: option1/option2",
        "option1",
    ),
    "arc_e": (
        {"question": "Who sat?", "choices": CHOICES, "answerKey": "B"},
        "Please choose the correct answer to the question: Who sat?\n\nAnswer1: cats Answer2: dogs Answer3: mats\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer2",
    ),
    "obqa": (
        {"question_stem": "Who sat?", "choices": CHOICES, "answerKey": "C"},
        "Please choose the correct answer to the question: Who sat?\n\nAnswer1: cats Answer2: dogs Answer3: mats\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
    ),
}
ROWS["arc_c"] = ROWS["arc_e"]
ROWS["sst2"] = (
    {"sentence": "the cat ", "label": 0},
    "Please say whether the sentence is positive or negative, sentence: the cat\n\nAnswer format: positive/negative",
    "negative",
)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def boolq(tmp_path):
    """Twelve questions to train on and four to test, right answers in turn; the folder."""
    for split, rows in {"train": 12, "validation": 4}.items():
        columns = {
            "question": [f"is the {WORDS[2 + i % 2]} {WORDS[i]}" for i in range(rows)],
            "passage": ["the cat sat"] * rows,
            "label": [i % 2 for i in range(rows)],
        }
        write_rows(tmp_path / "boolq" / f"{split}.parquet", columns)
    return tmp_path


def task(dataset="boolq", **options):
    return Commonsense(**{"name": "commonsense", "dataset": dataset, "epochs": 1, "validation_size": 2} | options)


def load(folder, dataset="boolq", tokenizer=None, **options):
    return task(dataset, **options).load(tokenizer=tokenizer or word_tokenizer(), max_length=512, data_dir=folder)


def language_model():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(SPECIAL + WORDS), **sizes)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("dataset", list(DATASETS))
def test_questions_read_as_in_llm_adapters(dataset):
    row, instruction, answer = ROWS[dataset]
    question = DATASETS[dataset].ask(row)
    assert question.instruction == instruction
    assert question.answers[question.right] == answer


def test_the_loss_is_on_the_answer_and_its_end_token_by_token(boolq):
    train = load(boolq).train
    vocabulary = SPECIAL + WORDS
    for example in (train[i] for i in range(len(train))):
        words = [vocabulary[i] for i in example["input_ids"]]
        masked = [word for word, target in zip(words, example["labels"], strict=True) if target == -100]
        learnt = [word for word, target in zip(words, example["labels"], strict=True) if target != -100]
        assert learnt in (["the", "[UNK]", "answer", "is", truth, "[SEP]"] for truth in ("true", "false"))
        assert words == masked + learnt
        assert masked[0] == "[CLS]"
        assert [t for t in example["labels"].tolist() if t != -100] == example["input_ids"].tolist()[-6:]


def test_left_padding_ends_all_examples_together():
    rows = TextDataset({"input_ids": torch.arange(5)}, starts_of([2, 3]), {}, {"input_ids": 9}, left=True)
    batch = rows.__getitems__([0, 1])
    assert batch["input_ids"].tolist() == [[9, 0, 1], [2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


def test_the_training_loss_is_that_of_transformers(boolq):
    model, train = language_model(), load(boolq).train
    spec = flora.models.get("smollm2_135m")
    batch = train.__getitems__(range(4))
    mine = task()
    labels = batch["labels"].clone()
    loss = mine.loss(*mine.forward(spec)(model, batch, True), 0.0)
    assert torch.equal(batch["labels"], labels), "the batch stays as it is"
    each = [train[i] for i in range(4)]  # one by one, without padding, under transformers' own loss
    with torch.no_grad():
        expected = [model(input_ids=e["input_ids"][None], labels=e["labels"][None]).loss for e in each]
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), abs=1e-5)


def test_scores_are_log_probabilities_of_the_answers(boolq):
    model, tokenizer = language_model(), word_tokenizer()
    splits = load(boolq)
    batch = splits.test.__getitems__([2, 0])
    scores, right = task().forward(flora.models.get("smollm2_135m"))(model, batch, False)
    assert torch.equal(right, batch["labels"])
    instructions = ["is the cat cat", "is the cat the"]
    for row, text in enumerate(instructions):
        question = DATASETS["boolq"].ask({"question": text, "label": 1})
        prompt = tokenizer(PROMPT.format(instruction=question.instruction))["input_ids"][:-1]
        for column, answer in enumerate(question.answers):
            ids = tokenizer(RESPONSE.format(answer=answer), add_special_tokens=False)["input_ids"] + [3]
            with torch.no_grad():
                logits = F.log_softmax(model(torch.tensor([prompt + ids])).logits[0], -1)
            expected = sum(logits[len(prompt) + i - 1, token].item() for i, token in enumerate(ids))
            assert scores[row, column].item() == pytest.approx(expected, abs=1e-4)
    assert batch["labels"].tolist() == [1, 1]


def test_questions_with_fewer_answers_never_lose_to_padding(tmp_path):
    choices = [{"label": list("ABC"), "text": list("abc")}, {"label": ["1", "2"], "text": list("ab")}] * 3
    columns = {"question": ["who"] * 6, "choices": choices, "answerKey": ["C", "2"] * 3}
    for split in ("train", "test"):
        write_rows(tmp_path / "arc_c" / f"{split}.parquet", columns)
    splits = load(tmp_path, "arc_c")
    batch = splits.test.__getitems__([1, 0])
    scores, _ = task("arc_c").forward(flora.models.get("smollm2_135m"))(language_model(), batch, False)
    assert scores.shape == (2, 3)
    assert scores[0, 2] == -1e9
    assert (scores[[0, 0, 1, 1, 1], [0, 1, 0, 1, 2]] > -1e3).all()
    assert splits.test.subset(2).right.tolist() == splits.test.right[[*splits_rows(splits.test)]].tolist()


def splits_rows(test):
    """Which questions ``subset(2)`` drew."""
    from flora.tasks.base import draw

    return sorted(draw(len(test), 0)[:2])


class Writer:
    """Stands for a language model that writes the same words after every prompt."""

    def __init__(self, words):
        self.ids = [(SPECIAL + WORDS).index(word) for word in words.split()]

    def generate(self, input_ids, **options):
        assert (input_ids[:, -1] != 0).all(), "prompts must be padded on the left"
        return torch.cat([input_ids, torch.tensor([self.ids] * len(input_ids))], 1)


@pytest.mark.parametrize(("words", "choice"), [("is false", 1), ("true not false", 0), ("the cat", 2)])
def test_generated_answers_are_the_first_listed_one_named(boolq, monkeypatch, words, choice):
    spec = flora.models.get("smollm2_135m")
    monkeypatch.setattr(TransformersModel, "tokenizer", lambda self: word_tokenizer())
    batch = load(boolq).test.__getitems__([0, 1, 3])
    scores, _ = task(answers="generated").forward(spec)(Writer(words.replace("not", "on")), batch, False)
    assert scores.argmax(1).tolist() == [choice] * 3


def test_the_first_name_counts():
    assert named("It is Answer2, not answer1", ["answer1", "answer2"]) == 1
    assert named("neither", ["answer1", "answer2"]) is None


def test_long_prompts_lose_their_beginning_never_the_answer(boolq):
    columns = {"question": ["cat " * 60, "the cat", "a dog"], "label": [0, 1, 0]}
    write_rows(boolq / "boolq" / "validation.parquet", columns)
    splits = load(boolq, max_length=100)
    assert splits.facts["truncated"] == {"train": 0, "validation": 0, "test": 1}
    assert max(splits.test.lengths) == 100
    cut = splits.test[0]
    assert (cut["targets"] == -100).sum(1).tolist() == [94, 94]
    assert [(SPECIAL + WORDS)[i] for i in cut["input_ids"][0, -6:]] == ["the", "[UNK]", "answer", "is", "true", "[SEP]"]


def test_the_json_of_llm_adapters_is_read_as_it_is(tmp_path):
    rows = [
        {
            "instruction": ROWS[name][1],
            "input": "",
            "output": f"the correct answer is {ROWS[name][2]}",
            "answer": ROWS[name][2],
        }
        for name in ("piqa", "siqa", "boolq", "winogrande")
    ]
    (tmp_path / "commonsense_170k.json").write_text(json.dumps(rows))
    (tmp_path / "social_i_qa").mkdir()
    (tmp_path / "social_i_qa" / "test.json").write_text(json.dumps([rows[1]]))
    splits = load(tmp_path, "siqa", train="mix")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (2, 2, 1)
    assert splits.test.right.tolist() == [2]
    assert splits.test.most == 3


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": ["a"] * 4, "label": [0, 1, 2, 0]}, r"row 2: label 2 is outside 0\.\.1"),
        ({"question": ["a"] * 4, "label": [0, 0.5, 1, 0]}, r"row 1: label 0\.5 is outside 0\.\.1"),
        ({"question": ["a"] * 4}, "no column answer"),
        ({"question": ["a", None, "b", "c"], "label": [0] * 4}, "row 1: column question is empty"),
        ({"question": [], "label": []}, "no rows"),
        ({"question": ["a"] * 2, "label": [0, 1]}, "2 questions to train on, 2 to hold out"),
    ],
)
def test_bad_files_are_named(boolq, columns, message):
    write_rows(boolq / "boolq" / "train.parquet", columns)
    with pytest.raises(DataError, match=message):
        load(boolq)


def test_no_pad_token_is_a_warning_since_masks_hide_it(boolq):
    splits = load(boolq, tokenizer=word_tokenizer(pad=False))
    assert splits.facts["warnings"][0] == "no pad token: the end token pads"
    assert splits.train.padding["input_ids"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "bolq"}, "did you mean boolq"),
        ({"answers": "guessed"}, "likelihood or generated or majority"),
        ({"loss_on": "prompt"}, "sequence or answer"),
        ({"beams": 0}, "beams"),
        ({"dataset": "all"}, "set task.train=mix"),
        ({"train": "all"}, "own or mix"),
        ({"dataset": "piqa", "passage": True}, "only boolq"),
        ({"max_length": 8}, "at least 32"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        task(**options)


def test_other_models_and_missing_data_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="writes no text"):
        task().load_for(flora.models.get("minilm_l6"), tmp_path)
    with pytest.raises(DataError, match=r"has no folder boolq; hub google/boolq: HF_HUB_OFFLINE"):
        load(tmp_path)


@pytest.mark.data
def test_boolq_has_the_official_rows(data_folder):
    assert load(data_folder).facts["warnings"] == []


def test_a_language_model_trained_in_full_is_saved_with_its_tied_weights(tmp_path):
    config = language_model().config
    config.tie_word_embeddings = True
    model, fresh = (transformers.LlamaForCausalLM(config) for _ in range(2))
    Full("full").save(model, tmp_path)
    loaded = load_saved(fresh, [], tmp_path).model
    tokens = torch.tensor([[2, 5, 6, 3]])
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_instructions_of_ones_own_are_asked_as_the_tests_and_answered_in_words(boolq, monkeypatch):
    spec = flora.models.get("smollm2_135m")
    monkeypatch.setattr(TransformersModel, "tokenizer", lambda self: word_tokenizer())
    own = task()
    questions = [f"the cat {word}" for word in ("sat", "ran")]
    asked = [ROWS["boolq"][1].replace("is the cat true", question) for question in questions]
    write_rows(boolq / "boolq" / "validation.parquet", {"question": questions, "label": [0, 1]})
    test = load(boolq).test
    prompts = own.unlabelled(spec, asked)
    for number in range(2):
        whole = test[number]
        (ids, targets) = whole["input_ids"][0], whole["targets"][0]
        prompt = ids[(targets == -100) & whole["attention_mask"][0].bool()]
        assert torch.equal(prompts[number]["input_ids"], prompt)
    batch = prompts.__getitems__([1, 0])
    tokens, numbers = own.predicting(spec)(Writer("is false"), batch, False)
    assert numbers.tolist() == [1, 0]
    assert own.written(spec, tokens[0].numpy()) == "is false"
    with pytest.raises(ConfigError, match="task=commonsense takes a text"):
        own.unlabelled(spec, [("a", "b")])
