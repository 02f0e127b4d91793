"""What a search has found, on disk at once: a kill loses one candidate at most."""
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from timm_lean.checkpoint.files import atomic_file, writable_dir
from timm_lean.errors import LeanError

from .plan import Plan
from .sizes import Sizes
from .subject import Subject

__all__ = ['Journal', 'fingerprint']

_NAME = 'candidates.jsonl'


class Journal:
    """Rows of candidates in `FOLDER/candidates.jsonl`; without a folder they are kept in memory only.

    A search that starts again with the same network and images finds its candidates here instead of making them, and so
    comes to where it was.

    Args:
        folder: Where; made if need be.
        key: `fingerprint` of what the rows hold for.
        resume: Go on with what is there.

    Raises:
        LeanError: There is an unfinished search and nothing was said of going on, or one of another network.
    """

    def __init__(self, folder: str | Path | None, key: str, resume: bool):
        self.path = None if folder is None else writable_dir(folder) / _NAME
        self.rows: dict[str, dict[str, Any]] = {}
        self._head = {'search': key, 'finished': False}
        there = self._read() if self.path is not None and self.path.exists() else []
        if len(there) > 1 and not there[0].get('finished') and not resume:  # without a candidate nothing is lost
            raise LeanError(f'{self.path} holds an unfinished search: go on with it by resume, or remove it.')
        if there and resume:
            if there[0].get('search') != key:
                raise LeanError(f'{self.path} is of another network, other images or another measure; a search goes on '
                                'only with the same. Name another folder, or start anew without resume.')
            self.rows = {_key(Plan.from_dict(row['plan'])): row for row in there[1:]}
        self._write()

    def get(self, plan: Plan) -> tuple[Sizes, float] | None:
        """A candidate that was judged before: its sizes and score."""
        row = self.rows.get(_key(plan))
        return None if row is None else (Sizes(**row['sizes']), row['score'])

    def add(self, plan: Plan, sizes: Sizes, score: float, seconds: float) -> None:
        self.rows[_key(plan)] = {
            'plan': plan.to_dict(), 'sizes': vars(sizes), 'score': score, 'seconds': round(seconds, 2)}
        self._write()

    def finish(self) -> None:
        self._head['finished'] = True
        self._write()

    def _read(self) -> list[dict[str, Any]]:
        assert self.path is not None
        try:
            rows = [json.loads(line) for line in self.path.read_text().splitlines()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError('a line is no object')
            for row in rows[1:]:
                Plan.from_dict(row['plan']), Sizes(**row['sizes']), float(row['score'])
        except (ValueError, KeyError, TypeError) as e:
            raise LeanError(f'{self.path} is damaged ({type(e).__name__}: {e}): remove it.') from e
        return rows

    def _write(self) -> None:
        if self.path is not None:
            with atomic_file(self.path) as temporary:
                temporary.write_text(''.join(json.dumps(row) + '\n' for row in (self._head, *self.rows.values())))


def fingerprint(subject: Subject, images: list[torch.Tensor], judge: str) -> str:
    """What a search's candidates hold for: structure, weights, images, and what judges them."""
    digest = hashlib.sha256((subject.structure() + judge).encode())
    for tensor in [*subject.model.state_dict().values(), *images]:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _key(plan: Plan) -> str:
    return json.dumps(plan.to_dict(), sort_keys=True)
