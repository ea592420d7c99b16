"""One small tokenizer, trained on Python's help topics, for all tests of this folder."""

from pydoc_data.topics import topics

import pytest

from sputnik.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    return Tokenizer.train(topics.values(), vocab_size=1024)
