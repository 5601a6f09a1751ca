"""Examples with images, judged by transformers' own processors and by what a person reads in the sentences."""

import base64
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from qsvd.data.columns import UNTRAINED, recognise
from qsvd.data.images import open_processor, tokenize_images
from qsvd.data.masks import preview
from qsvd.data.read import read_rows
from qsvd.data.tokens import tokenize
from qsvd.errors import BadInput
from tests.vision import KINDS, chats, picture, tokenizer, write_lines, write_model

QUESTION, ANSWER = "What is this?", "A field, and no cat."
END = "<|im_end|>\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a model with marks in its template, and of one without, by kind."""
    home = tmp_path_factory.mktemp("models")
    made = {(kind, True): write_model(home / kind, kind) for kind in KINDS}
    return made | {("llava", False): write_model(home / "plain", marked=False)}


@pytest.fixture
def llava(models):
    return open_processor(models["llava", True])


def tokenized(path, processor, **chosen):
    return tokenize_images(recognise(read_rows(path), {}), processor, **({"max_length": 256} | chosen))


def said(question=QUESTION, answer=ANSWER, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]} | more


def parts(*content):
    """Parts of a message: a text, or a dictionary of an image."""
    return [one if isinstance(one, dict) else {"type": "text", "text": one} for one in content]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_pixels_are_the_processors_own(tmp_path, models, kind):
    path = write_lines(tmp_path / "rows.jsonl", chats(tmp_path))
    data = tokenized(path, open_processor(models[kind, True]))
    judge = AutoProcessor.from_pretrained(models[kind, True])
    for number in range(6):
        image = {"type": "image", "image": Image.open(tmp_path / f"{number}.png")}
        question = {"type": "text", "text": f"What is in picture {number}?"}
        answer = {"type": "text", "text": f"A field of colour {number}, and no cat."}
        asked = [question, image] if number % 3 == 2 else [image, question]
        wanted = judge.apply_chat_template(
            [{"role": "user", "content": asked}, {"role": "assistant", "content": [answer]}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"add_special_tokens": False},
        )
        assert data.input_ids[number] == wanted["input_ids"][0].tolist()
        batch = data.media.batch([number])
        assert batch.keys() - {"labels"} == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(batch[name], value), name
        trained = [label for label in data.labels[number] if label != UNTRAINED]
        assert judge.tokenizer.decode(trained) == answer["text"] + END
        assert data.labels[number][-len(trained) :] == trained, "the answer is the end"


def test_an_example_is_as_long_as_text_and_image_tokens_together(tmp_path, llava):
    picture(tmp_path / "a.png", 1)
    rows = [said(images=["a.png"] * count) for count in (1, 2, 3)]
    data = tokenized(write_lines(tmp_path / "rows.jsonl", rows), llava)
    one, two, three = map(len, data.input_ids)
    assert two - one == three - two == 16  # 4 x 4 patches
    assert data.media.pixels == 3 * 3 * 16**2, "of the row with most, three images in colour"


def test_the_tokens_of_an_image_are_shown_as_one_mark_with_their_number(tmp_path, llava):
    picture(tmp_path / "a.png", 1)
    data = tokenized(write_lines(tmp_path / "rows.jsonl", [said(images=["a.png"])]), llava)
    shown = preview(data, llava.tokenizer).plain
    assert shown.partition("\n")[2] == (
        f"<|im_start|>user\n<image> x 16{QUESTION}<|im_end|>\n<|im_start|>assistant\n[[{ANSWER}{END}]]"
    )


def test_an_image_is_a_path_bytes_base64_or_as_datasets_keeps_it(tmp_path, llava):
    raw = picture(tmp_path / "a.png", 1).read_bytes()
    coded = base64.b64encode(raw).decode()
    spellings = [
        said(images="a.png"),
        said(images=[str(tmp_path / "a.png")]),
        said(image=f"data:image/png;base64,{coded}"),
        said(parts({"type": "image", "base64": coded}, QUESTION)),
        said(parts({"type": "image", "url": "a.png", "path": None}, QUESTION)),
    ]
    data = tokenized(write_lines(tmp_path / "rows.jsonl", spellings), llava)
    rows = read_rows(tmp_path / "rows.jsonl")
    kept = replace(rows, rows=[said(images=raw), said(images=[{"bytes": raw, "path": "a.png"}]), *rows.rows[2:]])
    more = tokenize_images(recognise(kept, {}), llava, max_length=256)
    assert len({*data.media.digests, *more.media.digests}) == 1
    assert len({*map(tuple, data.input_ids), *map(tuple, more.input_ids)}) == 1


def test_prompt_and_completion_are_trained_as_a_conversation_is(tmp_path, llava):
    picture(tmp_path / "a.png", 1)
    prompt, completion = said()["messages"][:1], said()["messages"][1:]
    chat = tokenized(write_lines(tmp_path / "chat.jsonl", [said(images="a.png")]), llava)
    pair = {"prompt": prompt, "completion": completion, "images": ["a.png"]}
    question = {"question": QUESTION, "answer": ANSWER, "image": "a.png"}
    for row in (pair, question):
        data = tokenized(write_lines(tmp_path / "pair.jsonl", [row]), llava)
        assert (data.input_ids, data.labels) == (chat.input_ids, chat.labels)


def test_a_prompt_as_it_is_has_its_own_places_and_starts_and_ends_as_a_text_does(tmp_path, llava):
    picture(tmp_path / "a.png", 1)
    row = {"prompt": f"<image>\n{QUESTION} ", "completion": ANSWER, "images": ["a.png"]}
    data = tokenized(write_lines(tmp_path / "rows.jsonl", [row]), llava)
    words = llava.tokenizer.decode(data.input_ids[0])
    assert words == "<|bos|>" + "<image>" * 16 + f"\n{QUESTION} {ANSWER}<|eos|>"
    trained = [label for label in data.labels[0] if label != UNTRAINED]
    assert llava.tokenizer.decode(trained) == f"{ANSWER}<|eos|>"
    row["prompt"] = QUESTION
    with pytest.raises(BadInput, match=r"line 1 \(its text has 0 places for images \(<image>\), and there are 1"):
        tokenized(write_lines(tmp_path / "rows.jsonl", [row]), llava)


def test_a_template_without_marks_trains_the_last_answer(tmp_path, models):
    marked, plain = (open_processor(models["llava", is_marked]) for is_marked in (True, False))
    path = write_lines(tmp_path / "rows.jsonl", chats(tmp_path))
    first, second = tokenized(path, marked), tokenized(path, plain)
    assert (first.input_ids, first.labels) == (second.input_ids, second.labels)
    twice = {"messages": said()["messages"] * 2, "images": "0.png"}
    data = tokenized(write_lines(tmp_path / "rows.jsonl", [twice]), marked)
    trained = [label for label in data.labels[0] if label != UNTRAINED]
    assert marked.tokenizer.decode(trained) == (ANSWER + END) * 2
    with pytest.raises(BadInput, match=r"line 1 \(the assistant speaks not only at the end\); mark .* generation %"):
        tokenized(write_lines(tmp_path / "rows.jsonl", [twice]), plain)


def test_loss_on_all_trains_every_token(tmp_path, llava):
    path = write_lines(tmp_path / "rows.jsonl", chats(tmp_path))
    data = tokenized(path, llava, loss_on="all")
    assert data.labels == data.input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_images_stay_texts(tmp_path, models, kind):
    processor = open_processor(models[kind, True])
    rows = [said(images=[]), *chats(tmp_path, 2), said()]
    data = tokenized(write_lines(tmp_path / "rows.jsonl", rows), processor)
    texts = recognise(read_rows(write_lines(tmp_path / "texts.jsonl", [said()])), {})
    alone = tokenize(texts, processor.tokenizer, max_length=256)
    for number in (0, 3):
        assert data.input_ids[number] == alone.input_ids[0]
        assert data.labels[number] == alone.labels[0]
    batch = data.media.batch([0, 1, 2, 3])
    assert len(batch["pixel_values"]) == 2
    for number, labels in enumerate(data.labels):
        assert batch["labels"][number].tolist()[: len(labels)] == labels
    assert "pixel_values" not in data.media.batch([0, 3])


def test_an_example_that_is_too_long_is_left_out_whole(tmp_path, llava):
    picture(tmp_path / "a.png", 1)
    rows = [said(images=["a.png"] * count) for count in (1, 4, 2)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    lengths = [len(ids) for ids in tokenized(path, llava).input_ids]
    data = tokenized(path, llava, max_length=lengths[2])
    assert [len(ids) for ids in data.input_ids] == [lengths[0], lengths[2]]
    assert (data.dropped, data.cut_tokens, data.places.numbers) == (1, lengths[1], [1, 3])
    assert [len(data.media[number]["images"]) for number in (0, 1)] == [1, 2]
    with pytest.raises(BadInput, match=f"at most 20 tokens, images included; the shortest has {lengths[0]}"):
        tokenized(path, llava, max_length=20)


WRONG = [
    (said(images=["none.png"]), "no such file: .*none.png"),
    (said(images=["rows.jsonl"]), "rows.jsonl is not an image that Pillow can read"),
    (said(images=["cut.png"]), "cut.png is not an image that Pillow can read"),
    (said(images=["page.eps"]), "page.eps is not an image that Pillow can read: cannot identify"),  # by Ghostscript
    (said(images=["https://example.org/a.png"]), "on the web: download it"),
    (said(images=["data:image/png;base64,?"]), "an image is not base64"),
    (said(parts({"type": "image"}, QUESTION), images=["a.png"] * 2), "places for 1 images, and there are 2"),
    (said(parts({"type": "image"}, QUESTION)), "places for 1 images, and there are 0"),
    (said(parts({"type": "video", "path": "a.mp4"}, QUESTION)), r"content\[0\] has the type 'video'; .* an image"),
    (said(parts({"type": "image", "path": "a.png"}, QUESTION), images="a.png"), "both have images"),
    (said(parts({"type": "image", "path": "a.png", "base64": "QQ=="}, QUESTION)), "has path and base64"),
    (said(images=[3]), "images has int in the place of an image"),
    (said(f"{QUESTION} <image>", images="a.png"), r"2 places for images \(<image>\), and there are 1 images"),
    (said(images="a.png", tools=[{"type": "function"}]), "tools beside images"),
    (said(answer=" ", images="a.png"), "no trained token|leaves out what the assistant says"),
]


@pytest.mark.parametrize(("row", "sentence"), WRONG, ids=range(len(WRONG)))
def test_an_example_that_cannot_be_used_is_named_by_its_line(tmp_path, llava, row, sentence):
    picture(tmp_path / "a.png", 1)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    Image.open(tmp_path / "a.png").convert("RGB").save(tmp_path / "page.eps")
    with pytest.raises(BadInput, match=rf"rows.jsonl.*line 2 .*({sentence})"):
        tokenized(write_lines(tmp_path / "rows.jsonl", [said(images="a.png"), row]), llava)


def test_all_images_that_cannot_be_opened_are_told_at_once(tmp_path, llava):
    rows = [said(images=[f"{number}.png", f"{number}b.png"]) for number in range(3)]
    with pytest.raises(BadInput, match=r"3 unusable examples: .*0.png; .*0b.png.*line 2 .*line 3 "):
        tokenized(write_lines(tmp_path / "rows.jsonl", rows), llava)


def test_a_turn_without_an_end_is_refused(tmp_path, llava):
    llava.chat_template = llava.chat_template.replace("{{ '<|im_end|>\n' }}", "")
    picture(tmp_path / "a.png", 1)
    with pytest.raises(BadInput, match=r"drops the end of a turn: .* line 1 ends with '.'"):
        tokenized(write_lines(tmp_path / "rows.jsonl", [said(images="a.png")]), llava)


def test_a_folder_without_a_processor_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"has no processor of images .*; copy processor_config.json"):
        open_processor(tmp_path)
    tokenizer().save_pretrained(tmp_path / "text")
    with pytest.raises(BadInput, match=r"has no processor of images .*; copy processor_config.json"):
        open_processor(tmp_path / "text")


def test_text_alone_cannot_be_made_of_examples_with_images(tmp_path, llava):
    examples = recognise(read_rows(write_lines(tmp_path / "rows.jsonl", [said(images="a.png")])), {})
    with pytest.raises(BadInput, match="has images, and only texts can be used here"):
        tokenize(examples, llava.tokenizer, max_length=64)
