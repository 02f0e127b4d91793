"""Messages stay readable whatever a user or a file names."""
import pickle

import pytest

from timm_lean import LeanError
from timm_lean.checkpoint.format import load_any
from timm_lean.errors import CheckpointError, PackageMissingError


@pytest.mark.parametrize('kind', [LeanError, CheckpointError, PackageMissingError])
def test_names_that_are_too_long_are_cut(kind):
    error = kind(f'Unknown model {"x" * 100_000!r}. See the list.')
    assert str(error) == f"Unknown model '{'x' * 199}[...]{'x' * 48}'. See the list."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # as from a data loading process


def test_ordinary_messages_are_as_they_were():
    text = f'/{"a" * 250}/b.safetensors is not a file.'
    assert str(LeanError(text)) == text


def test_a_model_name_of_any_length():
    with pytest.raises(LeanError, match='Unknown model') as error:
        load_any('q' * 5000)
    assert len(str(error.value)) < 600


def test_a_line_break_in_a_name_does_not_break_the_line():
    assert str(LeanError('no class a\nb')) == 'no class a b'
