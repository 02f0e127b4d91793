"""What a conversion did, layer by layer."""
from collections import Counter
from dataclasses import dataclass, field

from timm_lean.layers.lean_report import LeanReport

__all__ = ['LayerShare', 'ShareReport']


@dataclass
class LayerShare:
    """One converted layer.

    Attributes:
        name: Its name in the model.
        group: Index of its group.
        shared_rank: Rank of the factor it shares; in grouped convolutions that of each group.
        unique_rank: Further filters of its own.
        energy: Share of its weight's squared norm that is kept.
        output_error: `||y - y'|| / ||y||` of its output for the example input; None without one.
        form: 'rows' if the filters are shared, 'columns' if what combines them is.
    """
    name: str
    group: int
    shared_rank: int
    unique_rank: int
    energy: float
    output_error: float | None = None
    form: str = 'rows'


@dataclass(frozen=True, kw_only=True)
class ShareReport(LeanReport):
    """What `share` did.

    Attributes:
        layers: The converted layers.
        output_error: Relative error of the network's output in eval mode for the example input; None without one.
        left: Why other convolutions and linear layers stay as they are, by name.
    """
    layers: tuple[LayerShare, ...]
    output_error: float | None = None
    left: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [f'{"layer":{width}}  group  factor   shared  unique  energy kept  output error']
        for la in self.layers:
            error = '-' if la.output_error is None else f'{la.output_error:.4f}'
            lines.append(f'{la.name:{width}}  {la.group:5}  {la.form:7}  {la.shared_rank:6}  {la.unique_rank:6}  '
                         f'{100 * la.energy:9.2f} %  {error:>12}')
        lines += super().lines()
        if self.output_error is not None:
            lines.append(f'relative error of the output {self.output_error:.4f}')
        lines += [f'left as they are: {count} ({reason})' for reason, count in Counter(self.left.values()).items()]
        return lines
