"""DeBERTa-v3 as it lies on the hub, tiny: spm.model, weights of transformers; from the first token to the record."""

import io
import json
from functools import partial
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers

import train
from flora.errors import ConfigError, WeightsError
from flora.launch.entry import main
from flora.models import TransformersModel
from tests.models.test_text import configured
from tests.tasks.texts import word_tokenizer, write_rows

SENTENCES = ["The cat sat on the mat.", "A dog ran after the cat.", "Nobody slept on that dog.", "Is the mat a cat?"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIZES |= {"pooler_hidden_size": 16, "max_position_embeddings": 32, "position_buckets": 8}
ROWS = 80  # of the embedding, a few more than there are tokens, as the real one has


@pytest.fixture
def folder(tmp_path):
    """The files of microsoft/deberta-v3-base: its order of special tokens, its settings, random weights."""
    stream = io.BytesIO()
    special = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    places = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(SENTENCES * 3), model_writer=stream, vocab_size=35, **special, **places, minloglevel=2
    )
    place = tmp_path / "deberta"
    torch.manual_seed(0)
    network = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**architecture()))
    network.save_pretrained(place)
    (place / "spm.model").write_bytes(stream.getvalue())
    (place / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    return place


def architecture():
    return dict(configured("deberta_v3_base").architecture) | SIZES | {"vocab_size": ROWS}


def spec(place):
    return TransformersModel(
        "deberta_v3_base",
        "sequence_classification",
        architecture(),
        ["pooler", "classifier"],
        weights=str(place),
    )


@pytest.fixture
def run(tmp_path, script, folder):
    """Two steps of RTE through train.py with the network of ``folder``: (exit code, stdout, stderr)."""
    texts = {"sentence1": SENTENCES * 4, "sentence2": SENTENCES[::-1] * 4, "label": [0, 1, 1, 0] * 4}
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / "glue" / "rte" / f"{split}.parquet", texts)
    sizes = [f"model.architecture.{key}={value}" for key, value in (SIZES | {"vocab_size": ROWS}).items()]
    places = [f"paths.{key}={tmp_path}/{key}" for key in ("data", "output", "results")]
    given = ["experiment=glue_deberta", f"model.weights={folder}", "trainer.max_steps=2", "trainer.warmup_steps=1"]
    words = [*given, "trainer.device=cpu", "trainer.batch_size=4", "logger=none", *sizes, *places]
    return lambda: script(partial(main, train.job, trace=lambda: False), "train.py", *words)


def test_two_steps_of_the_published_cell_end_with_a_record(run):
    code, out, err = run()
    assert code == 0, err
    record = json.loads(Path(out.strip().splitlines()[-1].removeprefix("record: ")).read_text())
    assert (record["status"], record["model"], record["dataset"]) == ("finished", "deberta_v3_base", "rte")
    assert record["metrics"].keys() >= {"accuracy"}


def test_texts_are_split_as_sentencepiece_splits_them(folder):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    tokenizer = spec(folder).tokenizer()
    for text in SENTENCES:
        assert tokenizer(text)["input_ids"] == [1, *pieces.encode(text), 2]
    assert (tokenizer.pad_token_id, len(tokenizer)) == (0, 36)  # [MASK] is added


def test_a_folder_without_its_vocabulary_is_refused_in_one_line(run, folder):
    (folder / "spm.model").unlink()
    code, out, err = run()
    assert (code, out) == (2, "")
    error = [line for line in err.splitlines() if not line.startswith("glue/rte ")]
    assert len(error) == 1
    assert error[0].startswith("error: no vocabulary of deberta_v3_base")
    assert "its 7 tokens are special ones; put spm.model or tokenizer.json there" in error[0]


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "t5", "albert", "xlm-roberta", "qwen2", "llama", "bloom"])
def test_no_kind_of_tokenizer_starts_without_a_vocabulary(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    model = TransformersModel("tiny", "causal_lm", {"model_type": "gpt2"}, pretrained=False, tokenizer=str(tmp_path))
    with pytest.raises(WeightsError, match=r"no vocabulary of tiny|no tokenizer of tiny"):
        model.tokenizer()


# Rows of the embedding for 19 tokens; then real pairs, tokens against rows, as the hub has them.
@pytest.mark.parametrize(
    ("tokens", "rows", "message"),
    [
        (19, 19, None),
        (19, 147, None),
        (19, 148, "has 19 tokens, far fewer than the 148 of tiny"),
        (19, 18, "has 19 tokens, but tiny knows 18"),
        (128001, 128100, None),  # DeBERTa-v3
        (50295, 51200, None),  # Phi-2
        (151665, 152064, None),  # Qwen2.5-7B
        (32002, 32064, None),  # LLaVA-1.5
        (12, 16, None),  # HyenaDNA
        (30522, 128100, "far fewer than the 128100"),  # BERT's beside DeBERTa
        (32000, 30522, "but tiny knows 30522"),  # LLaMA's beside BERT
    ],
)
def test_a_vocabulary_fits_its_embedding_from_above_and_from_below(tmp_path, monkeypatch, tokens, rows, message):
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model = TransformersModel(
        "tiny", "causal_lm", {"model_type": "gpt2", "vocab_size": rows}, pretrained=False, tokenizer=str(tmp_path)
    )
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: tokens)
    if message is None:
        model.tokenizer()
        return
    with pytest.raises(ConfigError, match=message):
        model.tokenizer()
