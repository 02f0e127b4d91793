"""What calibration did, layer by layer."""
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ['CalibrationReport', 'LayerFit']


@dataclass
class LayerFit:
    """One layer, on the held-out images.

    Attributes:
        name: Its name.
        aim: What it was fitted to: 'output' of the original's layer, 'sum' that ends its residual branch, or 'group'
            for a basis, fitted to the outputs of all its layers.
        before: `||y' - t|| / ||t||`, y' its output on the compressed network's inputs, t what it should be.
        after: The same with its new weights.
        samples: Positions of images that it was fitted to.
    """
    name: str
    aim: str
    before: float
    after: float
    samples: int


@dataclass
class CalibrationReport:
    """What calibration did.

    Attributes:
        layers: The fitted layers in order; of several rounds the last that was kept.
        before: Relative error of the network's output on held-out images, uncalibrated.
        after: The same for the result.
        rounds: Rounds of reconstruction that were kept.
        reestimated: Whether the statistics of the batch norms were measured anew, that is, whether it helped.
        images: Images fitted to.
        held_out: Images held out, by which it is judged.
    """
    layers: list[LayerFit] = field(default_factory=list)
    before: float = 0.
    after: float = 0.
    rounds: int = 0
    reestimated: bool = False
    images: int = 0
    held_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [f'{"layer":{width}}  aim     samples  error before   after']
        lines += [f'{la.name:{width}}  {la.aim:6}  {la.samples:7,}  {la.before:12.4f}  {la.after:6.4f}'
                  for la in self.layers]
        return '\n'.join([*lines, self.summary])

    @property
    def summary(self) -> str:
        """One line."""
        return (f'error of the output on {self.held_out:,} held-out images {self.before:.4f} -> {self.after:.4f}; '
                f'{self.images:,} images, {self.rounds} rounds, batch norms '
                f'{"measured anew" if self.reestimated else "as they were"}')
