"""What is refused before a model sees it, and how sequences of several lengths become one tensor."""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from qsvd.evaluate.batches import by_length, check_sequences, padded
from tests.evaluate.tiny import PAD, VOCABULARY, llama, refused

MODEL = llama()


def test_sequences_alike_in_length_go_together_longest_first():
    assert list(by_length([[1], [1, 2, 3], [], [1, 2], [4, 5, 6]], 2)) == [[1, 4], [3, 0], [2]]


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_on_one_side_and_masked(left):
    tokens, mask = padded(MODEL, [[7, 8, 9], [5]], PAD, left=left)
    assert tokens.tolist() == [[7, 8, 9], [PAD, PAD, 5] if left else [5, PAD, PAD]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1] if left else [1, 0, 0]]
    assert tokens.dtype == mask.dtype == torch.int64


def test_no_example_is_refused():
    with refused("no examples to measure a model on"):
        check_sequences(MODEL, [], pad_token=PAD)


def test_all_empty_examples_are_named():
    with refused("example 1, 3 has no token: give at least one to each"):
        check_sequences(MODEL, [[1], [], [2], []], pad_token=PAD)


def test_all_tokens_outside_the_vocabulary_are_named():
    with refused(rf"token -1, {VOCABULARY}, 99 is outside 0\.\.{VOCABULARY - 1}, the model's vocabulary"):
        check_sequences(MODEL, [[99, 0], [VOCABULARY - 1, -1, VOCABULARY], [99]], pad_token=PAD)


def test_a_pad_token_outside_the_vocabulary_is_named():
    with refused(rf"token {VOCABULARY} is outside 0\.\.{VOCABULARY - 1}, the model's vocabulary"):
        check_sequences(MODEL, [[1]], pad_token=VOCABULARY)


def test_all_examples_beyond_the_models_positions_are_named():
    check_sequences(MODEL, [[1] * 128], pad_token=PAD)
    check_sequences(MODEL, [[1] * 118], pad_token=PAD, room=10)
    sentence = "more tokens than the 128 positions of the model"
    with refused(rf"example 1 \(129\), 2 \(130\) has {sentence}: shorten or drop them"):
        check_sequences(MODEL, [[1], [1] * 129, [1] * 130], pad_token=PAD)
    with refused(rf"example 0 \(119\) has {sentence}, 10 of them for the generated text: shorten or drop them"):
        check_sequences(MODEL, [[1] * 119], pad_token=PAD, room=10)


def test_a_recurrent_model_has_no_longest_input():
    model = MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=4))
    check_sequences(model, [[1] * 5000], pad_token=0)
