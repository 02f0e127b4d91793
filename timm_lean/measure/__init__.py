"""What a network costs and how it behaves: parameters, MACs, latency, memory, depth, similarity, identity."""
from .conv_depth import conv_depth
from .report import ModelReport, count_macs, count_params, format_table, measure_latency, model_reports, to_json

__all__ = [
    'ModelReport', 'conv_depth', 'count_macs', 'count_params', 'format_table', 'measure_latency', 'model_reports',
    'to_json',
]
