"""`qsvd generate --image`: its tokens are those of transformers' own model and processor with dense weights."""

import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import qsvd
from qsvd.commands import generate as qsvd_generate
from qsvd.options import Generate
from qsvd.prepare.generate import prepare_generate
from tests.commands.folders import shared_model
from tests.commands.trained_runs import trained_weights, write_run
from tests.sealed import without_digests
from tests.vision import KINDS, SIDE, dense, picture, quantized

pytestmark = pytest.mark.slow
QUESTION, COUNT = "What is this?", 6


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {kind: quantized(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture
def pictures(tmp_path):
    return [picture(tmp_path / f"{number}.png", number) for number in (1, 2)]


def turn(role, text, images=()):
    shown = [{"type": "image", "image": Image.open(path)} for path in images]
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}


def plain(model, folder, messages, count=COUNT):
    """What transformers alone answers to a conversation with images."""
    processor = AutoProcessor.from_pretrained(folder)
    options = {"add_special_tokens": False}  # the template has them
    inputs = processor.apply_chat_template(
        messages,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )
    made = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_about_images_are_those_of_transformers(bases, kind, pictures, tmp_path, generate):
    base, model = bases[kind], dense(bases[kind], kind)
    words = ("--prompt", QUESTION, "--max-new-tokens", COUNT, "--temperature", 0)
    one = plain(model, base, [turn("user", QUESTION, pictures[:1])])
    code, said, notes = generate(base, "--image", pictures[0], *words)
    assert (code, said) == (0, one + "\n")
    assert notes.startswith(f"{COUNT} tokens, ")
    both = plain(model, base, [turn("user", QUESTION, pictures)])
    assert qsvd.generate(base, QUESTION, image=pictures, max_new_tokens=COUNT) == both
    other = qsvd.generate(base, [QUESTION], image=pictures[1], max_new_tokens=COUNT)
    assert len({one, both, *other}) > 1, "the images are seen"
    for prompts in ((QUESTION,), ()):  # or a chat
        options = Generate(str(base), prompts, image=tuple(map(str, pictures)), chat=not prompts)
        assert prepare_generate(options, prompts).pixels == 2 * 3 * SIDE**2
    if kind == "gemma3":
        trained = write_run(base, tmp_path / "run")
        moved = dense(base, kind, trained_weights(base, tmp_path / "run", trained))
        wanted = plain(moved, base, [turn("user", QUESTION, pictures[:1])])
        assert qsvd.generate(tmp_path / "run", QUESTION, image=pictures[:1], max_new_tokens=COUNT) == wanted


def test_a_chat_keeps_the_images_of_its_first_message(bases, pictures, generate):
    base, model = bases["llava"], dense(bases["llava"], "llava")
    asked = [turn("user", QUESTION, pictures[:1])]
    first = plain(model, base, asked)
    second = plain(model, base, [*asked, turn("assistant", first), turn("user", "And then?")])
    flags = ("--image", pictures[0], "--max-new-tokens", COUNT)
    code, said, _ = generate(base, "--chat", *flags, stdin=f"{QUESTION}\nAnd then?\n")
    assert (code, said) == (0, f"{first}\n{second}\n")


def test_a_prompt_as_it_is_has_its_own_place_for_the_image(bases, pictures, generate, monkeypatch):
    base, model = bases["llava"], dense(bases["llava"], "llava")
    processor = AutoProcessor.from_pretrained(base)
    inputs = processor(images=[Image.open(pictures[0])], text="<image>\nA", return_tensors="pt")
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=COUNT, do_sample=False)
    wanted = processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    words = ("--image", pictures[0], "--raw", "--max-new-tokens", COUNT)
    assert generate(base, *words, "--prompt", "<image>\nA")[1] == wanted + "\n"
    monkeypatch.setattr(qsvd_generate, "load_generating", None)
    code, _, notes = generate(base, *words, "--prompt", "A")
    assert code == 2
    assert "its text has 0 places for images (<image>), and there are 1 images" in notes


def test_images_that_cannot_be_used_are_refused_before_a_model_is_loaded(
    bases, tmp_path, pictures, generate, monkeypatch
):
    monkeypatch.setattr(qsvd_generate, "load_generating", None)
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0].read_bytes()[:200])
    words = ("--image", tmp_path / "none.png", "--image", broken, "--image", pictures[0], "--prompt", QUESTION)
    code, _, notes = generate(bases["llava"], *words)
    assert (code, notes.count("\n")) == (2, 1)
    assert f"--image: no such file: {tmp_path}/none.png; {broken}"[:60] in notes
    assert "is not an image that Pillow can read" in notes
    code, _, notes = generate(shared_model("stories260K"), "--image", pictures[0], "--prompt", QUESTION)
    assert code == 2
    assert "a LlamaForCausalLM, does not read images: give an image-language model" in notes
    bare = without_digests(shutil.copytree(bases["llava"], tmp_path / "bare"))
    (bare / "processor_config.json").unlink()
    code, _, notes = generate(bare, "--image", pictures[0], "--prompt", QUESTION)
    assert code == 2
    assert "has no processor of images that transformers can open" in notes
