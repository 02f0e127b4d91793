"""What a search shows while it works: a bar on a terminal, elsewhere a line now and then."""
import sys
import time

from tqdm import tqdm

__all__ = ['Progress']

_LINE_SECONDS = 30  # between two lines where there is no terminal


class Progress:
    """Networks counted, on stderr.

    Args:
        show: Whether to show anything.
        minutes: Time for the search.
        start: When it began, by `time.monotonic()`.
    """

    def __init__(self, show: bool, minutes: float, start: float):
        self._lines = show and not sys.stderr.isatty()
        self._minutes, self._start, self._shown = minutes, start, start
        self._count, self._stage = 0, ''
        self.bar = tqdm(desc='compress', unit=' networks', disable=not show or self._lines, leave=False)

    def stage(self, name: str) -> None:
        """What is done now."""
        self._stage = name
        self.bar.set_description_str(f'compress, {name}')
        self._line(f'compress: {name}')

    def network(self, score: str, made: str) -> None:
        """One more was judged."""
        self._count += 1
        self.bar.update()
        self.bar.set_postfix_str(score)  # no more: a bar longer than the terminal leaves its lines behind
        minutes = (time.monotonic() - self._start) / 60
        self._line(f'compress: {self._stage}, network {self._count} after {minutes:.1f} of {self._minutes:g} minutes, '
                   f'{score}: {made}')

    def _line(self, text: str) -> None:
        if self._lines and time.monotonic() - self._shown >= _LINE_SECONDS:
            print(text, file=sys.stderr, flush=True)
            self._shown = time.monotonic()
