"""Safetensors files taken apart, put together, and damaged in ways that know their layout."""
import json
import random
import struct
from typing import Any

from fuzz import mutate_json, mutate_text

__all__ = ['entry_of', 'join', 'mutate_file', 'parts', 'with_entry']


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The safetensors header and the bytes behind it."""
    size, = struct.unpack('<Q', data[:8])
    return json.loads(data[8:8 + size]), data[8 + size:]


def join(header: dict[str, Any] | str, body: bytes) -> bytes:
    """A file of this header and these bytes."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack('<Q', len(text)) + text + body


def entry_of(data: bytes, key: str = 'timm_lean') -> dict[str, Any]:
    """One JSON entry of the file's metadata."""
    return json.loads(parts(data)[0]['__metadata__'][key])


def with_entry(data: bytes, entry: Any = None, key: str = 'timm_lean', **changes: Any) -> bytes:
    """The file with another entry in its metadata (text as it is), or with changes to it."""
    header, body = parts(data)
    if entry is None:
        entry = {**entry_of(data, key), **changes}
    header['__metadata__'][key] = entry if isinstance(entry, str) else json.dumps(entry)
    return join(header, body)


def mutate_file(rng: random.Random, data: bytes, key: str = 'timm_lean') -> bytes:
    """The file with one kind of damage: to its bytes, its layout, or the entry `key` of its metadata."""
    if rng.random() < 0.4:
        return rng.choice((_entry_value, _entry_value, _entry_value, _entry_text))(rng, data, key)
    return rng.choice(_FILE)(rng, data)


def _flip(rng: random.Random, data: bytes, low: int, high: int) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        out[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
    return bytes(out)


def _header_end(data: bytes) -> int:
    return 8 + struct.unpack('<Q', data[:8])[0]


def _flip_in_header(rng: random.Random, data: bytes) -> bytes:
    return _flip(rng, data, 0, _header_end(data))


def _flip_in_tensors(rng: random.Random, data: bytes) -> bytes:
    return _flip(rng, data, _header_end(data), len(data))


def _truncate(rng: random.Random, data: bytes) -> bytes:
    return data[:rng.choice((rng.randrange(len(data)), rng.randrange(3000)))]


def _insert(rng: random.Random, data: bytes) -> bytes:
    at = rng.choice((rng.randrange(len(data)), rng.randrange(3000)))
    return data[:at] + rng.randbytes(rng.randint(1, 50)) + data[at:]


def _cut_out(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(3000)
    return data[:at] + data[at + rng.randint(1, 50):]


def _header_length(rng: random.Random, data: bytes) -> bytes:
    size, = struct.unpack('<Q', data[:8])
    new = rng.choice((size + rng.randint(-50, 50), rng.getrandbits(64), rng.getrandbits(30), 2 ** 63, 0))
    return struct.pack('<Q', max(new, 0)) + data[8:]


def _duplicate_key(rng: random.Random, data: bytes) -> bytes:
    header, body = parts(data)
    key, other = (rng.choice(_tensors(header)) for _ in range(2))
    return join(json.dumps(header)[:-1] + f', {json.dumps(key)}: {json.dumps(header[other])}}}', body)


def _another_dtype(rng: random.Random, data: bytes) -> bytes:
    header, body = parts(data)
    for key in rng.sample(_tensors(header), rng.randint(1, 5)):
        header[key]['dtype'] = rng.choice(['I32', 'I64', 'F64', 'F16', 'BF16', 'U8', 'BOOL', 'F8_E4M3', 'C64', 'X', ''])
    return join(header, body)


def _another_layout(rng: random.Random, data: bytes) -> bytes:
    header, body = parts(data)
    names = _tensors(header)
    entry = header[rng.choice(names)]
    kind = rng.choice(('shape', 'offsets', 'swap', 'rename', 'drop', 'any'))
    if kind == 'shape':
        entry['shape'] = rng.choice([[], [0], entry['shape'][::-1], [*entry['shape'], 1], [2 ** 40], [10 ** 30]])
    elif kind == 'offsets':
        entry['data_offsets'] = [rng.randrange(10 ** 6), rng.choice((rng.randrange(10 ** 6), 2 ** 62))]
    elif kind == 'swap':
        other = rng.choice(names)
        header[other]['data_offsets'], entry['data_offsets'] = entry['data_offsets'], header[other]['data_offsets']
    elif kind == 'rename':
        header[rng.choice(('x', '', 'fc.weight', 'layer1'))] = header.pop(rng.choice(names))
    elif kind == 'drop':
        del header[rng.choice(names)]
    else:
        header = mutate_json(rng, header)
    return join(header, body)


def _entry_value(rng: random.Random, data: bytes, key: str) -> bytes:
    entry: Any = entry_of(data, key)
    for _ in range(rng.choice((1, 1, 2, 3))):
        entry = mutate_json(rng, entry)
    return with_entry(data, json.dumps(entry), key)


def _entry_text(rng: random.Random, data: bytes, key: str) -> bytes:
    return with_entry(data, mutate_text(rng, parts(data)[0]['__metadata__'][key]), key)


def _tensors(header: dict[str, Any]) -> list[str]:
    return [k for k in header if k != '__metadata__']


_FILE = (
    _flip_in_header, _flip_in_tensors, _truncate, _insert, _cut_out, _header_length, _duplicate_key, _another_dtype,
    _another_layout)
