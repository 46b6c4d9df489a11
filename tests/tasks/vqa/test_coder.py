"""Conversations as tokens: the loss on answers, images in their places, long texts cut."""

import pytest

from flora.errors import DataError
from flora.models import Llava
from flora.tasks.vqa.coder import Coder
from flora.tasks.vqa.dialogues import Dialogue
from tests.tasks.chats import tiny_llava, vicuna_and_clip
from tests.tasks.vqa.questions import conversation, task, write_conversations, write_questions

IMAGE, NOT = 4, -100
SYSTEM = ["<|im_start|>", "system", "\n", "<|im_end|>", "\n"]
ASSISTANT = ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]


def words_and_targets(spec, turns, images=1):
    """Every token of a conversation in words, and whether the loss is on it."""
    dialogue = Dialogue(tuple(turns), (0,) * images, (turns[-1][1],), "other", "here")
    rows = Coder(spec, None, 4).answered("train", [dialogue])
    tokenizer, example = spec.tokenizer(), rows[0]
    assert all(t in (i, NOT) for i, t in zip(example["input_ids"].tolist(), example["labels"].tolist(), strict=True))
    return [
        (tokenizer.convert_ids_to_tokens(i), t != NOT)
        for i, t in zip(example["input_ids"].tolist(), example["labels"].tolist(), strict=True)
    ]


def test_the_loss_is_on_answers_and_their_end_token_by_token_in_chatml(tmp_path):
    turns = [("<image>\nwhat color is it?", "red"), ("is it a dog?", "yes a dog")]
    words = words_and_targets(tiny_llava(tmp_path), turns)
    user = ["<|im_start|>", "user", "\n"]
    first = [*SYSTEM, *user, *["<reponame>"] * 4, "\n", "what", " color", " is", " it", "?", *ASSISTANT]
    second = ["\n", *user, "is", " it", "<|endoftext|>", " dog", "?", *ASSISTANT]  # " a" is unknown to this tokenizer
    assert words == [
        *((word, False) for word in first),
        *[("red", True), ("<|im_end|>", True)],
        *((word, False) for word in second),
        *[("yes", True), ("<|endoftext|>", True), (" dog", True), ("<|im_end|>", True)],
    ]


def test_the_loss_is_on_answers_and_their_end_token_by_token_in_vicuna(tmp_path):
    turns = [("<image>\nwhat color", "red"), ("what color is it?", "no")]
    words = words_and_targets(tiny_llava(tmp_path, "vicuna", grid=False), turns)
    system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    system += "detailed, and polite answers to the user's questions. USER:"
    told = [word for word, learnt in words if not learnt]
    assert [word for word, learnt in words if learnt] == ["▁red", "</s>", "▁no", "</s>"]
    assert told[0] == "<s>"
    assert told[1 : 1 + len(system.split())] == ["▁" + word for word in system.split()]
    rest = [word for word in told[1 + len(system.split()) :] if word not in ("▁", "<unk>")]  # "\nwhat" is one, unknown
    asked = ["▁USER:", "▁what", "▁color", "▁is", "▁it?", "▁ASSISTANT:"]
    assert rest == [*["<image>"] * 4, "▁color", "▁ASSISTANT:", *asked]
    order = [word for word, _ in words]
    assert order.index("▁red") == order.index("▁ASSISTANT:") + 1
    assert order[-3:] == ["▁ASSISTANT:", "▁no", "</s>"]


def test_a_caption_follows_its_image_and_the_loss_is_on_it_and_the_line_break(tmp_path):
    """As preprocess_plain of LLaVA's train.py has it: no words around, the question left out."""
    spec = Llava("v", chat="plain", **vicuna_and_clip(tmp_path))
    words = words_and_targets(spec, [("<image>\nDescribe the image.", "red dog")])
    caption = [*"▁red▁dog", "<0x0A>"]
    assert words == [("<s>", False), *[("<unk>", False)] * 4, *((word, True) for word in caption)]
    coder = Coder(spec, None, 4)
    assert spec.tokenizer().convert_ids_to_tokens(coder.end) == "<0x0A>"
    assert coder.pad != spec.image_id, "else padding would stand for images"
    asked = coder.asked("test", [Dialogue((("<image>\nGive a caption.", "red"),), (0,), ("red",), "other", "here")], 0)
    assert asked[0]["input_ids"].tolist() == [1, 0, 0, 0, 0]
    small = tiny_llava(tmp_path / "other", "plain")
    assert words_and_targets(small, [("<image>\nwhat is it?", "red")])[4:] == [("red", True), ("\n", True)]


def test_long_texts_lose_words_never_images_or_the_answer(pets, tmp_path):
    question = "what " + "is " * 200
    for split in ("train", "validation", "test"):
        write_questions(pets / "pets", split, question=["what color is it?"] * 7 + [question])
    spec = tiny_llava(tmp_path)
    splits = task(max_length=60, max_new_tokens=10).load_for(spec, pets)
    assert splits.facts["truncated"] == {"train": 1, "validation": 1, "test": 1}
    cut = splits.test[7]["input_ids"][0]
    assert len(cut) == 50, "room is left for the answer"
    words = spec.tokenizer().convert_ids_to_tokens(cut.tolist())
    assert words.count("<reponame>") == 4
    assert words[-5:] == ASSISTANT
    learnt = splits.train[7]
    assert learnt["labels"].shape == (1, 60)
    assert spec.tokenizer().decode(learnt["labels"][0, -2:]).replace(" ", "") == "yes<|im_end|>"
    with pytest.raises(
        DataError, match=r"row 0: 12 tokens of images and earlier turns do not fit into 16; .*never cut"
    ):
        task(max_length=32, max_new_tokens=16).load_for(spec, pets)


def test_long_conversations_lose_their_last_turns(tmp_path):
    folder = tmp_path / "llava_instruct"
    long = conversation("<image>\nis it?", "yes", "is it a dog?", "no", "what is it?", "a dog " * 60, image="0.png")
    answer = conversation("is it?", "dog " * 300)
    write_conversations(folder, [long, answer])
    write_conversations(folder, [conversation("is it?", "yes")], "validation")
    write_conversations(folder, [conversation("is it?", "yes")], "test")
    spec = tiny_llava(tmp_path)
    splits = task("llava_instruct", max_length=64).load_for(spec, tmp_path)
    tokenizer = spec.tokenizer()
    learnt = [
        [tokenizer.convert_ids_to_tokens(int(t)) for t in splits.train[i]["labels"][0] if t != NOT] for i in (0, 1)
    ]
    assert learnt[0] == ["yes", "<|im_end|>", "no", "<|im_end|>"]
    assert splits.train.lengths[1] == 64
    assert learnt[1] == ["<|endoftext|>", *[" dog"] * (len(learnt[1]) - 1)], "the end of a cut answer is not learnt"
    assert splits.facts["truncated"]["train"] == 2


def test_a_tokenizer_without_a_pad_token_pads_with_the_end_which_masks_hide(pets, tmp_path):
    mine = task()
    splits = mine.load_for(tiny_llava(tmp_path, pad=None), pets)
    assert splits.facts["warnings"] == ["no pad token: the end token pads"]
    assert splits.train.rows.padding["input_ids"] == 2
