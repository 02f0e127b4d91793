"""The frame of all fuzzers: seeded attempts, and mutations that know the structure of what they damage.

A fuzzer is a test that hands `fuzz` a function of one random generator. `make test` runs each a few times;
`make fuzz N=10000` runs each ten thousand times (environment: FUZZ_N, and FUZZ_SEED, the first seed). A failure names
the seed, and `FUZZ_SEED=that FUZZ_N=1` repeats it alone.
"""
import copy
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

__all__ = ['fuzz', 'interesting', 'mutate_json', 'mutate_text']


def fuzz(
        attempt: Callable[[random.Random], Any], count: int, allowed: type[Exception], seconds: float = 5.,
) -> Counter[str]:
    """Make seeded attempts; each must return or raise an `allowed` error of one line, within `seconds`.

    Args:
        attempt: One attempt; draws everything from its generator.
        count: Number of attempts, unless FUZZ_N says another.
        allowed: The one kind of error a user may see.
        seconds: Processor time an attempt may take.

    Returns:
        How many attempts were `accepted` and how many `refused`.
    """
    outcome: Counter[str] = Counter()
    start = int(os.environ.get('FUZZ_SEED', 0))
    for seed in range(start, start + int(os.environ.get('FUZZ_N') or count)):
        begin = time.process_time()
        try:
            attempt(random.Random(seed))
        except allowed as e:
            outcome['refused'] += 1
            message = str(e)
            assert '\n' not in message and 0 < len(message) < 2000, f'seed {seed}: the message is {message[:3000]!r}'
        except Exception as e:
            raise AssertionError(f'seed {seed}: {type(e).__name__}: {e}') from e
        else:
            outcome['accepted'] += 1
        spent = time.process_time() - begin
        assert spent < seconds, f'seed {seed}: {spent:.1f} s'
    return outcome


def interesting(rng: random.Random) -> Any:
    """A JSON value of the kinds that break programs: other types, limits, lengths, depths, and odd text."""
    return rng.choice([
        None, True, False, 0, 1, -1, 2, 255, 2 ** 31, 2 ** 63, -2 ** 63, 10 ** 9, 10 ** 30, 0.5, -0., 1e-320, 1e308,
        math.nan, math.inf, -math.inf, '', 'x', 'x' * 1000, '\x00', '\n', '\ud800', '..', '/etc/passwd', '-1', 'nan',
        [], [[]], [None], [0, 0], [3] * 10_000, [1_000_000] * 1000, nested(rng.randrange(500)), {}, {'': None},
        {'x': {}}])


def nested(depth: int) -> list[Any]:
    """A list in a list in a list."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def mutate_json(rng: random.Random, value: Any, replace: Callable[[random.Random], Any] = interesting) -> Any:
    """A copy of plain data with one change somewhere in it, at any depth.

    Args:
        rng: Source of all choices.
        value: Plain data.
        replace: Draws new values.
    """
    value = copy.deepcopy(value)
    places = [(container, key) for container in _containers(value) for key in _keys(container)]
    if not places or rng.random() < 0.02:
        return replace(rng)
    container, key = rng.choice(places)
    other, other_key = rng.choice(places)
    change = rng.choice(('replace', 'replace', 'replace', 'nudge', 'delete', 'swap', 'wrap', 'repeat', 'add'))
    if change == 'nudge' and isinstance(container[key], (int, float)):
        container[key] = rng.choice((-container[key], container[key] + 1, container[key] - 1, container[key] * 1000))
    elif change == 'delete':
        del container[key]
    elif change == 'swap':
        container[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(container[key])
    elif change == 'wrap':
        container[key] = rng.choice(([container[key]], {'x': container[key]}))
    elif change == 'repeat' and isinstance(container[key], list):
        container[key] = container[key] * rng.choice((2, 10, 1000))
    elif change == 'add':
        added = rng.choice((copy.deepcopy(other[other_key]), replace(rng)))
        if isinstance(container, dict):
            container[rng.choice((other_key if isinstance(other_key, str) else 'x', 'x', ''))] = added
        else:
            container.insert(key, added)
    else:
        container[key] = replace(rng)
    return value


def mutate_text(rng: random.Random, text: str) -> str:
    """The text with a few characters taken out or put in, those of JSON, YAML and Python among them."""
    characters = list(text)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(characters) + 1)
        characters[at:at + rng.randint(0, 3)] = rng.choice([*'{}[]",:9\\\x00-\n\t#&*!%é()=', 'e9', '- ', ': '])
    return ''.join(characters)


def _containers(value: Any) -> list[Any]:
    """All lists and dicts in plain data, the data itself first."""
    found, todo = [], [value]
    while todo:
        item = todo.pop()
        if isinstance(item, (dict, list)):
            found.append(item)
            todo += item.values() if isinstance(item, dict) else item
    return found


def _keys(container: Any) -> list[Any]:
    return list(container) if isinstance(container, dict) else list(range(len(container)))
